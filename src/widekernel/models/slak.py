"""SLaK: 51x51 kernels as two crossed strips and a small square, and its variants with strips made of small tiles.

Liu et al., More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity, ICLR 2023. The variants SLaK_reg,
SLaK_pw and SLaK_pww come from the first version of Shift-wise convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from timm.models import generate_default_cfgs, register_model
from torch import nn

from widekernel.errors import ArgumentError
from widekernel.layers import (
    KernelSource,
    LargeKernel,
    Rectangles,
    SharedStrips,
    ShuffledStrips,
    SourceGroup,
    SplitStrips,
    TruncatedTiles,
)
from widekernel.layers.sources import check_odd, dilate
from widekernel.models.base import Parts, StagedConvNet
from widekernel.models.blocks import MixerBlock, convnext_parts, init_convnext
from widekernel.models.builder import build_model, default_cfg
from widekernel.models.options import ModelOptions, StageSpec
from widekernel.models.published import with_published
from widekernel.models.validation import require_channels, require_one_per_stage
from widekernel.settings import require_literals

Strips = Literal["free", "split", "shared", "shuffled"]
Padding = Literal["full", "k-1", "same"]


@dataclass(frozen=True)
class SLaKConfig:
    """Architecture of a SLaK or one of its variants.

    Attributes:
        kernel_sizes: long side K of the kernels of each stage, odd.
        small_kernel: short side N of the strips and side of the small square; the square is left out unless N is smaller
            than K. By default 5 with strips and none without; 0 for no small square, allowed only without strips.
        width_factor: factor on `dims`; the widths are rounded down.
        decomposed: whether strips K x N and N x K replace the K x K square.
        bn: whether a batch norm follows every branch.
        depths: number of blocks per stage.
        dims: width of each stage before `width_factor`.
        strips: parametrization of the strips: "free" kernels (SLaK), "split" into separate tiles for each direction
            (SLaK_reg), tiles "shared" by both directions with gates (SLaK_pww), or shared tiles that are "shuffled" in the
            second direction (SLaK_pw).
        padding: padding of the tile convolutions of "shuffled" strips. "full" and "k-1" keep every tile that touches the
            image and give the same function; "same" drops the tiles whose center lies outside the image.
        branches: number of shuffled arrangements that are summed, for "shuffled" strips.
        layer_scale: initial value of the layer scale, 0 for none.
        head_init_scale: factor on the initial weights of the classifier.
    """

    kernel_sizes: tuple[int, ...] = (51, 49, 47, 13)
    small_kernel: int | None = None
    width_factor: float = 1.3
    decomposed: bool = True
    bn: bool = True
    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    strips: Strips = "free"
    padding: Padding = "full"
    branches: int = 1
    layer_scale: float = 1e-6
    head_init_scale: float = 1.0

    def __post_init__(self) -> None:
        require_one_per_stage(kernel_sizes=self.kernel_sizes, depths=self.depths, dims=self.dims)
        require_literals(self)
        if self.strips != "shuffled" and (self.padding != "full" or self.branches != 1):
            raise ArgumentError("padding and branches are options of the slak_pw_* networks only")
        if not self.decomposed and self.strips != "free":
            raise ArgumentError(f"decomposed=False leaves no strips to make {self.strips!r}: use a plain slak_* network")
        if self.decomposed and self.small_kernel == 0:
            raise ArgumentError("small_kernel=0 leaves the strips without a short side: give it, or set decomposed=False")
        require_channels(widths=self.widths)
        check_odd("kernel size", *self.kernel_sizes)
        if self.decomposed and self.short is not None and self.short > min(self.kernel_sizes):
            raise ArgumentError(
                f"small_kernel {self.short} is larger than a kernel size of {self.kernel_sizes}, so that there is no strip: "
                "lower it, or set decomposed=False"
            )
        # Without strips, a small kernel that is not smaller than the large one is left out; the official commands give 100.
        if self.short is not None and any(self.short < size for size in self.kernel_sizes):
            check_odd("small_kernel", self.short)

    @property
    def short(self) -> int | None:
        """Short side N, with the default filled in; None for none."""
        if self.small_kernel is None:
            return 5 if self.decomposed else None
        return self.small_kernel or None

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(int(dim * self.width_factor) for dim in self.dims)


class SLaK(StagedConvNet):
    """SLaK and its tile variants.

    It takes the arguments of `StagedConvNet`.
    """

    def parts(self, cfg: SLaKConfig, options: ModelOptions) -> Parts:
        """Create a ConvNeXt with SLaK's spatial layers."""

        def make_block(i: int, width: int, rate: float, spec: StageSpec) -> MixerBlock:
            mixer = _large_kernel(width, cfg.kernel_sizes[i], cfg, spec.dilation)
            return MixerBlock(mixer, width, rate, cfg.layer_scale, options)

        return convnext_parts(cfg.widths, options, make_block)

    def init_weights(self) -> None:
        """Initialize as ConvNeXt."""
        init_convnext(self, self.cfg.head_init_scale)


