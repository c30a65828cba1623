"""Shift-wise convolution: wide kernels out of small tiles that are moved differently in each direction.

Li et al., ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect, CVPR 2025.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from timm.layers import DropPath, Mlp, SqueezeExcite
from timm.layers.grn import GlobalResponseNorm
from timm.models import generate_default_cfgs
from torch import Tensor, full, nn

from widekernel.errors import ArgumentError
from widekernel.layers import LargeKernel, PartialChannels, ShiftTiles
from widekernel.layers.affine import fold_affine
from widekernel.layers.folding import Fusable, is_trained
from widekernel.layers.norms import affine_of, is_foldable
from widekernel.layers.partial import seeded_selection
from widekernel.layers.rebuilding import is_plain
from widekernel.layers.replacing import with_submodule
from widekernel.layers.sources import dilate
from widekernel.models.asked import Asked, Step
from widekernel.models.base import (
    Parts,
    Stage,
    StagedConvNet,
    check_stages,
    check_widths,
)
from widekernel.models.blocks import MixerBlock, alterations_around_scale, convnext_parts, init_convnext
from widekernel.models.building import default_cfg, register
from widekernel.models.layouts import shiftwise as layouts
from widekernel.models.layouts.layout import Layout


@dataclass(frozen=True)
class ShiftWiseConfig:
    """Architecture of a Shift-wise network.

    Attributes:
        kernel_sizes: K of each stage, odd.
        small_kernel: N, the side of the tiles.
        ghost_ratio: share of the channels that pass the large kernel untouched.
        paths: tile sets added up in training.
        groups: permutations a direction.
        width_factor: factor on `dims`, rounded down.
        depths: blocks a stage.
        dims: width of each stage.
        layer_scale: initial value, 0 for none.
        head_init_scale: factor on the initial weights of the classifier.
    """

    kernel_sizes: tuple[int, ...] = (51, 49, 47, 13)
    small_kernel: int = 3
    ghost_ratio: float = 0.23
    paths: int = 2
    groups: int = 4
    width_factor: float = 1.0
    depths: tuple[int, ...] = (3, 3, 18, 3)
    dims: tuple[int, ...] = (80, 160, 320, 640)
    layer_scale: float = 1e-6
    head_init_scale: float = 1.0

    def __post_init__(self) -> None:
        check_stages(kernel_sizes=self.kernel_sizes, depths=self.depths, dims=self.dims)
        check_widths(widths=self.widths)
        if not 0 <= self.ghost_ratio < 1:
            raise ArgumentError(f"ghost_ratio {self.ghost_ratio} must lie in [0, 1): some channels must be worked on")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(int(dim * self.width_factor) for dim in self.dims)


class ShiftWiseBlock(Fusable, nn.Module):
    """Block of the second version: shift-wise layer, batch norm, squeeze-excite, MLP with response norm, residual.

    Args:
        mixer: shift-wise layer, (N, C, H, W) -> (N, C, H, W).
        dim: C.
        drop_path: rate at which whole samples skip the block in training.
        layer_scale: initial value of the factor per channel, 0 for none.
        asked: which activation.
    """

    def __init__(self, mixer: nn.Module, dim: int, drop_path: float, layer_scale: float, asked: Asked) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = nn.BatchNorm2d(dim)
        self.se = SqueezeExcite(dim, rd_channels=dim // 4)
        act: Any = asked.activation(nn.GELU)
        self.mlp = Mlp(dim, 4 * dim, act_layer=act, norm_layer=GlobalResponseNorm, bias=(True, False))
        self.norm2 = nn.BatchNorm2d(dim)
        self.gamma = nn.Parameter(full((dim,), layer_scale)) if layer_scale > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.se(self.norm(self.mixer(x)))
        y = self.norm2(self.mlp(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def foldable(self) -> bool:
        """Whether norms and mixer can be folded."""
        around = is_foldable(self.norm) and is_foldable(self.norm2) and is_plain(self.mlp.fc2)
        return around and getattr(self.mixer, "foldable", lambda: False)() and not self.alterations()

    def alterations(self) -> list[str]:
        """List hooks, replaced methods and a parametrisation that keep norms and layer scale from being folded."""
        parts = self.norm, self.norm2
        if self.gamma is None and all(type(part) is nn.Identity for part in parts):
            return []
        return alterations_around_scale(self, "mixer", "norm", "norm2")

    def folded(self) -> ShiftWiseBlock:
        """Fold the first norm into the shift-wise layer, the second and the layer scale into the MLP."""
        dim: int = self.mlp.fc2.out_features  # type: ignore[assignment]
        trained = is_trained(self.mixer, self.norm)
        self.mixer = self.mixer.folded(*affine_of(self.norm, dim)).requires_grad_(trained)  # type: ignore[operator]
        scale, shift = affine_of(self.norm2, dim)
        if self.gamma is not None:
            scale, shift = scale * self.gamma.detach().double(), shift * self.gamma.detach().double()
        fc2 = fold_affine(self.mlp.fc2, scale, shift).requires_grad_(is_trained(self.mlp.fc2, self.norm2, self.gamma))
        self.mlp = with_submodule(self.mlp, "fc2", fc2)
        self.norm, self.norm2 = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.gamma = None
        return self


class ShiftWise(StagedConvNet):
    """Shift-wise network, second version: convolutional stem, squeeze-excite, response norm.

    Its arguments are those of `StagedConvNet`.
    """

    def parts(self, cfg: ShiftWiseConfig, asked: Asked) -> Parts:
        """Make stem and stages."""
        stages, steps = [], asked.steps(len(cfg.widths))
        for i, (width, step) in enumerate(zip(cfg.widths, steps)):
            blocks = []
            for rate in asked.rates[i]:
                mixer = _shift_wise(width, cfg.kernel_sizes[i], cfg, _even_part, step.dilation)
                blocks.append(ShiftWiseBlock(mixer, width, rate, cfg.layer_scale, asked))
            downsample = _conv_downsample(cfg.widths[i - 1], width, step, asked) if i else nn.Identity()
            stages.append((Stage(downsample, blocks), width))
        return Parts(_conv_stem(cfg.widths[0], asked), stages, [step.reduction for step in steps])

    def init_weights(self) -> None:
        """Initialise as ConvNeXt does."""
        init_convnext(self, self.cfg.head_init_scale)

    def layouts(self) -> tuple[Layout, ...]:
        """Give the layout of the official network, merged or not."""
        return layouts.second_version(len(self.cfg.dims))


class ShiftWiseV1(StagedConvNet):
    """Shift-wise network, first version: ConvNeXt's stem and blocks around the shift-wise layer.

    Its arguments are those of `StagedConvNet`.
    """

    def parts(self, cfg: ShiftWiseConfig, asked: Asked) -> Parts:
        """Make ConvNeXt's frame with Shift-wise layers."""

        def block(i: int, width: int, rate: float, step: Step) -> MixerBlock:
            mixer = _shift_wise(width, cfg.kernel_sizes[i], cfg, _all_but_ghosts, step.dilation)
            return MixerBlock(mixer, width, rate, cfg.layer_scale, asked)

        return convnext_parts(cfg.widths, asked, block)

    def init_weights(self) -> None:
        """Initialise as ConvNeXt does."""
        init_convnext(self, self.cfg.head_init_scale)

    def layouts(self) -> tuple[Layout, ...]:
        """Give the layout of the official network, merged or not."""
        return layouts.first_version(len(self.cfg.dims))


