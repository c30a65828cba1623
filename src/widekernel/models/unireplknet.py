"""UniRepLKNet: one large kernel beside parallel small dilated kernels, squeeze-excite and response norm.

Ding et al., UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image
Recognition, CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from widekernel.errors import ArgumentError
from widekernel.layers import LargeKernel, Rectangles
from widekernel.layers.sources import dilate
from widekernel.models.base import Parts, Stage, StagedConvNet
from widekernel.models.blocks import ResponseNormBlock, conv_downsample, conv_stem, init_convnext
from widekernel.models.builder import build_model, default_cfg
from widekernel.models.options import ModelOptions
from widekernel.models.published import with_published
from widekernel.models.validation import require_channels, require_one_per_stage

DILATED_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""(side, dilation) of the branches beside the K x K kernel, by K. None of them reaches further than the K x K kernel."""

SMALL_KERNELS = (3, 5)
"""Sizes of kernels without other branches and without a norm of their own."""


@dataclass(frozen=True)
class UniRepLKNetConfig:
    """Architecture of a UniRepLKNet.

    Attributes:
        kernel_sizes: for each stage the kernel sizes of its blocks, repeated in this order if the stage has more blocks:
            7, 9, 11, 13, 15 or 17 for a large kernel with dilated branches, 3 or 5 for one plain kernel, 0 for no spatial
            layer and no norm. A number stands for all blocks of its stage.
        depths: number of blocks per stage.
        dims: width of each stage.
        layer_scale: initial value of the layer scale, 0 for none.
        head_init_scale: factor on the initial weights of the classifier.
    """

    kernel_sizes: tuple[int | tuple[int, ...], ...] = (3, 13, (13, 3), 13)
    depths: tuple[int, ...] = (3, 3, 18, 3)
    dims: tuple[int, ...] = (80, 160, 320, 640)
    layer_scale: float = 1e-6
    head_init_scale: float = 1.0

    def __post_init__(self) -> None:
        require_one_per_stage(kernel_sizes=self.kernel_sizes, depths=self.depths, dims=self.dims)
        require_channels(dims=self.dims)
        if min(self.dims) < 4:
            raise ArgumentError(f"dims are {self.dims}: every stage needs at least 4 channels, a quarter of which excite")
        known = (0, *SMALL_KERNELS, *DILATED_BRANCHES)
        for stage in self.kernel_sizes:
            sizes = stage if isinstance(stage, Sequence) else (stage,)
            for size in sizes:
                if isinstance(size, bool) or size not in known:
                    raise ArgumentError(f"kernel size {size!r} is unknown: it must be one of {', '.join(map(str, known))}")
            if not sizes:
                raise ArgumentError(
                    f"kernel_sizes are {self.kernel_sizes}: give every stage a size, or a tuple of sizes for its blocks"
                )

    def block_kernels(self) -> list[list[int]]:
        """Return the kernel size of every block, listed by stage."""
        patterns = (stage if isinstance(stage, tuple) else (stage,) for stage in self.kernel_sizes)
        return [[pattern[j % len(pattern)] for j in range(depth)] for pattern, depth in zip(patterns, self.depths)]


class UniRepLKNet(StagedConvNet):
    """UniRepLKNet: convolutional stem, blocks with large or small kernels, squeeze-excite, response norm.

    It takes the arguments of `StagedConvNet`.
    """

    def parts(self, cfg: UniRepLKNetConfig, options: ModelOptions) -> Parts:
        """Create the stem and the stages."""
        stages, specs = [], options.stage_specs(len(cfg.dims))
        for i, (width, spec, sizes) in enumerate(zip(cfg.dims, specs, cfg.block_kernels())):
            blocks = [
                ResponseNormBlock(
                    _spatial_layer(width, size, spec.dilation), width, rate, cfg.layer_scale, options, norm=size > 0
                )
                for size, rate in zip(sizes, options.drop_path_rates[i])
            ]
            downsample = conv_downsample(cfg.dims[i - 1], width, spec, options) if i else nn.Identity()
            stages.append((Stage(downsample, blocks), width))
        return Parts(conv_stem(cfg.dims[0], options), stages, [spec.reduction for spec in specs])

    def init_weights(self) -> None:
        """Initialize as ConvNeXt."""
        init_convnext(self, self.cfg.head_init_scale)


def dilated_block(channels: int, kernel_size: int) -> LargeKernel:
    """Create a large kernel with the parallel dilated kernels of UniRepLKNet, each with a batch norm.

    Args:
        channels: C.
        kernel_size: K, one of `DILATED_BRANCHES`.
    """
    branches = DILATED_BRANCHES[kernel_size]
    sizes = [(side, side) for side in (kernel_size, *(side for side, _ in branches))]
    source = Rectangles(channels, sizes, [1, *(dilation for _, dilation in branches)])
    return LargeKernel(source, [nn.BatchNorm2d(channels) for _ in sizes])


def _spatial_layer(channels: int, kernel_size: int, dilation: int) -> nn.Module:
    if kernel_size == 0:
        return nn.Identity()
    if kernel_size in SMALL_KERNELS:
        return LargeKernel(dilate(Rectangles(channels, [(kernel_size, kernel_size)]), dilation))
    layer = dilated_block(channels, kernel_size)
    dilate(layer.source, dilation)
    return layer