def _large_kernel(channels: int, big: int, cfg: SLaKConfig, dilation: int) -> LargeKernel:
    source = dilate(_source(channels, big, cfg), dilation)
    return LargeKernel(source, [nn.BatchNorm2d(channels) for _ in range(source.num_branches)] if cfg.bn else None)


def _source(channels: int, big: int, cfg: SLaKConfig) -> KernelSource:
    small = cfg.short
    square = [(small, small)] if small and small < big else []
    if not cfg.decomposed:
        return Rectangles(channels, [(big, big), *square])
    assert small is not None
    if cfg.strips == "free":
        return Rectangles(channels, [(big, small), (small, big), *square])
    strips: KernelSource
    if cfg.strips == "split":
        strips = SplitStrips(channels, big, small)
    elif cfg.strips == "shared":
        strips = SharedStrips(channels, big, small)
    else:
        shuffled = ShuffledStrips(channels, big, small, cfg.branches)
        strips = TruncatedTiles(shuffled) if cfg.padding == "same" else shuffled
    return SourceGroup([strips, Rectangles(channels, square)])


# The published commands use kernels of size 43 and 45 in the third stage if the tiles are shared.
_PW_KERNELS = (51, 49, 43, 13)
_PWW_KERNELS = (51, 49, 45, 13)
_SMALL: dict[str, Any] = {"depths": (3, 3, 27, 3)}
_BASE: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
_LARGE: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)}
_NANO: dict[str, Any] = {
    "kernel_sizes": (31, 15, 7, 5),
    "small_kernel": 3,
    "width_factor": 1.0,
    "depths": (1, 1, 2, 1),
    "dims": (16, 32, 64, 128),
}

default_cfgs = generate_default_cfgs(
    with_published(
        {
            "slak_tiny.untrained": default_cfg(),
            "slak_small.untrained": default_cfg(),
            "slak_base.untrained": default_cfg(),
            "slak_large.untrained": default_cfg(),
            "slak_nano.untrained": default_cfg(64),
            "slak_reg_tiny.untrained": default_cfg(),
            "slak_reg_small.untrained": default_cfg(),
            "slak_reg_base.untrained": default_cfg(),
            "slak_reg_large.untrained": default_cfg(),
            "slak_reg_nano.untrained": default_cfg(64),
            "slak_pw_tiny.untrained": default_cfg(),
            "slak_pw_small.untrained": default_cfg(),
            "slak_pw_base.untrained": default_cfg(),
            "slak_pw_large.untrained": default_cfg(),
            "slak_pw_nano.untrained": default_cfg(64),
            "slak_pww_tiny.untrained": default_cfg(),
            "slak_pww_small.untrained": default_cfg(),
            "slak_pww_base.untrained": default_cfg(),
            "slak_pww_large.untrained": default_cfg(),
            "slak_pww_nano.untrained": default_cfg(64),
        }
    )
)


