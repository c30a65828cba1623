"""The published runs, typed from the authors' commands and papers and not from the recipe files.

Whatever a run does not state has the value that the scripts of ConvNeXt, RepLKNet, SLaK, Shift-wise convolution and
UniRepLKNet share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IMAGES = {"ImageNet-1K": 1_281_167, "ImageNet-22K": 14_197_122}


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
        model: name of the network here.
        devices: nodes, GPUs of each, images per GPU, forward passes per step.
        total: images per optimizer step.
        drop_path: rate of the deepest block.
        top1: published accuracy in percent.
        layer_decay: factor of the learning rate from one of the twelve layer groups to the next.
        start: weights to start from.
        mixing: strengths of mixup and cutmix, if `mixes`.
        sparsity: sparsity, steps between updates, share of weights that move, unit, layers.
        args: arguments of the network besides the drop path rate.
    """

    model: str
    devices: tuple[int, int, int, int]
    total: int
    drop_path: float | None
    top1: float | None
    epochs: int = 300
    warmup: int = 20
    lr: float = 4e-3
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float | None = None
    head_scale: float | None = None
    ema: bool = True
    mixes: bool = True
    size: int = 224
    data: str = "ImageNet-1K"
    start: str | None = None
    sparsity: tuple[float, int, float, str, str] | None = None
    share_every: int = 1
    response_norms: bool = False
    mixing: tuple[float, float] = (0.8, 1.0)
    smoothing: float = 0.1
    args: dict[str, Any] = field(default_factory=dict)


def _finetuned(
    model: str, devices: tuple[int, int, int, int], total: int, drop_path: float, top1: float, **changes: Any
) -> Run:
    shared = {"epochs": 30, "weight_decay": 1e-8, "mixes": False, "ema": False}
    return Run(model, devices, total, drop_path, top1, **{**shared, **changes})


def _convnext_finetuned(variant: str, start: str, *run: Any, **changes: Any) -> Run:
    shared = {"lr": 5e-5, "warmup": 0, "head_scale": 0.001, "start": f"convnext_{variant}.fb_{start}"}
    return _finetuned(f"convnext_{variant}", *run, **{**shared, **changes})


def _replknet_finetuned(variant: str, start: str, *run: Any, **changes: Any) -> Run:
    shared = {"lr": 4e-4, "warmup": 1, "layer_decay": 0.7, "ema": True, "start": f"replknet_{variant}.{start}_224"}
    return _finetuned(f"replknet_{variant}", *run, **{**shared, **changes})


CONVNEXT = {
    "convnext_tiny_in1k_300e_224": Run("convnext_tiny", (4, 8, 128, 1), 4096, 0.1, 82.1),
    "convnext_small_in1k_300e_224": Run("convnext_small", (4, 8, 128, 1), 4096, 0.4, 83.1),
    "convnext_base_in1k_300e_224": Run("convnext_base", (4, 8, 128, 1), 4096, 0.5, 83.8),
    "convnext_large_in1k_300e_224": Run("convnext_large", (8, 8, 64, 1), 4096, 0.5, 84.3),
    "convnext_isotropic_small_in1k_300e_224": Run(
        "convnext_isotropic_small", (4, 8, 128, 1), 4096, 0.1, 78.7, warmup=50, args={"layer_scale": 0}
    ),
    "convnext_isotropic_base_in1k_300e_224": Run(
        "convnext_isotropic_base", (4, 8, 128, 1), 4096, 0.2, 82.0, warmup=50, args={"layer_scale": 0}
    ),
    "convnext_isotropic_large_in1k_300e_224": Run(
        "convnext_isotropic_large", (8, 8, 64, 1), 4096, 0.5, 82.6, warmup=50, args={"layer_scale": 1e-6}
    ),
    **{
        f"convnext_{size}_in22k_90e_224": Run(
            f"convnext_{size}", (16, 8, 32, 1), 4096, rate, None, epochs=90, warmup=5, ema=False, data="ImageNet-22K"
        )
        for size, rate in (("base", 0.1), ("large", 0.1), ("xlarge", 0.2))
    },
    "convnext_base_in1k_30e_384_from_in1k": _convnext_finetuned(
        "base", "in1k", (2, 8, 32, 1), 512, 0.8, 85.1, size=384, layer_decay=0.7
    ),
    "convnext_large_in1k_30e_384_from_in1k": _convnext_finetuned(
        "large", "in1k", (2, 8, 32, 1), 512, 0.95, 85.5, size=384, layer_decay=0.7
    ),
    "convnext_base_in1k_30e_224_from_in22k": _convnext_finetuned(
        "base", "in22k", (2, 8, 32, 1), 512, 0.2, 85.8, layer_decay=0.8
    ),
    "convnext_large_in1k_30e_224_from_in22k": _convnext_finetuned(
        "large", "in22k", (2, 8, 32, 1), 512, 0.3, 86.6, layer_decay=0.8
    ),
    "convnext_xlarge_in1k_30e_224_from_in22k": _convnext_finetuned(
        "xlarge", "in22k", (4, 8, 16, 1), 512, 0.4, 87.0, layer_decay=0.8, ema=True
    ),
    "convnext_base_in1k_30e_384_from_in22k": _convnext_finetuned(
        "base", "in22k", (4, 8, 16, 1), 512, 0.2, 86.8, size=384, layer_decay=0.8
    ),
    "convnext_large_in1k_30e_384_from_in22k": _convnext_finetuned(
        "large", "in22k", (4, 8, 16, 1), 512, 0.3, 87.5, size=384, layer_decay=0.8
    ),
    "convnext_xlarge_in1k_30e_384_from_in22k": _convnext_finetuned(
        "xlarge", "in22k", (8, 8, 8, 1), 512, 0.4, 87.8, size=384, layer_decay=0.8, ema=True
    ),
}

