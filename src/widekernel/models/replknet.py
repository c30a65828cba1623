"""RepLKNet: 31x31 depthwise kernels with a parallel branch of small kernels that folds into them.

Ding et al., Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs, CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from typing_extensions import Self

from widekernel.errors import ArgumentError
from widekernel.layers import ConvNorm, FoldedLargeKernel, LargeKernel, Rectangles
from widekernel.layers.alterations import alteration, alterations, replaced_method, replaced_methods
from widekernel.layers.folding import Fusable
from widekernel.layers.hidden_units import HiddenUnits
from widekernel.layers.large_kernel import is_plain_relu
from widekernel.layers.layer_groups import replknet_layer_group
from widekernel.layers.norms import is_foldable
from widekernel.layers.sources import dilate
from widekernel.models.base import Parts, Stage, StagedConvNet
from widekernel.models.builder import build_model, default_cfg
from widekernel.models.options import ModelOptions, StageSpec
from widekernel.models.published import with_published
from widekernel.models.validation import require_channels, require_one_per_stage


@dataclass(frozen=True)
class RepLKNetConfig:
    """Architecture of a RepLKNet.

    Attributes:
        kernel_sizes: side of the large kernels of each stage, odd.
        small_kernel: side of the parallel small kernels; None or 0 for none.
        depths: number of units per stage; a unit is a large-kernel block and a feed-forward block.
        dims: width of each stage.
        dw_ratio: width of the depthwise layers relative to that of their stage.
        ffn_ratio: hidden width of the feed-forward blocks relative to that of their stage.
        norm_intermediate_features: whether feature extractors apply a batch norm to each stage's feature map.
    """

    kernel_sizes: tuple[int, ...] = (31, 29, 27, 13)
    small_kernel: int | None = 5
    depths: tuple[int, ...] = (2, 2, 18, 2)
    dims: tuple[int, ...] = (128, 256, 512, 1024)
    dw_ratio: float = 1.0
    ffn_ratio: float = 4.0
    norm_intermediate_features: bool = False

    def __post_init__(self) -> None:
        require_one_per_stage(kernel_sizes=self.kernel_sizes, depths=self.depths, dims=self.dims)
        require_channels(
            dims=self.dims,
            depthwise_widths=[int(dim * self.dw_ratio) for dim in self.dims],
            hidden_widths=[int(dim * self.ffn_ratio) for dim in self.dims],
        )


class PreNormBlock(Fusable, nn.Module):
    """A block that begins with a batch norm and has two 1x1 convolutions, `pw1` and `pw2`, and how it folds.

    Attributes:
        pre_norm: name of the first batch norm, as in the official checkpoints.
    """

    pre_norm = ""
    if TYPE_CHECKING:  # TorchScript would take annotations for attributes
        pw1: ConvNorm
        pw2: ConvNorm

    def foldable(self) -> bool:
        """Return whether the norms around the 1x1 convolutions can be folded into them."""
        norms = is_foldable(getattr(self, self.pre_norm)) and self.pw1.foldable() and self.pw2.foldable()
        return norms and not replaced_method(self)

    def alterations(self) -> list[str]:
        """List the hooks and replaced methods that keep the first norm from being folded; none if it is folded already."""
        if type(getattr(self, self.pre_norm)) is nn.Identity:
            return []
        parts = (self.pre_norm, "pw1", "pw1.conv", "pw1.bn", "pw2", "pw2.conv", "pw2.bn")
        return replaced_methods(self) + alterations(self, parts)

    def folded(self) -> Self:
        """Fold the norms before and after the 1x1 convolutions; a large-kernel layer is folded separately."""
        self.pw1, self.pw2 = self.pw1.folded(input_norm=getattr(self, self.pre_norm)), self.pw2.folded()
        setattr(self, self.pre_norm, nn.Identity())
        return self


class LargeKernelBlock(PreNormBlock):
    """Batch norm, 1x1 convolution, large depthwise kernel, 1x1 convolution, residual.

    Args:
        dim: C.
        width: width of the depthwise layer.
        kernel_size: side of the large kernels.
        small_kernel: side of the parallel small kernels; None or 0 for none.
        drop_path: rate at which whole samples skip the block in training.
        dilation: dilation of the kernels.
        norm: creates a norm from a number of channels.
    """

    pre_norm = "prelkb_bn"

    def __init__(
        self,
        dim: int,
        width: int,
        kernel_size: int,
        small_kernel: int | None,
        drop_path: float,
        dilation: int = 1,
        norm: Callable[..., nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        sizes = [(kernel_size, kernel_size)]
        if small_kernel:
            if small_kernel > kernel_size:
                raise ArgumentError(f"small_kernel {small_kernel} is larger than the kernel size {kernel_size}")
            sizes.append((small_kernel, small_kernel))
        self.prelkb_bn = norm(dim)
        self.pw1 = ConvNorm(nn.Conv2d(dim, width, 1, bias=False), norm(width), nn.ReLU())
        self.large_kernel = LargeKernel(dilate(Rectangles(width, sizes), dilation), [norm(width) for _ in sizes])
        self.act = nn.ReLU()
        self.pw2 = ConvNorm(nn.Conv2d(width, dim, 1, bias=False), norm(dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.pw1(self.prelkb_bn(x))
        y = self.act(self.large_kernel(y)) if torch.jit.is_scripting() else self._large_kernel_and_act(y)
        return x + self.drop_path(self.pw2(y))

    @torch.jit.unused
    def _large_kernel_and_act(self, x: Tensor) -> Tensor:
        fused = type(self.large_kernel) is FoldedLargeKernel and not alteration(self.large_kernel)
        if fused and is_plain_relu(self.act):
            return self.large_kernel(x, relu=True)
        return self.act(self.large_kernel(x))


class FeedForwardBlock(PreNormBlock):
    """Batch norm, 1x1 convolution, GELU, 1x1 convolution, residual.

    Args:
        dim: C.
        hidden: width between the 1x1 convolutions.
        drop_path: rate at which whole samples skip the block in training.
        norm: creates a norm from a number of channels.
        act: creates the activation.
    """

    pre_norm = "preffn_bn"

    def __init__(
        self,
        dim: int,
        hidden: int,
        drop_path: float,
        norm: Callable[..., nn.Module] = nn.BatchNorm2d,
        act: Callable[..., nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.preffn_bn = norm(dim)
        self.pw1 = ConvNorm(nn.Conv2d(dim, hidden, 1, bias=False), norm(hidden), act())
        self.pw2 = ConvNorm(nn.Conv2d(hidden, dim, 1, bias=False), norm(dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return x + self.drop_path(self.pw2(self.pw1(self.preffn_bn(x))))

    def hidden_units(self) -> HiddenUnits | None:
        """Return the hidden units between the 1x1 convolutions; None as long as norms follow these."""
        if not (isinstance(self.pw1.bn, nn.Identity) and isinstance(self.pw2.bn, nn.Identity)):
            return None
        return HiddenUnits("pw1.conv", "pw1.act", "pw2.conv", others=("pw1", "pw1.bn", "pw2"))


class RepLKNet(StagedConvNet):
    """RepLKNet.

    It takes the arguments of `StagedConvNet`.
    """

    @torch.jit.ignore
    def layer_group(self, name: str) -> int | None:
        """Return the layer group of a parameter in the published fine-tuning recipes; see `layers.layer_groups`."""
        return replknet_layer_group(name)

    def parts(self, cfg: RepLKNetConfig, options: ModelOptions) -> Parts:
        """Create the stem, the stages and the norms."""
        norm, act = options.batch_norm(), options.activation(nn.GELU)
        stages, specs = [], options.stage_specs(len(cfg.dims))
        for i, (dim, spec) in enumerate(zip(cfg.dims, specs)):
            width, hidden, size = int(dim * cfg.dw_ratio), int(dim * cfg.ffn_ratio), cfg.kernel_sizes[i]
            blocks: list[nn.Module] = []
            for rate in options.drop_path_rates[i]:
                blocks.append(LargeKernelBlock(dim, width, size, cfg.small_kernel, rate, spec.dilation, norm))
                blocks.append(FeedForwardBlock(dim, hidden, rate, norm, act))
            stages.append((Stage(_transition(cfg.dims[i - 1], dim, spec, norm) if i else nn.Identity(), blocks), dim))
        return Parts(
            stem=_stem(options.in_chans, cfg.dims[0], norm),
            stages=stages,
            reductions=[spec.reduction for spec in specs],
            norm_pre=norm(cfg.dims[-1]),
            head_norm=False,
            feature_norms=[norm(dim) for dim in cfg.dims] if cfg.norm_intermediate_features else [],
        )


def _conv_norm_relu(conv: nn.Conv2d, norm: Callable[..., nn.Module]) -> ConvNorm:
    return ConvNorm(conv, norm(conv.out_channels), nn.ReLU())


def _stem(in_chans: int, dim: int, norm: Callable[..., nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        _conv_norm_relu(nn.Conv2d(in_chans, dim, 3, stride=2, padding=1, bias=False), norm),
        _conv_norm_relu(nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), norm),
        _conv_norm_relu(nn.Conv2d(dim, dim, 1, bias=False), norm),
        _conv_norm_relu(nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim, bias=False), norm),
    )


def _transition(dim_in: int, dim_out: int, spec: StageSpec, norm: Callable[..., nn.Module]) -> nn.Sequential:
    dilation = 1 if spec.stride > 1 else spec.downsample_dilation
    depthwise = nn.Conv2d(
        dim_out, dim_out, 3, stride=spec.stride, padding=dilation, dilation=dilation, groups=dim_out, bias=False
    )
    return nn.Sequential(_conv_norm_relu(nn.Conv2d(dim_in, dim_out, 1, bias=False), norm), _conv_norm_relu(depthwise, norm))


_INCEPTION: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

default_cfgs = generate_default_cfgs(
    with_published(
        {
            "replknet_31b.untrained": default_cfg(first_conv="stem.0.conv"),
            "replknet_31l.untrained": default_cfg(384, first_conv="stem.0.conv", crop_pct=1.0, crop_mode="squash"),
            "replknet_xl.untrained": default_cfg(320, first_conv="stem.0.conv", **_INCEPTION),
            "replknet_nano.untrained": default_cfg(64, first_conv="stem.0.conv"),
        }
    )
)


@register_model
def replknet_31b(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-31B (Ding et al., CVPR 2022): kernels 31, 29, 27, 13; depths 2, 2, 18, 2; widths 128 to 1024.

    79.9 M parameters, 15.4 GMACs at 224.
    """
    return _build("replknet_31b", RepLKNetConfig(), pretrained, kwargs)