def _even_part(channels: int, ghost_ratio: float) -> int:
    """Count the channels that the second version works on, an even number."""
    return int(channels * (1 - ghost_ratio)) // 2 * 2


def _all_but_ghosts(channels: int, ghost_ratio: float) -> int:
    """Count the channels that the first version works on."""
    return channels - int(channels * ghost_ratio)


def _shift_wise(channels: int, big: int, cfg: ShiftWiseConfig, count: Any, dilation: int) -> nn.Module:
    worked = count(channels, cfg.ghost_ratio)
    if worked < 1:
        raise ArgumentError(f"ghost_ratio {cfg.ghost_ratio} leaves none of {channels} channels to work on: lower it")
    source = dilate(ShiftTiles(worked, big, cfg.small_kernel, cfg.paths, cfg.groups), dilation)
    layer = LargeKernel(source, [nn.BatchNorm2d(worked) for _ in range(source.num_branches)], identity=True)
    return PartialChannels(layer, seeded_selection(channels, worked), channels)


def _conv_stem(dim: int, asked: Asked) -> nn.Sequential:
    norm = asked.channel_norm()
    return nn.Sequential(
        nn.Conv2d(asked.in_chans, dim // 2, 3, stride=2, padding=1),
        norm(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        norm(dim),
    )


def _conv_downsample(dim_in: int, dim_out: int, step: Step, asked: Asked) -> nn.Sequential:
    reach = 1 if step.stride > 1 else step.dilation_before
    conv = nn.Conv2d(dim_in, dim_out, 3, stride=step.stride, padding=reach, dilation=reach)
    return nn.Sequential(conv, asked.channel_norm()(dim_out))


_TINY = ShiftWiseConfig()
_SMALL_DEPTHS = (3, 3, 27, 3)
_NANO = ShiftWiseConfig((31, 15, 7, 5), depths=(1, 1, 2, 1), dims=(16, 32, 64, 128))
_SECOND = {
    "tiny": _TINY,
    "small": replace(_TINY, depths=_SMALL_DEPTHS, dims=(96, 192, 384, 768)),
    "base": replace(_TINY, depths=_SMALL_DEPTHS, dims=(128, 256, 512, 1024)),
    "nano": _NANO,
}
_FIRST_TINY = ShiftWiseConfig(small_kernel=5, depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
_FIRST = {
    "tiny": _FIRST_TINY,
    "small": replace(_FIRST_TINY, depths=_SMALL_DEPTHS),
    "base": replace(_FIRST_TINY, depths=_SMALL_DEPTHS, dims=(128, 256, 512, 1024)),
    "nano": _NANO,
}
_KINDS: dict[str, tuple[Any, dict[str, ShiftWiseConfig]]] = {
    "shiftwise": (ShiftWise, _SECOND),
    "shiftwise_v1": (ShiftWiseV1, _FIRST),
}


default_cfgs = generate_default_cfgs(
    {
        f"{kind}_{size}.untrained": default_cfg(64 if size == "nano" else 224)
        for kind, (_, configs) in _KINDS.items()
        for size in configs
    }
)
for _kind, (_network, _configs) in _KINDS.items():
    for _size, _cfg in _configs.items():
        _kernels = ", ".join(map(str, _cfg.kernel_sizes))
        register(_network, f"{_kind}_{_size}", _cfg, f"{_kind}_{_size}: kernels {_kernels} out of moved tiles.")