_STEPS = {
    "roadmap_00_resnet50": 78.82,
    "roadmap_01_stage_ratio": 79.36,
    "roadmap_02_patchify": 79.51,
    "roadmap_03_depthwise": 78.28,
    "roadmap_04_width": 80.50,
    "roadmap_05_inverted": 80.64,
    "roadmap_06_dw_first": 79.92,
    "roadmap_07_kernel7": 80.57,
    "roadmap_08_gelu": 80.62,
    "roadmap_09_fewer_acts": 81.27,
    "roadmap_10_fewer_norms": 81.41,
    "roadmap_11_layernorm": 81.47,
    "roadmap_12_final_norm": None,
    "roadmap_13_convnext_t": 81.97,
}
ROADMAP = {f"{name}_in1k_300e_224": Run(name, (4, 8, 128, 1), 4096, 0.1, top1, ema=False) for name, top1 in _STEPS.items()}

REPLKNET = {
    "replknet_31b_in1k_300e_224": Run("replknet_31b", (4, 8, 64, 1), 2048, 0.5, 83.5, warmup=10),
    **{
        f"replknet_{size}_in22k_90e_224": Run(
            f"replknet_{size}", (16, 8, 32, 1), 4096, 0.1, None, epochs=90, warmup=5, ema=False, data="ImageNet-22K"
        )
        for size in ("31b", "31l")
    },
    "replknet_31b_in1k_30e_384_from_in1k": _replknet_finetuned("31b", "in1k", (4, 8, 32, 1), 1024, 0.8, 84.8, size=384),
    "replknet_31b_in1k_30e_224_from_in22k": _replknet_finetuned("31b", "in22k", (2, 8, 32, 1), 512, 0.2, 85.2),
    "replknet_31b_in1k_30e_384_from_in22k": _replknet_finetuned(
        "31b", "in22k", (4, 8, 16, 1), 512, 0.3, 86.0, size=384, min_lr=3e-4
    ),
    "replknet_31l_in1k_30e_384_from_in22k": _replknet_finetuned(
        "31l", "in22k", (4, 8, 16, 1), 512, 0.3, 86.6, size=384, min_lr=3e-4
    ),
}

