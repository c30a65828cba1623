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
from widekernel.models.base import Parts, Stage, StagedConvNet
from widekernel.models.blocks import MixerBlock, init_convnext
from widekernel.models.builder import build_model, default_cfg
from widekernel.models.options import ModelOptions
from widekernel.models.published import with_published
from widekernel.settings import require_whole


@dataclass(frozen=True)
class IsotropicConfig:
    """Architecture of an isotropic ConvNeXt.

    Attributes:
        depth: number of blocks.
        dim: width of all blocks.
        kernel_size: side of the depthwise kernels, odd.
        patch_size: side of the stem's patches in pixels.
        layer_scale: initial value of the layer scale, 0 for none.
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
            require_whole(name, getattr(self, name), 1)


class ConvNeXtIsotropic(StagedConvNet):
    """Isotropic ConvNeXt; for feature extraction every block is a stage.

    It takes the arguments of `StagedConvNet`.
    """

    def parts(self, cfg: IsotropicConfig, options: ModelOptions) -> Parts:
        """Create the stem, and one stage per block."""
        if options.output_stride not in (None, cfg.patch_size):
            raise ArgumentError(
                f"output_stride={options.output_stride} is not available for isotropic networks, which have one resolution "
                f"throughout, of stride {cfg.patch_size}: leave it out, and choose the stride with patch_size"
            )
        stages = []
        for rate in options.drop_path_rates[0]:
            mixer = DepthwiseConv2d(cfg.dim, cfg.dim, cfg.kernel_size, padding=cfg.kernel_size // 2, groups=cfg.dim)
            stages.append((Stage(nn.Identity(), [MixerBlock(mixer, cfg.dim, rate, cfg.layer_scale, options)]), cfg.dim))
        stem = nn.Conv2d(options.in_chans, cfg.dim, cfg.patch_size, stride=cfg.patch_size)
        return Parts(stem, stages, [cfg.patch_size] * len(stages))

    def blocks_by_stage(self, cfg: IsotropicConfig) -> tuple[int]:
        """Return the number of blocks, all of which have the same resolution."""
        return (cfg.depth,)

    def init_weights(self) -> None:
        """Initialize as ConvNeXt."""
        init_convnext(self, self.cfg.head_init_scale)

    @staticmethod
    def default_out_indices(cfg: IsotropicConfig) -> tuple[int, ...]:
        """Return the indices of the blocks at the end of each quarter of the network."""
        return tuple(sorted({max(1, cfg.depth * quarter // 4) - 1 for quarter in range(1, 5)}))


default_cfgs = generate_default_cfgs(
    with_published(
        {
            "convnext_isotropic_small.untrained": default_cfg(224, 16, first_conv="stem"),
            "convnext_isotropic_base.untrained": default_cfg(224, 16, first_conv="stem"),
            "convnext_isotropic_large.untrained": default_cfg(224, 16, first_conv="stem"),
            "convnext_isotropic_nano.untrained": default_cfg(64, 8, first_conv="stem"),
        }
    )
)


@register_model
def convnext_isotropic_small(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIsotropic:
    """Isotropic ConvNeXt-S (Liu et al., CVPR 2022): 7x7 kernels, 18 blocks of width 384.

    22.3 M parameters, 4.3 GMACs at 224.
    """
    return _build("convnext_isotropic_small", IsotropicConfig(), pretrained, kwargs)


@register_model
def convnext_isotropic_base(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIsotropic:
    """Isotropic ConvNeXt-B (Liu et al., CVPR 2022): 7x7 kernels, 18 blocks of width 768.

    87.1 M parameters, 16.9 GMACs at 224.
    """
    return _build("convnext_isotropic_base", IsotropicConfig(dim=768), pretrained, kwargs)


@register_model
def convnext_isotropic_large(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIsotropic:
    """Isotropic ConvNeXt-L (Liu et al., CVPR 2022): 7x7 kernels, 36 blocks of width 1024.

    305.9 M parameters, 59.7 GMACs at 224.
    """
    return _build("convnext_isotropic_large", IsotropicConfig(depth=36, dim=1024), pretrained, kwargs)


@register_model
def convnext_isotropic_nano(pretrained: bool = False, **kwargs: Any) -> ConvNeXtIsotropic:
    """Small isotropic ConvNeXt for images of 64 pixels, for tests and demos: 7x7 kernels, 4 blocks of width 64."""
    return _build("convnext_isotropic_nano", IsotropicConfig(depth=4, dim=64, patch_size=8), pretrained, kwargs)


def _build(variant: str, config: IsotropicConfig, pretrained: bool, kwargs: dict[str, Any]) -> ConvNeXtIsotropic:
    return build_model(ConvNeXtIsotropic, variant, config, pretrained, kwargs)  # type: ignore[no-any-return]
