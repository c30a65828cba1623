"""SLaK: 51x51 kernels as two crossed strips and a small square, and its variants out of small tiles.

Liu et al., More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity, ICLR 2023. The variants SLaK_reg,
SLaK_pw and SLaK_pww come from the first version of Shift-wise convolution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from timm.models import generate_default_cfgs
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
from widekernel.models.asked import Asked, Step
from widekernel.models.base import (
    Parts,
    StagedConvNet,
    check_stages,
    check_widths,
)
from widekernel.models.blocks import MixerBlock, convnext_parts, init_convnext
from widekernel.models.building import default_cfg, register
from widekernel.models.layouts import slak as layouts
from widekernel.models.layouts.layout import Layout
from widekernel.settings import require_literals

Strips = Literal["free", "split", "shared", "shuffled"]
Padding = Literal["full", "k-1", "same"]


@dataclass(frozen=True)
class SLaKConfig:
    """Architecture of a SLaK.

    Attributes:
        kernel_sizes: K of each stage, odd.
        small_kernel: N, the short side of the strips and the side of the small square, which is left out where it is not
            smaller than K. By default 5 with strips and none without; 0 for no small square without strips.
        width_factor: factor on `dims`, rounded down.
        decomposed: strips K x N and N x K in the place of the K x K square.
        bn: a batch norm after every branch.
        depths: blocks a stage.
        dims: width of each stage before `width_factor`.
        strips: what the strips are made of: free kernels (SLaK), tiles of their own (SLaK_reg), tiles shared by both
            directions with gates (SLaK_pww), or shared and shuffled in the second direction (SLaK_pw).
        padding: of the tile convolutions of `shuffled` strips. "full" and "k-1" keep every tile that touches the image,
            which is the same function; "same" drops the tiles whose middle lies outside.
        branches: shuffled arrangements that are added up, for `shuffled` strips.
        layer_scale: initial value, 0 for none.
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
        check_stages(kernel_sizes=self.kernel_sizes, depths=self.depths, dims=self.dims)
        require_literals(self)
        if self.strips != "shuffled" and (self.padding != "full" or self.branches != 1):
            raise ArgumentError("padding and branches are options of the slak_pw_* networks only")
        if not self.decomposed and self.strips != "free":
            raise ArgumentError(f"decomposed=False leaves no strips to build as {self.strips!r}: use a plain slak_* network")
        if self.decomposed and self.small_kernel == 0:
            raise ArgumentError("small_kernel=0 leaves the strips without a short side: give it, or set decomposed=False")
        check_widths(widths=self.widths)
        check_odd("kernel size", *self.kernel_sizes)
        if self.decomposed and self.short is not None and self.short > min(self.kernel_sizes):
            raise ArgumentError(
                f"small_kernel {self.short} is larger than a kernel size of {self.kernel_sizes}, so that there is no strip: "
                "lower it, or set decomposed=False"
            )
        # Without strips a small kernel that is no smaller than the large one is left out, whatever it is (officially 100).
        if self.short is not None and any(self.short < size for size in self.kernel_sizes):
            check_odd("small_kernel", self.short)

    @property
    def short(self) -> int | None:
        """N, with the default filled in."""
        if self.small_kernel is None:
            return 5 if self.decomposed else None
        return self.small_kernel or None

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(int(dim * self.width_factor) for dim in self.dims)


class SLaK(StagedConvNet):
    """SLaK.

    Its arguments are those of `StagedConvNet`.
    """

    def parts(self, cfg: SLaKConfig, asked: Asked) -> Parts:
        """Make ConvNeXt's frame with SLaK's layers."""

        def block(i: int, width: int, rate: float, step: Step) -> MixerBlock:
            mixer = _large_kernel(width, cfg.kernel_sizes[i], cfg, step.dilation)
            return MixerBlock(mixer, width, rate, cfg.layer_scale, asked)

        return convnext_parts(cfg.widths, asked, block)

    def init_weights(self) -> None:
        """Initialise as ConvNeXt does."""
        init_convnext(self, self.cfg.head_init_scale)

    def layouts(self) -> tuple[Layout, ...]:
        """Give the layout of the official network of this kind, and that of SLaK where it can be split into tiles."""
        return layouts.layouts(self.cfg.strips, self.cfg.decomposed, self.cfg.short or 0, len(self.cfg.dims))


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


_TINY = SLaKConfig()
_SIZES = {
    "tiny": _TINY,
    "small": replace(_TINY, depths=(3, 3, 27, 3)),
    "base": replace(_TINY, depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "large": replace(_TINY, depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    "nano": SLaKConfig((31, 15, 7, 5), small_kernel=3, width_factor=1.0, depths=(1, 1, 2, 1), dims=(16, 32, 64, 128)),
}
_KINDS: dict[str, tuple[Strips, str]] = {
    "slak": ("free", "crossed strips of free kernels"),
    "slak_reg": ("split", "strips out of tiles, each direction with its own"),
    "slak_pw": ("shuffled", "strips out of tiles that both directions share, the second one shuffled"),
    "slak_pww": ("shared", "strips out of tiles that both directions share, gated by weights"),
}
# The kernels of the published commands: 43 and 45 in the third stage where tiles are shared.
_THIRD_STAGE = {"slak_pw": 43, "slak_pww": 45}


def _config(kind: str, size: str) -> SLaKConfig:
    cfg = replace(_SIZES[size], strips=_KINDS[kind][0])
    if kind in _THIRD_STAGE and size != "nano":
        first, second, _, fourth = cfg.kernel_sizes
        cfg = replace(cfg, kernel_sizes=(first, second, _THIRD_STAGE[kind], fourth))
    return cfg


default_cfgs = generate_default_cfgs(
    {f"{kind}_{size}.untrained": default_cfg(64 if size == "nano" else 224) for kind in _KINDS for size in _SIZES}
)
for _kind, (_, _what) in _KINDS.items():
    for _size in _SIZES:
        _cfg = _config(_kind, _size)
        _kernels = ", ".join(map(str, _cfg.kernel_sizes))
        register(SLaK, f"{_kind}_{_size}", _cfg, f"{_kind}_{_size}: {_what}, kernels {_kernels}.")