_K51 = {"kernel_sizes": [51, 49, 47, 13], "small_kernel": 5, "width_factor": 1.3}
_TINY = (0.4, 2000, 0.5, "element", "all")
_LARGER = (0.4, 100, 0.3, "element", "all")
SLAK = {
    "slak_tiny_in1k_300e_224": Run("slak_tiny", (1, 4, 128, 8), 4096, 0.1, 82.5, sparsity=_TINY, args=_K51),
    "slak_small_in1k_300e_224": Run("slak_small", (1, 8, 64, 8), 4096, 0.4, 83.8, sparsity=_LARGER, args=_K51),
    "slak_base_in1k_300e_224": Run("slak_base", (1, 16, 32, 8), 4096, 0.5, 84.0, sparsity=_LARGER, args=_K51),
    **{
        f"slak_tiny_in1k_120e_224_k{kernel}": Run(
            "slak_tiny",
            (1, 4, 128, 8),
            4096,
            0.1,
            top1,
            epochs=120,
            sparsity=_TINY,
            args={**_K51, "kernel_sizes": [kernel, kernel - 2, kernel - 4, 13]},
        )
        for kernel, top1 in ((31, 81.5), (51, 81.6), (61, 81.5))
    },
    "slak_tiny_in1k_300e_224_k7": Run(
        "slak_tiny",
        (1, 4, 128, 8),
        4096,
        0.1,
        None,
        args={"kernel_sizes": [7, 7, 7, 7], "small_kernel": 0, "width_factor": 1.0, "decomposed": False},
    ),
}

_PW = {**_K51, "kernel_sizes": [51, 49, 43, 13]}
_COARSE = (0.4, 2000, 0.5, "kernel", "large_kernel_only")
SHIFTWISE = {
    "slak_pw_tiny_in1k_300e_224": Run("slak_pw_tiny", (1, 3, 64, 21), 4032, 0.1, 82.27, sparsity=_TINY, args=_PW),
    "slak_pww_tiny_in1k_300e_224": Run(
        "slak_pww_tiny",
        (1, 3, 48, 28),
        4032,
        0.1,
        82.27,
        sparsity=_TINY,
        args={**_K51, "kernel_sizes": [51, 49, 45, 13]},
    ),
    "slak_pw_tiny_in1k_300e_224_pad_k_minus_1": Run(
        "slak_pw_tiny", (1, 3, 64, 21), 4032, 0.1, 82.38, sparsity=_TINY, args={**_PW, "padding": "k-1"}
    ),
    "slak_pw_tiny_in1k_120e_224_coarse_pad_k_minus_1": Run(
        "slak_pw_tiny", (1, 3, 64, 21), 4032, 0.1, 81.36, epochs=120, sparsity=_COARSE, args={**_PW, "padding": "k-1"}
    ),
    "slak_pw_tiny_in1k_120e_224_coarse_pad_half_k": Run(
        "slak_pw_tiny", (1, 3, 64, 21), 4032, 0.1, 81.26, epochs=120, sparsity=_COARSE, args={**_PW, "padding": "same"}
    ),
    "slak_pw_tiny_in1k_120e_224_branches": Run(
        "slak_pw_tiny",
        (1, 3, 64, 21),
        4032,
        0.1,
        82.05,
        epochs=120,
        sparsity=_TINY,
        args={**_PW, "padding": "k-1", "branches": 2},
    ),
    "shiftwise_tiny_in1k_300e_224": Run(
        "shiftwise_tiny",
        (1, 8, 64, 8),
        4096,
        0.2,
        83.39,
        warmup=5,
        ema=False,
        sparsity=(0.3, 100, 0.3, "kernel", "large_kernel_only"),
        share_every=131,
        response_norms=True,
        args={
            "kernel_sizes": [51, 49, 47, 13],
            "small_kernel": 3,
            "width_factor": 1.0,
            "ghost_ratio": 0.23,
            "paths": 2,
            "groups": 4,
        },
    ),
}


def _unireplknet(variant: str, drop_path: float, top1: float, **changes: Any) -> Run:
    devices = (1, 8, 64, 8) if variant == "s" else (1, 4, 128, 8)
    return Run(f"unireplknet_{variant}", devices, 4096, drop_path, top1, ema=False, response_norms=True, **changes)


def _unireplknet_in22k(variant: str, devices: tuple[int, int, int, int], drop_path: float, **changes: Any) -> Run:
    shared = {"epochs": 90, "warmup": 5, "ema": False, "data": "ImageNet-22K", "response_norms": True}
    return Run(f"unireplknet_{variant}", devices, 4096, drop_path, None, **{**shared, **changes})


def _unireplknet_finetuned(variant: str, start: int, *run: Any, **changes: Any) -> Run:
    shared = {"lr": 5e-5, "warmup": 0, "head_scale": 0.001, "layer_decay": 0.8, "size": 384, "response_norms": True}
    name = f"unireplknet_{variant}"
    return _finetuned(name, *run, **{**shared, "start": f"{name}.in22k_{start}", **changes})


