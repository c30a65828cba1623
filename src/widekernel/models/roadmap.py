"""The road from ResNet-50 to ConvNeXt-T, each step a network that can be trained.

Liu et al., A ConvNet for the 2020s, CVPR 2022, section 2 and table 10. There is no official code of the steps in between;
weights and multiply-accumulates agree with the printed table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.layers import ConvNorm, DepthwiseConv2d
from widekernel.layers.sources import check_odd
from widekernel.models.asked import Asked, Step
from widekernel.models.base import (
    Parts,
    Stage,
    StagedConvNet,
    check_stages,
)
from widekernel.models.blocks import MixerBlock, init_convnext, norm_downsample
from widekernel.models.building import default_cfg, register
from widekernel.models.layouts import convnext as layouts
from widekernel.models.layouts.layout import Layout
from widekernel.settings import require_literals


@dataclass(frozen=True)
class RoadmapConfig:
    """Architecture of one step; the defaults are ResNet-50.

    Attributes:
        depths: blocks a stage.
        width: of the first stage (bottlenecks: of their narrow part); it doubles from stage to stage.
        stem: 7x7 convolution and pooling, or patches of 4x4 pixels.
        depthwise: the spatial convolution is depthwise.
        block: bottleneck (wide, narrow, wide) or inverted (narrow, wide, narrow).
        dw_first: the depthwise convolution comes before both 1x1 convolutions.
        kernel_size: of the spatial convolution, odd.
        act: activation.
        fewer_acts: only one activation a block, between the 1x1 convolutions.
        fewer_norms: only one norm a block, after the depthwise convolution.
        norm: batch norm or layer norm over channels.
        final_norm: layer norm between pooling and classifier.
        separate_downsample: layer norm and 2x2 convolution between the stages instead of strided blocks.
        layer_scale: initial value, 0 for none; only with `separate_downsample`.
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
        check_stages(depths=self.depths, stages=range(4))
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
                raise ArgumentError(f"{message}: the steps of the road build on one another")

    @property
    def _is_convnext(self) -> bool:
        modern = self.stem == "patchify" and self.norm == "ln" and self.act == "gelu"
        return modern and self.dw_first and self.fewer_acts and self.fewer_norms


class RoadmapBlock(nn.Module):
    """Residual block of every step before the last.

    Args:
        cfg: architecture.
        dim_in: channels that come in.
        width: of the stage, as in the configuration.
        stride: of the spatial convolution.
        drop_path: rate at which whole samples skip the block in training.
        dilation: of the spatial convolution.
        asked: which norm and activation.
    """

    def __init__(
        self, cfg: RoadmapConfig, dim_in: int, width: int, stride: int, drop_path: float, dilation: int, asked: Asked
    ) -> None:
        super().__init__()
        dim_out = out_width(cfg, width)
        self.layers = nn.Sequential(*_block_layers(cfg, dim_in, width, stride, dilation, asked))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or dim_in != dim_out:
            conv = nn.Conv2d(dim_in, dim_out, 1, stride=stride, bias=False)
            self.shortcut = ConvNorm(conv, _norm(cfg, dim_out, asked))
        self.act = nn.Identity() if cfg.fewer_acts else _act(cfg, asked)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return self.act(self.shortcut(x) + self.drop_path(self.layers(x)))


class Roadmap(StagedConvNet):
    """One step of the road from ResNet-50 to ConvNeXt-T.

    Its arguments are those of `StagedConvNet`.
    """

    def parts(self, cfg: RoadmapConfig, asked: Asked) -> Parts:
        """Make stem and stages."""
        make_stage = _convnext_stage if cfg.separate_downsample else _strided_stage
        stages, steps, dim = [], asked.steps(len(cfg.depths)), cfg.width
        for i, step in enumerate(steps):
            width = cfg.width * 2**i
            stages.append((make_stage(cfg, dim, width, i, step, asked), out_width(cfg, width)))
            dim = out_width(cfg, width)
        return Parts(_stem(cfg, asked), stages, [step.reduction for step in steps], head_norm=cfg.final_norm)

    def init_weights(self) -> None:
        """Initialise as ConvNeXt does."""
        init_convnext(self, self.cfg.head_init_scale)

    def layouts(self) -> tuple[Layout, ...]:
        """Give the layouts of ConvNeXt for the last step; the others have no official code."""
        return layouts.ROADMAP if self.cfg.separate_downsample else ()


def out_width(cfg: RoadmapConfig, width: int) -> int:
    """Width of the residual stream of a stage."""
    return width if cfg.block == "inverted" else 4 * width


def _norm(cfg: RoadmapConfig, dim: int, asked: Asked) -> nn.Module:
    return asked.batch_norm()(dim) if cfg.norm == "bn" else asked.channel_norm()(dim)


def _act(cfg: RoadmapConfig, asked: Asked) -> nn.Module:
    return asked.activation(nn.ReLU if cfg.act == "relu" else nn.GELU)()


