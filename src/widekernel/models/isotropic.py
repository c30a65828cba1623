"""Isotropic ConvNeXt: one resolution and one width throughout, like a vision transformer.

Liu et al., A ConvNet for the 2020s, CVPR 2022, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from widekernel.errors import ArgumentError
from widekernel.layers import DepthwiseConv2d
from widekernel.layers.sources import check_odd
from widekernel.models.asked import Asked
from widekernel.models.base import Parts, Stage, StagedConvNet
from widekernel.models.blocks import MixerBlock, init_convnext
from widekernel.models.building import build, default_cfg
from widekernel.models.layouts import convnext as layouts
from widekernel.models.layouts.layout import Layout


@dataclass(frozen=True)
class IsotropicConfig:
    """Architecture of an isotropic ConvNeXt.

    Attributes:
        depth: number of blocks.
        dim: width.
        kernel_size: of the depthwise layers, odd.
        patch_size: pixels that the stem turns into one.
        layer_scale: initial value, 0 for none.
        head_init_scale: factor on the initial weights of the classifier.
    """

    depth: int = 18
    dim: int = 384
    kernel_size: int = 7
    patch_size: int = 16
    layer_scale: float = 0.0
    head_init_scale: float = 1.0

    def __post_init__(self) -> None:
        check_odd("kernel size", self.kernel_size)
        for name in ("depth", "dim", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} {value!r} is not a positive whole number: give 1 or more")


class ConvNeXtIsotropic(StagedConvNet):
    """Isotropic ConvNeXt; every block counts as a stage when feature maps are asked for.

    Its arguments are those of `StagedConvNet`.
    """

    def parts(self, cfg: IsotropicConfig, asked: Asked) -> Parts:
        """Make the stem, and a stage of every block."""
        if asked.output_stride not in (None, cfg.patch_size):
            raise ArgumentError(
                f"output_stride={asked.output_stride} is not for isotropic networks, which have one resolution throughout, "
                f"of stride {cfg.patch_size}: leave it out, and choose the stride with patch_size"
            )
        stages = []
        for rate in asked.rates[0]:
            mixer = DepthwiseConv2d(cfg.dim, cfg.dim, cfg.kernel_size, padding=cfg.kernel_size // 2, groups=cfg.dim)
            stages.append((Stage(nn.Identity(), [MixerBlock(mixer, cfg.dim, rate, cfg.layer_scale, asked)]), cfg.dim))
        stem = nn.Conv2d(asked.in_chans, cfg.dim, cfg.patch_size, stride=cfg.patch_size)
        return Parts(stem, stages, [cfg.patch_size] * len(stages))

    def blocks_by_stage(self, cfg: IsotropicConfig) -> tuple[int]:
        """Count the blocks of the one resolution."""
        return (cfg.depth,)

    def init_weights(self) -> None:
        """Initialise as ConvNeXt does."""
        init_convnext(self, self.cfg.head_init_scale)

    @staticmethod
    def default_out_indices(cfg: IsotropicConfig) -> tuple[int, ...]:
        """Hand out four maps, after each quarter of the blocks."""
        return tuple(sorted({max(1, cfg.depth * quarter // 4) - 1 for quarter in range(1, 5)}))

    def layouts(self) -> tuple[Layout, ...]:
        """Give the official layout."""
        return (layouts.ISOTROPIC,)


default_cfgs = generate_default_cfgs(
    {
        f"convnext_isotropic_{size}.untrained": default_cfg(pixels, patch, first_conv="stem")
        for size, pixels, patch in (("small", 224, 16), ("base", 224, 16), ("large", 224, 16), ("nano", 64, 8))
    }
)


@register_model
def convnext_isotropic_small(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIsotropic:
    """Isotropic ConvNeXt-S: 22.3 M parameters, 4.3 GMACs."""
    return build(ConvNeXtIsotropic, "convnext_isotropic_small", IsotropicConfig(), pretrained, kwargs)


@register_model
def convnext_isotropic_base(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIsotropic:
    """Isotropic ConvNeXt-B: 87.1 M parameters, 16.9 GMACs."""
    return build(ConvNeXtIsotropic, "convnext_isotropic_base", IsotropicConfig(dim=768), pretrained, kwargs)


@register_model
def convnext_isotropic_large(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIsotropic:
    """Isotropic ConvNeXt-L: 305.9 M parameters, 59.7 GMACs."""
    config = IsotropicConfig(depth=36, dim=1024)
    return build(ConvNeXtIsotropic, "convnext_isotropic_large", config, pretrained, kwargs)


@register_model
def convnext_isotropic_nano(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIsotropic:
    """A small isotropic ConvNeXt for images of 64 pixels, for quick work."""
    config = IsotropicConfig(depth=4, dim=64, patch_size=8)
    return build(ConvNeXtIsotropic, "convnext_isotropic_nano", config, pretrained, kwargs)