_INTERNIMAGE = {"epochs": 20, "ema": True, "smoothing": 0.3}
UNIREPLKNET = {
    "unireplknet_a_in1k_300e_224": _unireplknet("a", 0.0, 77.03, mixing=(0.3, 0.3)),
    "unireplknet_f_in1k_300e_224": _unireplknet("f", 0.0, 78.58, mixing=(0.3, 0.3)),
    "unireplknet_p_in1k_300e_224": _unireplknet("p", 0.1, 80.23, mixing=(0.3, 0.3)),
    "unireplknet_n_in1k_300e_224": _unireplknet("n", 0.1, 81.64, mixing=(0.5, 0.5)),
    "unireplknet_t_in1k_300e_224": _unireplknet("t", 0.2, 83.21),
    "unireplknet_s_in1k_300e_224": _unireplknet("s", 0.4, 83.91),
    "unireplknet_s_in22k_90e_224": _unireplknet_in22k("s", (2, 8, 32, 8), 0.1),
    "unireplknet_b_in22k_90e_224": _unireplknet_in22k("b", (2, 8, 32, 8), 0.1),
    "unireplknet_l_in22k_90e_192": _unireplknet_in22k("l", (2, 8, 64, 4), 0.1, lr=1e-3, size=192),
    "unireplknet_xl_in22k_90e_192": _unireplknet_in22k("xl", (4, 8, 32, 4), 0.2, lr=1e-3, size=192),
    "unireplknet_s_in1k_30e_384_from_in22k": _unireplknet_finetuned("s", 224, (1, 4, 64, 2), 512, 0.2, 86.44),
    "unireplknet_b_in1k_30e_384_from_in22k": _unireplknet_finetuned("b", 224, (1, 4, 64, 2), 512, 0.2, 87.4),
    "unireplknet_l_in1k_20e_384_from_in22k": _unireplknet_finetuned(
        "l", 192, (1, 4, 64, 2), 512, 0.3, 87.88, **_INTERNIMAGE
    ),
    "unireplknet_xl_in1k_20e_384_from_in22k": _unireplknet_finetuned(
        "xl", 192, (1, 8, 32, 2), 512, 0.3, 87.96, **_INTERNIMAGE
    ),
}

TRAINED = {**CONVNEXT, **ROADMAP, **REPLKNET, **SLAK, **SHIFTWISE, **UNIREPLKNET}
"""Runs that train weights, without distillation."""

MASKED = {
    "resnet18_in1k_1e_224_2to4": ("resnet18", 256, 1),
    "resnet18_in1k_9e_224_2to4": ("resnet18", 256, 9),
    "resnet34_in1k_1e_224_2to4": ("resnet34", 256, 1),
    "resnet34_in1k_9e_224_2to4": ("resnet34", 256, 9),
    "resnet50_in1k_1e_224_2to4": ("resnet50", 128, 1),
    "resnet50_in1k_9e_224_2to4": ("resnet50", 128, 9),
    "convnext_tiny_in1k_10e_224_2to4": ("convnext_tiny", 32, 10),
    "convnext_tiny_in1k_30e_224_2to4": ("convnext_tiny", 32, 30),
    "convnext_small_in1k_9e_224_2to4": ("convnext_small", 32, 9),
    "convnext_small_in1k_30e_224_2to4": ("convnext_small", 32, 30),
}
"""Learned 2:4 masks: model, batch, epochs."""

BASELINES = {
    f"{model}_in1k_224_2to4_{method}": (model, method)
    for model in ("resnet18", "resnet34", "resnet50", "convnext_tiny", "convnext_small")
    for method in ("magnitude", "permuted")
}
"""2:4 masks by magnitude: model, method."""

DISTILLED = {
    "slak_tiny_in1k_300e_224_k7_from_slak_tiny": ("slak_tiny", (1, 4, 64, 8), 2048, 300, 83.1),
    "slak_small_in1k_300e_224_k7_from_slak_small": ("slak_small", (1, 4, 64, 16), 4096, 300, 84.3),
    "resnet50_in1k_120e_224_from_slak_tiny": ("resnet50", (1, 2, 64, 8), 1024, 120, None),
}
"""Distilled networks: student, devices, images per step, epochs, accuracy."""

OTHERS = {"replknet_xl_in1k_320_eval", "slak_nano_digits"}
"""Recipes that train no published network."""
