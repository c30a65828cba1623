"""The ConvNeXt roadmap: the steps from ResNet-50 to ConvNeXt-T, each a network that can be trained.

Liu et al., A ConvNet for the 2020s, CVPR 2022, section 2 and table 10. There is no official code for the intermediate steps;
parameters and multiply-accumulates agree with the printed table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.layers import ConvNorm, DepthwiseConv2d
from widekernel.layers.sources import check_odd
from widekernel.models.base import Parts, Stage, StagedConvNet
from widekernel.models.blocks import MixerBlock, init_convnext, norm_downsample
from widekernel.models.builder import build_model, default_cfg
from widekernel.models.options import ModelOptions, StageSpec
from widekernel.models.validation import require_one_per_stage
from widekernel.settings import require_literals


@dataclass(frozen=True)
class RoadmapConfig:
    """Architecture of one step; the defaults are ResNet-50.

    Attributes:
        depths: number of blocks per stage.
        width: width of the first stage (for bottlenecks, of their narrow part); it doubles from stage to stage.
        stem: "resnet" for a 7x7 convolution and pooling, "patchify" for patches of 4x4 pixels.
        depthwise: whether the spatial convolution is depthwise.
        block: "bottleneck" (wide, narrow, wide) or "inverted" (narrow, wide, narrow).
        dw_first: whether the depthwise convolution comes before both 1x1 convolutions.
        kernel_size: side of the spatial kernels, odd.
        act: activation.
        fewer_acts: whether a block has only one activation, between the 1x1 convolutions.
        fewer_norms: whether a block has only one norm, after the depthwise convolution.
        norm: "bn" for batch norm, "ln" for layer norm over the channels.
        final_norm: whether there is a layer norm between pooling and classifier.
        separate_downsample: whether a layer norm and a 2x2 convolution between the stages replace strided blocks.
        layer_scale: initial value of the layer scale, 0 for none; needs `separate_downsample`.
        head_init_scale: factor on the initial weights of the classifier.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    stem: Literal["resnet", "patchify"] = "resnet"
    depthwise: bool = False
    block: Literal["bottleneck", "inverted"] = "bottleneck"
    dw_first: bool = False
    kernel_size: int = 3
    act: Literal["relu", "gelu"] = "relu"
    fewer_acts: bool = False
    fewer_norms: bool = False
    norm: Literal["bn", "ln"] = "bn"
    final_norm: bool = False
    separate_downsample: bool = False
    layer_scale: float = 0.0
    head_init_scale: float = 1.0

    def __post_init__(self) -> None:
        check_odd("kernel size", self.kernel_size)
        require_one_per_stage(depths=self.depths, stages=range(4))
        require_literals(self)
        needs = {
            "layer_scale needs separate_downsample=True": self.layer_scale > 0 and not self.separate_downsample,
            "block='inverted' needs depthwise=True": self.block == "inverted" and not self.depthwise,
            "dw_first=True needs block='inverted'": self.dw_first and self.block != "inverted",
            "fewer_acts=True needs dw_first=True": self.fewer_acts and not self.dw_first,
            "fewer_norms=True needs dw_first=True": self.fewer_norms and not self.dw_first,
            "separate_downsample=True needs stem='patchify', norm='ln', act='gelu', fewer_acts and fewer_norms": (
                self.separate_downsample and not self._is_convnext
            ),
        }
        for message, violated in needs.items():
            if violated:
                raise ArgumentError(f"{message}: the steps of the roadmap build on one another")

    @property
    def _is_convnext(self) -> bool:
        modern = self.stem == "patchify" and self.norm == "ln" and self.act == "gelu"
        return modern and self.dw_first and self.fewer_acts and self.fewer_norms


class RoadmapBlock(nn.Module):
    """Residual block of every step except the last one.

    Args:
        cfg: architecture.
        dim_in: number of input channels.
        width: width of the stage, as in the configuration.
        stride: stride of the spatial convolution.
        drop_path: rate at which whole samples skip the block in training.
        dilation: dilation of the spatial convolution.
        options: provides the norm and the activation.
    """

    def __init__(
        self,
        cfg: RoadmapConfig,
        dim_in: int,
        width: int,
        stride: int,
        drop_path: float,
        dilation: int,
        options: ModelOptions,
    ) -> None:
        super().__init__()
        dim_out = out_width(cfg, width)
        self.layers = nn.Sequential(*_block_layers(cfg, dim_in, width, stride, dilation, options))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or dim_in != dim_out:
            conv = nn.Conv2d(dim_in, dim_out, 1, stride=stride, bias=False)
            self.shortcut = ConvNorm(conv, _norm(cfg, dim_out, options))
        self.act = nn.Identity() if cfg.fewer_acts else _act(cfg, options)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return self.act(self.shortcut(x) + self.drop_path(self.layers(x)))


