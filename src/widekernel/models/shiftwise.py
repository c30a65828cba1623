"""Shift-wise convolution: wide kernels made of small tiles that are shifted differently in each direction.

Li et al., ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect, CVPR 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from widekernel.errors import ArgumentError
from widekernel.layers import LargeKernel, PartialChannels, ShiftTiles
from widekernel.layers.partial import seeded_selection
from widekernel.layers.sources import dilate
from widekernel.models.base import Parts, Stage, StagedConvNet
from widekernel.models.blocks import (
    MixerBlock,
    ResponseNormBlock,
    conv_downsample,
    conv_stem,
    convnext_parts,
    init_convnext,
)
from widekernel.models.builder import build_model, default_cfg
from widekernel.models.options import ModelOptions, StageSpec
from widekernel.models.published import with_published
from widekernel.models.validation import require_channels, require_one_per_stage


@dataclass(frozen=True)
class ShiftWiseConfig:
    """Architecture of a Shift-wise network.

    Attributes:
        kernel_sizes: long side K of the kernels of each stage, odd.
        small_kernel: side N of the tiles.
        ghost_ratio: fraction of the channels that bypass the large kernel.
        paths: number of tile sets that are summed in training.
        groups: number of permutations per direction.
        width_factor: factor on `dims`; the widths are rounded down.
        depths: number of blocks per stage.
        dims: width of each stage before `width_factor`.
        layer_scale: initial value of the layer scale, 0 for none.
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
        require_one_per_stage(kernel_sizes=self.kernel_sizes, depths=self.depths, dims=self.dims)
        require_channels(widths=self.widths)
        if not 0 <= self.ghost_ratio < 1:
            raise ArgumentError(
                f"ghost_ratio {self.ghost_ratio} must lie in [0, 1): some channels must go through the large kernel"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(int(dim * self.width_factor) for dim in self.dims)


class ShiftWiseBlock(ResponseNormBlock):
    """Block of the second version; its folded form keeps the bias of the response norm, as saved networks have it."""

    folds_response_bias = False


class ShiftWise(StagedConvNet):
    """Shift-wise network, second version: convolutional stem, squeeze-excite, response norm.

    It takes the arguments of `StagedConvNet`.
    """

    def parts(self, cfg: ShiftWiseConfig, options: ModelOptions) -> Parts:
        """Create the stem and the stages."""
        stages, specs = [], options.stage_specs(len(cfg.widths))
        for i, (width, spec) in enumerate(zip(cfg.widths, specs)):
            blocks = []
            for rate in options.drop_path_rates[i]:
                worked = int(width * (1 - cfg.ghost_ratio)) // 2 * 2  # an even number, as officially
                mixer = _shift_wise(width, worked, cfg.kernel_sizes[i], cfg, spec.dilation)
                blocks.append(ShiftWiseBlock(mixer, width, rate, cfg.layer_scale, options))
            downsample = conv_downsample(cfg.widths[i - 1], width, spec, options) if i else nn.Identity()
            stages.append((Stage(downsample, blocks), width))
        return Parts(conv_stem(cfg.widths[0], options), stages, [spec.reduction for spec in specs])

    def init_weights(self) -> None:
        """Initialize as ConvNeXt."""
        init_convnext(self, self.cfg.head_init_scale)


class ShiftWiseV1(StagedConvNet):
    """Shift-wise network, first version: ConvNeXt with shift-wise spatial layers.

    It takes the arguments of `StagedConvNet`.
    """

    def parts(self, cfg: ShiftWiseConfig, options: ModelOptions) -> Parts:
        """Create a ConvNeXt with shift-wise spatial layers."""

        def make_block(i: int, width: int, rate: float, spec: StageSpec) -> MixerBlock:
            worked = width - int(width * cfg.ghost_ratio)
            mixer = _shift_wise(width, worked, cfg.kernel_sizes[i], cfg, spec.dilation)
            return MixerBlock(mixer, width, rate, cfg.layer_scale, options)

        return convnext_parts(cfg.widths, options, make_block)

    def init_weights(self) -> None:
        """Initialize as ConvNeXt."""
        init_convnext(self, self.cfg.head_init_scale)


def _shift_wise(channels: int, worked: int, kernel_size: int, cfg: ShiftWiseConfig, dilation: int) -> nn.Module:
    """Create the shift-wise layer for `worked` of `channels` channels; the others bypass it."""
    if worked < 1:
        raise ArgumentError(f"ghost_ratio {cfg.ghost_ratio} leaves none of {channels} channels for the kernel: lower it")
    source = dilate(ShiftTiles(worked, kernel_size, cfg.small_kernel, cfg.paths, cfg.groups), dilation)
    layer = LargeKernel(source, [nn.BatchNorm2d(worked) for _ in range(source.num_branches)], identity=True)
    return PartialChannels(layer, seeded_selection(channels, worked), channels)


_SMALL_DEPTHS = (3, 3, 27, 3)
_SMALL_DIMS = (96, 192, 384, 768)
_BASE_DIMS = (128, 256, 512, 1024)
_NANO = ShiftWiseConfig((31, 15, 7, 5), depths=(1, 1, 2, 1), dims=(16, 32, 64, 128))

default_cfgs = generate_default_cfgs(
    with_published(
        {
            "shiftwise_tiny.untrained": default_cfg(),
            "shiftwise_small.untrained": default_cfg(),
            "shiftwise_base.untrained": default_cfg(),
            "shiftwise_nano.untrained": default_cfg(64),
            "shiftwise_v1_tiny.untrained": default_cfg(),
            "shiftwise_v1_small.untrained": default_cfg(),
            "shiftwise_v1_base.untrained": default_cfg(),
            "shiftwise_v1_nano.untrained": default_cfg(64),
        }
    )
)


@register_model
def shiftwise_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftWise:
    """Shift-wise-T, second version (Li et al., CVPR 2025): kernels 51, 49, 47, 13 made of 3x3 tiles.

    Depths 3, 3, 18, 3; widths 80 to 640.
    """
    config = ShiftWiseConfig()
    return build_model(ShiftWise, "shiftwise_tiny", config, pretrained, kwargs)  # type: ignore[no-any-return]


@register_model
def shiftwise_small(pretrained: bool = False, **kwargs: Any) -> ShiftWise:
    """Shift-wise-S, second version (Li et al., CVPR 2025): kernels 51, 49, 47, 13 made of 3x3 tiles.

    Depths 3, 3, 27, 3; widths 96 to 768.
    """
    return build_model(
        ShiftWise, "shiftwise_small", ShiftWiseConfig(depths=_SMALL_DEPTHS, dims=_SMALL_DIMS), pretrained, kwargs
    )  # type: ignore[no-any-return]


@register_model
def shiftwise_base(pretrained: bool = False, **kwargs: Any) -> ShiftWise:
    """Shift-wise-B, second version (Li et al., CVPR 2025): kernels 51, 49, 47, 13 made of 3x3 tiles.

    Depths 3, 3, 27, 3; widths 128 to 1024.
    """
    return build_model(
        ShiftWise, "shiftwise_base", ShiftWiseConfig(depths=_SMALL_DEPTHS, dims=_BASE_DIMS), pretrained, kwargs
    )  # type: ignore[no-any-return]


@register_model
def shiftwise_nano(pretrained: bool = False, **kwargs: Any) -> ShiftWise:
    """Small Shift-wise network, second version, for images of 64 pixels, for tests and demos.

    Kernels 31, 15, 7, 5 made of 3x3 tiles; depths 1, 1, 2, 1; widths 16 to 128.
    """
    return build_model(ShiftWise, "shiftwise_nano", _NANO, pretrained, kwargs)  # type: ignore[no-any-return]


@register_model
def shiftwise_v1_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftWiseV1:
    """Shift-wise-T, first version (Li et al., CVPR 2025): kernels 51, 49, 47, 13 made of 5x5 tiles.

    Depths 3, 3, 9, 3; widths 96 to 768.
    """
    return build_model(
        ShiftWiseV1,
        "shiftwise_v1_tiny",
        ShiftWiseConfig(small_kernel=5, depths=(3, 3, 9, 3), dims=_SMALL_DIMS),
        pretrained,
        kwargs,
    )  # type: ignore[no-any-return]


@register_model
def shiftwise_v1_small(pretrained: bool = False, **kwargs: Any) -> ShiftWiseV1:
    """Shift-wise-S, first version (Li et al., CVPR 2025): kernels 51, 49, 47, 13 made of 5x5 tiles.

    Depths 3, 3, 27, 3; widths 96 to 768.
    """
    return build_model(
        ShiftWiseV1,
        "shiftwise_v1_small",
        ShiftWiseConfig(small_kernel=5, depths=_SMALL_DEPTHS, dims=_SMALL_DIMS),
        pretrained,
        kwargs,
    )  # type: ignore[no-any-return]


@register_model
def shiftwise_v1_base(pretrained: bool = False, **kwargs: Any) -> ShiftWiseV1:
    """Shift-wise-B, first version (Li et al., CVPR 2025): kernels 51, 49, 47, 13 made of 5x5 tiles.

    Depths 3, 3, 27, 3; widths 128 to 1024.
    """
    return build_model(
        ShiftWiseV1,
        "shiftwise_v1_base",
        ShiftWiseConfig(small_kernel=5, depths=_SMALL_DEPTHS, dims=_BASE_DIMS),
        pretrained,
        kwargs,
    )  # type: ignore[no-any-return]


@register_model
def shiftwise_v1_nano(pretrained: bool = False, **kwargs: Any) -> ShiftWiseV1:
    """Small Shift-wise network, first version, for images of 64 pixels, for tests and demos.

    Kernels 31, 15, 7, 5 made of 3x3 tiles; depths 1, 1, 2, 1; widths 16 to 128.
    """
    return build_model(ShiftWiseV1, "shiftwise_v1_nano", _NANO, pretrained, kwargs)  # type: ignore[no-any-return]
