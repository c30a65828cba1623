"""The published detection runs, typed from the authors' configurations and not from the recipe files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.recipes.published_dense import CONVNEXT, NORMED, SHIFTWISE, SLAK, Dense


@dataclass(frozen=True, kw_only=True)
class Detected(Dense):
    """A published detection run.

    Attributes:
        epochs: passes over the data.
        milestones: epochs after which the rate falls to a tenth.
        detector: kind of detector.
        clip: limit of the norm of the gradients.
        schedule: row of `lr_schedules.json` with the same schedule, besides the rate.
    """

    epochs: int = 36
    milestones: tuple[int, ...] = (27, 33)
    detector: str = "cascade_rcnn"
    clip: float | None = None
    schedule: str = "cascade_3x"


def _ap(box: float, mask: float) -> dict[str, float]:
    return {"box_AP": box, "mask_AP": mask}


def _convnext_coco(size: str, start: str, drop_path: float, lr: float, layers: tuple[float, str], *run: Any) -> Detected:
    published, fp16 = run
    return Detected(
        f"convnext_{size}",
        f"convnext_{size}.fb_{start}",
        (1, 8, 2),
        drop_path,
        lr,
        published,
        f"convnext_{size}.{start}_ft_coco_cascade",
        layers,
        CONVNEXT,
        fp16=fp16,
        size=f"cascade_convnext_{size}",
    )


def _replknet_coco(model: str, start: str, drop_path: float, published: dict[str, float], size: str) -> Detected:
    data = start.partition("_")[0]
    return Detected(
        model, f"{model}.{start}", (4, 8, 1), drop_path, 4e-4, published, f"{model}.{data}_ft_coco_cascade", size=size
    )


def _unireplknet_coco(variant: str, start: str, drop_path: float, decay: float, box: float, mask: float) -> Detected:
    model, data = f"unireplknet_{variant}", start.partition("_")[0]
    return Detected(
        model,
        f"{model}.{start}",
        (1, 8, 2),
        drop_path,
        1e-4,
        _ap(box, mask),
        f"{model}.{data}_ft_coco_cascade",
        (decay, "layer_wise12"),
        response_norms=True,
        checkpointing=True,
        ema=data == "in22k",
    )


DETECTION = {
    "unireplknet_t_coco_36e_800_cascade": _unireplknet_coco("t", "in1k_224", 0.3, 0.8, 51.7, 44.9),
    "unireplknet_s_coco_36e_800_cascade": _unireplknet_coco("s", "in1k_224", 0.5, 0.8, 53.0, 45.9),
    "unireplknet_s_coco_36e_800_cascade_from_in22k": _unireplknet_coco("s", "in22k_224", 0.5, 0.8, 54.3, 47.1),
    "unireplknet_b_coco_36e_800_cascade_from_in22k": _unireplknet_coco("b", "in22k_224", 0.6, 0.8, 54.8, 47.4),
    "unireplknet_l_coco_36e_800_cascade_from_in22k": _unireplknet_coco("l", "in22k_192", 0.7, 0.7, 55.8, 48.4),
    "unireplknet_xl_coco_36e_800_cascade_from_in22k": _unireplknet_coco("xl", "in22k_192", 0.7, 0.7, 56.4, 49.0),
    "convnext_tiny_coco_36e_800_cascade": _convnext_coco(
        "tiny", "in1k", 0.4, 2e-4, (0.7, "layer_wise6"), _ap(50.4, 43.7), True
    ),
    "convnext_small_coco_36e_800_cascade": _convnext_coco(
        "small", "in1k", 0.6, 2e-4, (0.7, "layer_wise12"), _ap(51.9, 45.0), True
    ),
    "convnext_base_coco_36e_800_cascade": _convnext_coco(
        "base", "in1k", 0.7, 2e-4, (0.8, "layer_wise12"), _ap(52.7, 45.6), True
    ),
    "convnext_base_coco_36e_800_cascade_from_in22k": _convnext_coco(
        "base", "in22k", 0.6, 1e-4, (0.8, "layer_wise12"), _ap(54.0, 46.9), True
    ),
    "convnext_large_coco_36e_800_cascade_from_in22k": _convnext_coco(
        "large", "in22k", 0.7, 1e-4, (0.7, "layer_wise12"), _ap(54.8, 47.6), False
    ),
    "convnext_xlarge_coco_36e_800_cascade_from_in22k": _convnext_coco(
        "xlarge", "in22k", 0.8, 1e-4, (0.7, "layer_wise12"), _ap(55.2, 47.7), False
    ),
    "convnext_tiny_coco_36e_800_maskrcnn": Detected(
        "convnext_tiny",
        "convnext_tiny.fb_in1k",
        (1, 8, 2),
        0.4,
        1e-4,
        _ap(46.2, 41.7),
        "convnext_tiny.in1k_ft_coco_maskrcnn",
        (0.95, "layer_wise6"),
        CONVNEXT,
        fp16=True,
        size="mask_convnext_tiny",
        detector="mask_rcnn",
    ),
    "slak_tiny_coco_36e_800_cascade": Detected(
        "slak_tiny",
        "slak_tiny.in1k_224",
        (1, 8, 2),
        0.4,
        2e-4,
        _ap(51.3, 44.3),
        "slak_tiny.in1k_ft_coco_cascade_3x",
        (0.7, "layer_wise6"),
        SLAK,
        fixed_zeros=True,
        size="cascade_slak_tiny",
    ),
    "slak_tiny_coco_12e_800_cascade": Detected(
        "slak_tiny",
        "slak_tiny.k51_e120_in1k_224",
        (1, 8, 2),
        0.4,
        2e-4,
        _ap(48.4, 41.8),
        "slak_tiny.in1k_ft_coco_cascade_1x",
        (0.7, "layer_wise6"),
        SLAK,
        fixed_zeros=True,
        size="cascade_slak_tiny",
        epochs=12,
        milestones=(8, 11),
        schedule="slak_1x",
    ),
    "shiftwise_tiny_coco_36e_800_cascade": Detected(
        "shiftwise_tiny",
        "shiftwise_tiny.in1k_224",
        (1, 8, 2),
        0.4,
        1e-4,
        layers=(0.8, "layer_wise12"),
        args=SHIFTWISE,
        fixed_zeros=True,
    ),
    "replknet_31b_coco_36e_800_cascade": _replknet_coco(
        "replknet_31b", "in1k_224", 0.6, _ap(52.2, 45.2), "cascade_replknet31b"
    ),
    "replknet_31b_coco_36e_800_cascade_from_in22k": _replknet_coco(
        "replknet_31b", "in22k_224", 0.4, _ap(53.0, 46.0), "cascade_replknet31b"
    ),
    "replknet_31l_coco_36e_800_cascade_from_in22k": _replknet_coco(
        "replknet_31l", "in22k_224", 0.7, _ap(53.9, 46.5), "cascade_replknet31l"
    ),
    "replknet_xl_coco_36e_800_cascade_from_megdata73m": Detected(
        "replknet_xl",
        "replknet_xl.megdata73m",
        (1, 8, 4),
        0.5,
        4e-4,
        _ap(55.5, 48.0),
        "replknet_xl.megdata73m_ft_coco_cascade",
        args=NORMED,
        mean=0.5,
        size="cascade_replknetxl",
    ),
    "replknet_31b_coco_24e_800_fcos": Detected(
        "replknet_31b",
        "replknet_31b.in1k_224",
        (1, 8, 2),
        0.5,
        2e-4,
        {"box_AP": 47.0},
        "replknet_31b.in1k_ft_coco_fcos",
        size="fcos_replknet31b",
        epochs=24,
        milestones=(16, 22),
        detector="fcos",
        clip=35.0,
        schedule="fcos_2x",
    ),
}