class Roadmap(StagedConvNet):
    """One step of the ConvNeXt roadmap.

    It takes the arguments of `StagedConvNet`.
    """

    def parts(self, cfg: RoadmapConfig, options: ModelOptions) -> Parts:
        """Create the stem and the stages."""
        make_stage = _convnext_stage if cfg.separate_downsample else _strided_stage
        stages, specs, dim = [], options.stage_specs(len(cfg.depths)), cfg.width
        for i, spec in enumerate(specs):
            width = cfg.width * 2**i
            stages.append((make_stage(cfg, dim, width, i, spec, options), out_width(cfg, width)))
            dim = out_width(cfg, width)
        return Parts(_stem(cfg, options), stages, [spec.reduction for spec in specs], head_norm=cfg.final_norm)

    def init_weights(self) -> None:
        """Initialize as ConvNeXt."""
        init_convnext(self, self.cfg.head_init_scale)


def out_width(cfg: RoadmapConfig, width: int) -> int:
    """Return the width of a stage's residual stream."""
    return width if cfg.block == "inverted" else 4 * width


def _norm(cfg: RoadmapConfig, dim: int, options: ModelOptions) -> nn.Module:
    return options.batch_norm()(dim) if cfg.norm == "bn" else options.channel_norm()(dim)


def _act(cfg: RoadmapConfig, options: ModelOptions) -> nn.Module:
    return options.activation(nn.ReLU if cfg.act == "relu" else nn.GELU)()


def _block_layers(
    cfg: RoadmapConfig, dim_in: int, width: int, stride: int, dilation: int, options: ModelOptions
) -> list[nn.Module]:
    """Create the block's convolutions, each with the norm and the activation that follow it."""
    hidden = 4 * width if cfg.block == "inverted" else width
    spatial_dim = dim_in if cfg.dw_first else hidden
    normed = {"spatial"} if cfg.fewer_norms else {"spatial", "first", "last"}
    active = {"first"} if cfg.fewer_acts else {"spatial", "first"}

    def layer(role: str, dim_a: int, dim_b: int, kernel_size: int, layer_stride: int) -> ConvNorm:
        groups = dim_b if role == "spatial" and cfg.depthwise else 1
        conv_cls = DepthwiseConv2d if groups > 1 else nn.Conv2d
        layer_dilation = dilation if role == "spatial" else 1
        conv = conv_cls(
            dim_a,
            dim_b,
            kernel_size,
            stride=layer_stride,
            padding=kernel_size // 2 * layer_dilation,
            dilation=layer_dilation,
            groups=groups,
            bias=cfg.fewer_norms,
        )
        norm = _norm(cfg, dim_b, options) if role in normed else nn.Identity()
        return ConvNorm(conv, norm, _act(cfg, options) if role in active else None)

    first = layer("first", dim_in, hidden, 1, 1)
    spatial = layer("spatial", spatial_dim, spatial_dim, cfg.kernel_size, stride)
    last = layer("last", hidden, out_width(cfg, width), 1, 1)
    return [spatial, first, last] if cfg.dw_first else [first, spatial, last]


def _strided_stage(cfg: RoadmapConfig, dim: int, width: int, index: int, spec: StageSpec, options: ModelOptions) -> Stage:
    blocks = []
    for j, rate in enumerate(options.drop_path_rates[index]):
        stride, dilation = (spec.stride, spec.downsample_dilation) if j == 0 else (1, spec.dilation)
        blocks.append(RoadmapBlock(cfg, dim, width, stride, rate, dilation, options))
        dim = out_width(cfg, width)
    return Stage(nn.Identity(), blocks)


def _convnext_stage(cfg: RoadmapConfig, dim: int, width: int, index: int, spec: StageSpec, options: ModelOptions) -> Stage:
    blocks = []
    for rate in options.drop_path_rates[index]:
        padding = cfg.kernel_size // 2 * spec.dilation
        mixer = DepthwiseConv2d(width, width, cfg.kernel_size, padding=padding, dilation=spec.dilation, groups=width)
        blocks.append(MixerBlock(mixer, width, rate, cfg.layer_scale, options))
    return Stage(norm_downsample(dim, width, spec, options) if index else nn.Identity(), blocks)


def _stem(cfg: RoadmapConfig, options: ModelOptions) -> nn.Sequential:
    norm = _norm(cfg, cfg.width, options)
    if cfg.stem == "resnet":
        conv = nn.Conv2d(options.in_chans, cfg.width, 7, stride=2, padding=3, bias=False)
        return nn.Sequential(ConvNorm(conv, norm, _act(cfg, options)), nn.MaxPool2d(3, stride=2, padding=1))
    conv = nn.Conv2d(options.in_chans, cfg.width, 4, stride=4, bias=cfg.separate_downsample)
    return nn.Sequential(ConvNorm(conv, norm, None if cfg.fewer_acts else _act(cfg, options)))


# Each step makes one change to the previous network.
_STEP_00 = RoadmapConfig()
_STEP_01 = replace(_STEP_00, depths=(3, 3, 9, 3))
_STEP_02 = replace(_STEP_01, stem="patchify")
_STEP_03 = replace(_STEP_02, depthwise=True)
_STEP_04 = replace(_STEP_03, width=96)
_STEP_05 = replace(_STEP_04, block="inverted")
_STEP_06 = replace(_STEP_05, dw_first=True)
_STEP_07 = replace(_STEP_06, kernel_size=7)
_STEP_08 = replace(_STEP_07, act="gelu")
_STEP_09 = replace(_STEP_08, fewer_acts=True)
_STEP_10 = replace(_STEP_09, fewer_norms=True)
_STEP_11 = replace(_STEP_10, norm="ln")
_STEP_12 = replace(_STEP_11, final_norm=True)
_STEP_13 = replace(_STEP_12, separate_downsample=True, layer_scale=1e-6)