def _block_layers(cfg: RoadmapConfig, dim_in: int, width: int, stride: int, dilation: int, asked: Asked) -> list[nn.Module]:
    """List the block's convolutions, each with the norm and the activation that follow it."""
    hidden = 4 * width if cfg.block == "inverted" else width
    spatial_at = dim_in if cfg.dw_first else hidden
    normed = {"spatial"} if cfg.fewer_norms else {"spatial", "first", "last"}
    active = {"first"} if cfg.fewer_acts else {"spatial", "first"}

    def layer(role: str, dim_a: int, dim_b: int, kernel_size: int, step: int) -> ConvNorm:
        groups = dim_b if role == "spatial" and cfg.depthwise else 1
        conv_cls = DepthwiseConv2d if groups > 1 else nn.Conv2d
        apart = dilation if role == "spatial" else 1
        conv = conv_cls(
            dim_a,
            dim_b,
            kernel_size,
            stride=step,
            padding=kernel_size // 2 * apart,
            dilation=apart,
            groups=groups,
            bias=cfg.fewer_norms,
        )
        norm = _norm(cfg, dim_b, asked) if role in normed else nn.Identity()
        return ConvNorm(conv, norm, _act(cfg, asked) if role in active else None)

    first = layer("first", dim_in, hidden, 1, 1)
    spatial = layer("spatial", spatial_at, spatial_at, cfg.kernel_size, stride)
    last = layer("last", hidden, out_width(cfg, width), 1, 1)
    return [spatial, first, last] if cfg.dw_first else [first, spatial, last]


def _strided_stage(cfg: RoadmapConfig, dim: int, width: int, index: int, step: Step, asked: Asked) -> Stage:
    blocks = []
    for j, rate in enumerate(asked.rates[index]):
        stride, dilation = (step.stride, step.dilation_before) if j == 0 else (1, step.dilation)
        blocks.append(RoadmapBlock(cfg, dim, width, stride, rate, dilation, asked))
        dim = out_width(cfg, width)
    return Stage(nn.Identity(), blocks)


def _convnext_stage(cfg: RoadmapConfig, dim: int, width: int, index: int, step: Step, asked: Asked) -> Stage:
    blocks = []
    for rate in asked.rates[index]:
        reach = cfg.kernel_size // 2 * step.dilation
        mixer = DepthwiseConv2d(width, width, cfg.kernel_size, padding=reach, dilation=step.dilation, groups=width)
        blocks.append(MixerBlock(mixer, width, rate, cfg.layer_scale, asked))
    return Stage(norm_downsample(dim, width, step, asked) if index else nn.Identity(), blocks)


def _stem(cfg: RoadmapConfig, asked: Asked) -> nn.Sequential:
    norm = _norm(cfg, cfg.width, asked)
    if cfg.stem == "resnet":
        conv = nn.Conv2d(asked.in_chans, cfg.width, 7, stride=2, padding=3, bias=False)
        return nn.Sequential(ConvNorm(conv, norm, _act(cfg, asked)), nn.MaxPool2d(3, stride=2, padding=1))
    conv = nn.Conv2d(asked.in_chans, cfg.width, 4, stride=4, bias=cfg.separate_downsample)
    return nn.Sequential(ConvNorm(conv, norm, None if cfg.fewer_acts else _act(cfg, asked)))


# Each step changes one thing in the network before it.
_CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("00_resnet50", {}),
    ("01_stage_ratio", {"depths": (3, 3, 9, 3)}),
    ("02_patchify", {"stem": "patchify"}),
    ("03_depthwise", {"depthwise": True}),
    ("04_width", {"width": 96}),
    ("05_inverted", {"block": "inverted"}),
    ("06_dw_first", {"dw_first": True}),
    ("07_kernel7", {"kernel_size": 7}),
    ("08_gelu", {"act": "gelu"}),
    ("09_fewer_acts", {"fewer_acts": True}),
    ("10_fewer_norms", {"fewer_norms": True}),
    ("11_layernorm", {"norm": "ln"}),
    ("12_final_norm", {"final_norm": True}),
    ("13_convnext_t", {"separate_downsample": True, "layer_scale": 1e-6}),
)


def _steps() -> dict[str, RoadmapConfig]:
    configs, config = {}, RoadmapConfig()
    for name, change in _CHANGES:
        config = replace(config, **change)
        configs[f"roadmap_{name}"] = config
    configs["roadmap_nano"] = replace(config, depths=(1, 1, 2, 1), width=16)
    return configs


STEPS = _steps()


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": default_cfg(64 if name == "roadmap_nano" else 224, first_conv="stem.0.conv") for name in STEPS}
)
for _name, _config in STEPS.items():
    register(Roadmap, _name, _config, f"{_name}: a step of the road from ResNet-50 to ConvNeXt-T.")