@register_model
def slak_tiny(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-T (Liu et al., ICLR 2023): crossed strips of free kernels.

    Kernels 51, 49, 47, 13 with a short side of 5; depths 3, 3, 9, 3; widths 124 to 998.
    """
    return _build("slak_tiny", SLaKConfig(), pretrained, kwargs)


@register_model
def slak_small(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-S (Liu et al., ICLR 2023): crossed strips of free kernels.

    Kernels 51, 49, 47, 13 with a short side of 5; depths 3, 3, 27, 3; widths 124 to 998.
    """
    return _build("slak_small", SLaKConfig(**_SMALL), pretrained, kwargs)


@register_model
def slak_base(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-B (Liu et al., ICLR 2023): crossed strips of free kernels.

    Kernels 51, 49, 47, 13 with a short side of 5; depths 3, 3, 27, 3; widths 166 to 1331.
    """
    return _build("slak_base", SLaKConfig(**_BASE), pretrained, kwargs)


@register_model
def slak_large(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-L (Liu et al., ICLR 2023): crossed strips of free kernels.

    Kernels 51, 49, 47, 13 with a short side of 5; depths 3, 3, 27, 3; widths 249 to 1996.
    """
    return _build("slak_large", SLaKConfig(**_LARGE), pretrained, kwargs)


@register_model
def slak_nano(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """Small SLaK for images of 64 pixels, for tests and demos: crossed strips of free kernels.

    Kernels 31, 15, 7, 5 with a short side of 3; depths 1, 1, 2, 1; widths 16 to 128.
    """
    return _build("slak_nano", SLaKConfig(**_NANO), pretrained, kwargs)


@register_model
def slak_reg_tiny(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_reg-T (Li et al., CVPR 2025): strips of tiles, each direction with its own.

    Kernels 51, 49, 47, 13 with a short side of 5; depths 3, 3, 9, 3; widths 124 to 998.
    """
    return _build("slak_reg_tiny", SLaKConfig(strips="split"), pretrained, kwargs)


@register_model
def slak_reg_small(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_reg-S (Li et al., CVPR 2025): strips of tiles, each direction with its own.

    Kernels 51, 49, 47, 13 with a short side of 5; depths 3, 3, 27, 3; widths 124 to 998.
    """
    return _build("slak_reg_small", SLaKConfig(strips="split", **_SMALL), pretrained, kwargs)


@register_model
def slak_reg_base(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_reg-B (Li et al., CVPR 2025): strips of tiles, each direction with its own.

    Kernels 51, 49, 47, 13 with a short side of 5; depths 3, 3, 27, 3; widths 166 to 1331.
    """
    return _build("slak_reg_base", SLaKConfig(strips="split", **_BASE), pretrained, kwargs)


@register_model
def slak_reg_large(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_reg-L (Li et al., CVPR 2025): strips of tiles, each direction with its own.

    Kernels 51, 49, 47, 13 with a short side of 5; depths 3, 3, 27, 3; widths 249 to 1996.
    """
    return _build("slak_reg_large", SLaKConfig(strips="split", **_LARGE), pretrained, kwargs)


@register_model
def slak_reg_nano(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """Small SLaK_reg for images of 64 pixels, for tests and demos: strips of tiles, each direction with its own.

    Kernels 31, 15, 7, 5 with a short side of 3; depths 1, 1, 2, 1; widths 16 to 128.
    """
    return _build("slak_reg_nano", SLaKConfig(strips="split", **_NANO), pretrained, kwargs)


@register_model
def slak_pw_tiny(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_pw-T (Li et al., CVPR 2025): strips of shared tiles, shuffled in one direction.

    Kernels 51, 49, 43, 13 with a short side of 5; depths 3, 3, 9, 3; widths 124 to 998.
    """
    return _build("slak_pw_tiny", SLaKConfig(_PW_KERNELS, strips="shuffled"), pretrained, kwargs)


@register_model
def slak_pw_small(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_pw-S (Li et al., CVPR 2025): strips of shared tiles, shuffled in one direction.

    Kernels 51, 49, 43, 13 with a short side of 5; depths 3, 3, 27, 3; widths 124 to 998.
    """
    return _build("slak_pw_small", SLaKConfig(_PW_KERNELS, strips="shuffled", **_SMALL), pretrained, kwargs)


@register_model
def slak_pw_base(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_pw-B (Li et al., CVPR 2025): strips of shared tiles, shuffled in one direction.

    Kernels 51, 49, 43, 13 with a short side of 5; depths 3, 3, 27, 3; widths 166 to 1331.
    """
    return _build("slak_pw_base", SLaKConfig(_PW_KERNELS, strips="shuffled", **_BASE), pretrained, kwargs)


@register_model
def slak_pw_large(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_pw-L (Li et al., CVPR 2025): strips of shared tiles, shuffled in one direction.

    Kernels 51, 49, 43, 13 with a short side of 5; depths 3, 3, 27, 3; widths 249 to 1996.
    """
    return _build("slak_pw_large", SLaKConfig(_PW_KERNELS, strips="shuffled", **_LARGE), pretrained, kwargs)


@register_model
def slak_pw_nano(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """Small SLaK_pw for images of 64 pixels, for tests and demos: strips of shared tiles, shuffled in one direction.

    Kernels 31, 15, 7, 5 with a short side of 3; depths 1, 1, 2, 1; widths 16 to 128.
    """
    return _build("slak_pw_nano", SLaKConfig(strips="shuffled", **_NANO), pretrained, kwargs)


@register_model
def slak_pww_tiny(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_pww-T (Li et al., CVPR 2025): strips of tiles that both directions share, with gates.

    Kernels 51, 49, 45, 13 with a short side of 5; depths 3, 3, 9, 3; widths 124 to 998.
    """
    return _build("slak_pww_tiny", SLaKConfig(_PWW_KERNELS, strips="shared"), pretrained, kwargs)


@register_model
def slak_pww_small(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_pww-S (Li et al., CVPR 2025): strips of tiles that both directions share, with gates.

    Kernels 51, 49, 45, 13 with a short side of 5; depths 3, 3, 27, 3; widths 124 to 998.
    """
    return _build("slak_pww_small", SLaKConfig(_PWW_KERNELS, strips="shared", **_SMALL), pretrained, kwargs)


@register_model
def slak_pww_base(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_pww-B (Li et al., CVPR 2025): strips of tiles that both directions share, with gates.

    Kernels 51, 49, 45, 13 with a short side of 5; depths 3, 3, 27, 3; widths 166 to 1331.
    """
    return _build("slak_pww_base", SLaKConfig(_PWW_KERNELS, strips="shared", **_BASE), pretrained, kwargs)


@register_model
def slak_pww_large(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK_pww-L (Li et al., CVPR 2025): strips of tiles that both directions share, with gates.

    Kernels 51, 49, 45, 13 with a short side of 5; depths 3, 3, 27, 3; widths 249 to 1996.
    """
    return _build("slak_pww_large", SLaKConfig(_PWW_KERNELS, strips="shared", **_LARGE), pretrained, kwargs)


@register_model
def slak_pww_nano(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """Small SLaK_pww for images of 64 pixels, for tests and demos: strips of tiles that both directions share, with gates.

    Kernels 31, 15, 7, 5 with a short side of 3; depths 1, 1, 2, 1; widths 16 to 128.
    """
    return _build("slak_pww_nano", SLaKConfig(strips="shared", **_NANO), pretrained, kwargs)


def _build(variant: str, config: SLaKConfig, pretrained: bool, kwargs: dict[str, Any]) -> SLaK:
    return build_model(SLaK, variant, config, pretrained, kwargs)  # type: ignore[no-any-return]