default_cfgs = generate_default_cfgs(
    {
        "roadmap_00_resnet50.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_01_stage_ratio.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_02_patchify.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_03_depthwise.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_04_width.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_05_inverted.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_06_dw_first.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_07_kernel7.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_08_gelu.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_09_fewer_acts.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_10_fewer_norms.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_11_layernorm.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_12_final_norm.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_13_convnext_t.untrained": default_cfg(first_conv="stem.0.conv"),
        "roadmap_nano.untrained": default_cfg(64, first_conv="stem.0.conv"),
    }
)


@register_model
def roadmap_00_resnet50(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 0, ResNet-50: 3x3 kernels, depths 3, 4, 6, 3, widths 256 to 2048."""
    return _build("roadmap_00_resnet50", _STEP_00, pretrained, kwargs)


@register_model
def roadmap_01_stage_ratio(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 1, the depths of ConvNeXt-T: 3x3 kernels, depths 3, 3, 9, 3, widths 256 to 2048."""
    return _build("roadmap_01_stage_ratio", _STEP_01, pretrained, kwargs)


@register_model
def roadmap_02_patchify(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 2, stem of 4x4 patches: 3x3 kernels, depths 3, 3, 9, 3, widths 256 to 2048."""
    return _build("roadmap_02_patchify", _STEP_02, pretrained, kwargs)


@register_model
def roadmap_03_depthwise(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 3, depthwise convolutions: 3x3 kernels, depths 3, 3, 9, 3, widths 256 to 2048."""
    return _build("roadmap_03_depthwise", _STEP_03, pretrained, kwargs)


@register_model
def roadmap_04_width(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 4, 96 channels: 3x3 kernels, depths 3, 3, 9, 3, widths 384 to 3072."""
    return _build("roadmap_04_width", _STEP_04, pretrained, kwargs)


@register_model
def roadmap_05_inverted(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 5, inverted blocks: 3x3 kernels, depths 3, 3, 9, 3, widths 96 to 768."""
    return _build("roadmap_05_inverted", _STEP_05, pretrained, kwargs)


@register_model
def roadmap_06_dw_first(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 6, depthwise first: 3x3 kernels, depths 3, 3, 9, 3, widths 96 to 768."""
    return _build("roadmap_06_dw_first", _STEP_06, pretrained, kwargs)


@register_model
def roadmap_07_kernel7(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 7, larger kernels: 7x7 kernels, depths 3, 3, 9, 3, widths 96 to 768."""
    return _build("roadmap_07_kernel7", _STEP_07, pretrained, kwargs)


@register_model
def roadmap_08_gelu(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 8, GELU: 7x7 kernels, depths 3, 3, 9, 3, widths 96 to 768."""
    return _build("roadmap_08_gelu", _STEP_08, pretrained, kwargs)


@register_model
def roadmap_09_fewer_acts(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 9, one activation a block: 7x7 kernels, depths 3, 3, 9, 3, widths 96 to 768."""
    return _build("roadmap_09_fewer_acts", _STEP_09, pretrained, kwargs)


@register_model
def roadmap_10_fewer_norms(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 10, one norm a block: 7x7 kernels, depths 3, 3, 9, 3, widths 96 to 768."""
    return _build("roadmap_10_fewer_norms", _STEP_10, pretrained, kwargs)


@register_model
def roadmap_11_layernorm(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 11, layer norm: 7x7 kernels, depths 3, 3, 9, 3, widths 96 to 768."""
    return _build("roadmap_11_layernorm", _STEP_11, pretrained, kwargs)


@register_model
def roadmap_12_final_norm(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 12, norm before classifier: 7x7 kernels, depths 3, 3, 9, 3, widths 96 to 768."""
    return _build("roadmap_12_final_norm", _STEP_12, pretrained, kwargs)


@register_model
def roadmap_13_convnext_t(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """ConvNeXt roadmap (CVPR 2022), step 13, ConvNeXt-T: 7x7 kernels, depths 3, 3, 9, 3, widths 96 to 768."""
    return _build("roadmap_13_convnext_t", _STEP_13, pretrained, kwargs)


@register_model
def roadmap_nano(pretrained: bool = False, **kwargs: Any) -> Roadmap:
    """Small ConvNeXt for images of 64 pixels, for tests and demos: 7x7 kernels, depths 1, 1, 2, 1, widths 16 to 128."""
    return _build("roadmap_nano", replace(_STEP_13, depths=(1, 1, 2, 1), width=16), pretrained, kwargs)


def _build(variant: str, config: RoadmapConfig, pretrained: bool, kwargs: dict[str, Any]) -> Roadmap:
    return build_model(Roadmap, variant, config, pretrained, kwargs)  # type: ignore[no-any-return]