@register_model
def replknet_31l(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-31L (Ding et al., CVPR 2022): kernels 31, 29, 27, 13; depths 2, 2, 18, 2; widths 192 to 1536.

    172.7 M parameters, 96.3 GMACs at 384.
    """
    return _build("replknet_31l", RepLKNetConfig(dims=(192, 384, 768, 1536)), pretrained, kwargs)


@register_model
def replknet_xl(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-XL (Ding et al., CVPR 2022): kernels 27, 27, 27, 13; depths 2, 2, 18, 2; widths 256 to 2048.

    It has no small kernels, and its depthwise layers are 1.5 times as wide. 335.4 M parameters, 128.7 GMACs at 320;
    preprocessing with mean and standard deviation 0.5.
    """
    config = RepLKNetConfig(kernel_sizes=(27, 27, 27, 13), small_kernel=None, dims=(256, 512, 1024, 2048), dw_ratio=1.5)
    return _build("replknet_xl", config, pretrained, kwargs)


@register_model
def replknet_nano(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """Small RepLKNet for images of 64 pixels, for tests and demos: kernels 31, 15, 7, 5; widths 16 to 128."""
    config = RepLKNetConfig(kernel_sizes=(31, 15, 7, 5), small_kernel=3, depths=(1, 1, 2, 1), dims=(16, 32, 64, 128))
    return _build("replknet_nano", config, pretrained, kwargs)


def _build(variant: str, config: RepLKNetConfig, pretrained: bool, kwargs: dict[str, Any]) -> RepLKNet:
    return build_model(RepLKNet, variant, config, pretrained, kwargs)  # type: ignore[no-any-return]