_ALL_LARGE = (3, 13, 13, 13)
_ONE_IN_THREE = (3, 13, (13, 3, 3), 13)
_SHALLOW = (2, 2, 6, 2)
_DEEP = (3, 3, 27, 3)
_A = UniRepLKNetConfig(_ALL_LARGE, _SHALLOW, (40, 80, 160, 320))
_F = UniRepLKNetConfig(_ALL_LARGE, _SHALLOW, (48, 96, 192, 384))
_P = UniRepLKNetConfig(_ALL_LARGE, _SHALLOW, (64, 128, 256, 512))
_N = UniRepLKNetConfig(_ALL_LARGE, (2, 2, 8, 2))
_NANO = UniRepLKNetConfig((3, 13, (13, 3), 7), (1, 1, 2, 1), (16, 32, 64, 128))

default_cfgs = generate_default_cfgs(
    with_published(
        {
            "unireplknet_a.untrained": default_cfg(),
            "unireplknet_f.untrained": default_cfg(),
            "unireplknet_p.untrained": default_cfg(),
            "unireplknet_n.untrained": default_cfg(),
            "unireplknet_t.untrained": default_cfg(),
            "unireplknet_s.untrained": default_cfg(),
            "unireplknet_b.untrained": default_cfg(384, crop_pct=1.0, crop_mode="squash"),
            "unireplknet_l.untrained": default_cfg(384, crop_pct=1.0, crop_mode="squash"),
            "unireplknet_xl.untrained": default_cfg(384, crop_pct=1.0, crop_mode="squash"),
            "unireplknet_nano.untrained": default_cfg(64),
        }
    )
)


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-A (Ding et al., CVPR 2024): 13x13 kernels with dilated branches, 3x3 in the first stage.

    Depths 2, 2, 6, 2; widths 40 to 320.
    """
    return _build("unireplknet_a", _A, pretrained, kwargs)


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-F (Ding et al., CVPR 2024): 13x13 kernels with dilated branches, 3x3 in the first stage.

    Depths 2, 2, 6, 2; widths 48 to 384.
    """
    return _build("unireplknet_f", _F, pretrained, kwargs)


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-P (Ding et al., CVPR 2024): 13x13 kernels with dilated branches, 3x3 in the first stage.

    Depths 2, 2, 6, 2; widths 64 to 512.
    """
    return _build("unireplknet_p", _P, pretrained, kwargs)


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-N (Ding et al., CVPR 2024): 13x13 kernels with dilated branches, 3x3 in the first stage.

    Depths 2, 2, 8, 2; widths 80 to 640.
    """
    return _build("unireplknet_n", _N, pretrained, kwargs)


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-T (Ding et al., CVPR 2024): 13x13 kernels with dilated branches; 3x3 in every other block of stage 2.

    Depths 3, 3, 18, 3; widths 80 to 640; 3x3 throughout the first stage.
    """
    return _build("unireplknet_t", UniRepLKNetConfig(), pretrained, kwargs)


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-S (Ding et al., CVPR 2024): 13x13 kernels with dilated branches; 3x3 in two of three blocks of stage 2.

    Depths 3, 3, 27, 3; widths 96 to 768; 3x3 throughout the first stage.
    """
    return _build("unireplknet_s", UniRepLKNetConfig(_ONE_IN_THREE, _DEEP, (96, 192, 384, 768)), pretrained, kwargs)


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-B (Ding et al., CVPR 2024): 13x13 kernels with dilated branches; 3x3 in two of three blocks of stage 2.

    Depths 3, 3, 27, 3; widths 128 to 1024; 3x3 throughout the first stage.
    """
    return _build("unireplknet_b", UniRepLKNetConfig(_ONE_IN_THREE, _DEEP, (128, 256, 512, 1024)), pretrained, kwargs)


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-L (Ding et al., CVPR 2024): 13x13 kernels with dilated branches; 3x3 in two of three blocks of stage 2.

    Depths 3, 3, 27, 3; widths 192 to 1536; 3x3 throughout the first stage.
    """
    return _build("unireplknet_l", UniRepLKNetConfig(_ONE_IN_THREE, _DEEP, (192, 384, 768, 1536)), pretrained, kwargs)


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-XL (Ding et al., CVPR 2024): 13x13 kernels with dilated branches; 3x3 in two of three blocks of stage 2.

    Depths 3, 3, 27, 3; widths 256 to 2048; 3x3 throughout the first stage.
    """
    return _build("unireplknet_xl", UniRepLKNetConfig(_ONE_IN_THREE, _DEEP, (256, 512, 1024, 2048)), pretrained, kwargs)


@register_model
def unireplknet_nano(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """Small UniRepLKNet for images of 64 pixels, for tests and demos.

    Kernels 3, 13, 13 and 3, 7; depths 1, 1, 2, 1; widths 16 to 128.
    """
    return _build("unireplknet_nano", _NANO, pretrained, kwargs)


def _build(variant: str, config: UniRepLKNetConfig, pretrained: bool, kwargs: dict[str, Any]) -> UniRepLKNet:
    return build_model(UniRepLKNet, variant, config, pretrained, kwargs)  # type: ignore[no-any-return]
