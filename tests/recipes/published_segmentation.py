"""The published segmentation runs, typed from the authors' configurations and not from the recipe files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.recipes.published_dense import CONVNEXT, NORMED, SHIFTWISE, SLAK, Dense


@dataclass(frozen=True, kw_only=True)
class Segmented(Dense):
    """A published segmentation run.

    Attributes:
        steps: optimizer steps.
        warmup: steps of the warm-up.
        crop: side of the crops.
        scale: long and short side that images must not exceed.
        window: side and distance of the windows; `None` for the whole image.
        data: data set.
        align: whether the centers of corner pixels coincide.
        schedule: row of `lr_schedules.json` with the same schedule.
    """

    steps: int = 160_000
    warmup: int = 1500
    crop: int = 512
    scale: tuple[int, int] = (2048, 512)
    window: tuple[int, int] | None = (512, 341)
    data: str = "ADE20K"
    align: bool = False
    schedule: str | None = None


def _miou(single: float, several: float | None = None) -> dict[str, float]:
    return {"mIoU_ss": single} if several is None else {"mIoU_ss": single, "mIoU_ms": several}


def _convnext_ade(size: str, drop_path: float, published: dict[str, float], groups: int) -> Segmented:
    return Segmented(
        f"convnext_{size}",
        f"convnext_{size}.fb_in1k",
        (1, 8, 2),
        drop_path,
        1e-4,
        published,
        f"convnext_{size}.in1k_ft_ade20k_upernet_512",
        (0.9, f"stage_wise{groups}"),
        CONVNEXT,
        fp16=True,
        size=f"upernet_convnext_{size}_ade",
        schedule="convnext_ade",
    )


def _convnext_ade_640(size: str, lr: float, published: dict[str, float], fp16: bool) -> Segmented:
    return Segmented(
        f"convnext_{size}",
        f"convnext_{size}.fb_in22k",
        (1, 8, 2),
        0.4,
        lr,
        published,
        f"convnext_{size}.in22k_ft_ade20k_upernet_640",
        (0.9, "stage_wise12"),
        CONVNEXT,
        fp16=fp16,
        size=f"upernet_convnext_{size}_ade{'640' if size == 'base' else ''}",
        crop=640,
        scale=(2560, 640),
        window=(640, 426),
    )


def _slak_ade(size: str, drop_path: float, result: float, groups: int) -> Segmented:
    return Segmented(
        f"slak_{size}",
        f"slak_{size}.in1k_224",
        (1, 4, 4),
        drop_path,
        1e-4,
        _miou(result),
        f"slak_{size}.in1k_ft_ade20k_upernet_512",
        (0.9, f"stage_wise{groups}"),
        SLAK,
        fixed_zeros=True,
        size=f"upernet_slak_{size}_ade",
    )


def _replknet_ade(
    model: str, start: str, devices: tuple[int, int, int], drop_path: float, *run: Any, **more: Any
) -> Segmented:
    published, checkpoint, size = run
    return Segmented(
        model, f"{model}.{start}", devices, drop_path, 2e-4, published, f"{model}.{checkpoint}", size=size, **more
    )


def _unireplknet_ade(variant: str, drop_path: float, start: str, crop: int, *run: Any, **changes: Any) -> Segmented:
    published, layers = run
    model = f"unireplknet_{variant}"
    return Segmented(
        model,
        f"{model}.in1k_224" if start == "in1k" else f"{model}.in22k_ft_in1k_384",
        (1, 8, 2),
        drop_path,
        1e-4,
        published,
        f"{model}.{start}_ft_ade20k_upernet_{crop}",
        layers,
        response_norms=True,
        **{
            "checkpointing": True,
            "crop": crop,
            "scale": (2048, 512) if crop == 512 else (2560, 640),
            "window": None,
            **changes,
        },
    )


_TWELVE = (0.9, "layer_wise12")
_STEEPER = (0.85, "layer_wise12")
SEGMENTATION = {
    "unireplknet_t_ade20k_160k_512": _unireplknet_ade(
        "t", 0.2, "in1k", 512, _miou(48.6, 49.1), (1.0, "layer_wise9"), checkpointing=False
    ),
    "unireplknet_s_ade20k_160k_512": _unireplknet_ade("s", 0.3, "in1k", 512, _miou(50.5, 51.0), _TWELVE),
    "unireplknet_s_ade20k_160k_512_from_in22k": _unireplknet_ade("s", 0.3, "in22k", 512, _miou(51.9, 52.7), _TWELVE),
    "unireplknet_s_ade20k_160k_640_from_in22k": _unireplknet_ade("s", 0.3, "in22k", 640, _miou(52.3, 52.7), _TWELVE),
    "unireplknet_b_ade20k_160k_640_from_in22k": _unireplknet_ade("b", 0.3, "in22k", 640, _miou(53.5, 53.9), _TWELVE),
    "unireplknet_l_ade20k_160k_640_from_in22k": _unireplknet_ade("l", 0.4, "in22k", 640, _miou(54.5, 55.0), _STEEPER),
    "unireplknet_xl_ade20k_160k_640_from_in22k": _unireplknet_ade("xl", 0.4, "in22k", 640, _miou(55.2, 55.6), _STEEPER),
    "convnext_tiny_ade20k_160k_512": _convnext_ade("tiny", 0.4, _miou(46.0, 46.7), 6),
    "convnext_small_ade20k_160k_512": _convnext_ade("small", 0.3, _miou(48.7, 49.6), 12),
    "convnext_base_ade20k_160k_512": _convnext_ade("base", 0.4, _miou(49.1, 49.9), 12),
    "convnext_base_ade20k_160k_640_from_in22k": _convnext_ade_640("base", 1e-4, _miou(52.6, 53.1), True),
    "convnext_large_ade20k_160k_640_from_in22k": _convnext_ade_640("large", 1e-4, _miou(53.2, 53.7), False),
    "convnext_xlarge_ade20k_160k_640_from_in22k": _convnext_ade_640("xlarge", 8e-5, _miou(53.6, 54.0), False),
    "slak_tiny_ade20k_160k_512": _slak_ade("tiny", 0.4, 47.6, 6),
    "slak_small_ade20k_160k_512": _slak_ade("small", 0.3, 49.4, 12),
    "slak_base_ade20k_160k_512": _slak_ade("base", 0.4, 50.0, 12),
    "slak_tiny_ade20k_80k_512": Segmented(
        "slak_tiny",
        "slak_tiny.in1k_224",
        (1, 4, 8),
        0.1,
        2e-4,
        args=SLAK,
        size="upernet_slak_tiny_ade",
        steps=80_000,
        warmup=800,
        schedule="slak_80k",
    ),
    "shiftwise_tiny_ade20k_160k_512": Segmented(
        "shiftwise_tiny",
        "shiftwise_tiny.in1k_224",
        (1, 4, 4),
        0.4,
        1e-4,
        layers=(1.0, "layer_wise9"),
        args=SHIFTWISE,
        fixed_zeros=True,
    ),
    "replknet_31b_ade20k_40k_512": _replknet_ade(
        "replknet_31b",
        "in1k_224",
        (8, 8, 2),
        0.5,
        _miou(49.9, 50.6),
        "in1k_ft_ade20k_upernet_512",
        "upernet_replknet31b_ade",
        steps=40_000,
        warmup=400,
        window=None,
        schedule="replknet31b_ade",
    ),
    "replknet_31b_ade20k_40k_640_from_in22k": _replknet_ade(
        "replknet_31b",
        "in22k_224",
        (8, 8, 2),
        0.3,
        _miou(51.5, 52.3),
        "in22k_ft_ade20k_upernet_640",
        "upernet_replknet31b_ade640",
        steps=40_000,
        warmup=400,
        crop=640,
        window=(640, 426),
        schedule="replknet31b_ade",
    ),
    "replknet_31l_ade20k_80k_640_from_in22k": _replknet_ade(
        "replknet_31l",
        "in22k_224",
        (8, 8, 1),
        0.3,
        _miou(52.4, 52.7),
        "in22k_ft_ade20k_upernet_640",
        "upernet_replknet31l_ade",
        steps=80_000,
        warmup=800,
        crop=640,
        window=(640, 426),
    ),
    "replknet_xl_ade20k_160k_640_from_megdata73m": _replknet_ade(
        "replknet_xl",
        "megdata73m",
        (2, 8, 2),
        0.5,
        _miou(55.2, 56.0),
        "megdata73m_ft_ade20k_upernet_640",
        "upernet_replknetxl_ade",
        args=NORMED,
        mean=0.5,
        crop=640,
        window=(640, 426),
    ),
    "replknet_31b_cityscapes_20k_769": _replknet_ade(
        "replknet_31b",
        "in1k_224",
        (4, 8, 2),
        0.5,
        _miou(83.1, 83.5),
        "in1k_ft_cityscapes_upernet_769",
        "upernet_replknet31b_cityscapes",
        steps=20_000,
        warmup=400,
        crop=769,
        scale=(2049, 1025),
        window=None,
        data="Cityscapes",
        align=True,
        schedule="replknet31b_cityscapes",
    ),
}
