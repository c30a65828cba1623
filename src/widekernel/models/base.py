"""What all the networks here share: stem, stages and head, timm's model contract, and checks of the input."""

# No `from __future__ import annotations` here: graphs that torch.fx makes of a network keep the types of `forward`, and
# TorchScript does not know them as text.
import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    register_notrace_module,
)
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from widekernel import layers
from widekernel.errors import ArgumentError, UnknownArgumentError, nearest
from widekernel.models.input_check import InputCheck
from widekernel.models.layouts.layout import Layout
from widekernel.models.layouts.translate import translate

_LARGE = (layers.DepthwiseConv2d, layers.FoldedLargeKernel, layers.FoldedPartialChannels, layers.LargeKernel)
for _leaf in (*_LARGE, layers.PartialChannels, layers.PointwiseConv2d, layers.PointwiseLinear):
    register_notrace_module(_leaf)  # feature extraction by tracing keeps these whole

ConfigT = TypeVar("ConfigT")
BUILDER_ARGUMENTS = (
    "cache_dir",
    "feature_cls",
    "features_only",
    "out_indices",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
)


class Stage(nn.Module):
    """Downsampling, then residual blocks at one resolution.

    Args:
        downsample: module that changes resolution and width.
        blocks: residual blocks.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        x = self.downsample(x)
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a family puts into the frame that all the networks share.

    Attributes:
        stem: first layers, from the image to the first stage.
        stages: with the width of each.
        reductions: stride of each stage's output against the image.
        norm_pre: normalisation of the last map, before pooling; None for none.
        head_norm: whether a channel layer norm stands between pooling and classifier.
        feature_norms: normalisations of the stages' maps where they are handed out; empty for none.
    """

    stem: nn.Module
    stages: Sequence[tuple[Stage, int]]
    reductions: Sequence[int]
    norm_pre: nn.Module | None = None
    head_norm: bool = True
    feature_norms: Sequence[nn.Module] = ()


class StagedConvNet(nn.Module):
    """stem -> stages -> norm -> pooling, norm, classifier; with everything that timm expects of a model.

    Args:
        cfg: architecture.
        num_classes: 0 for none, then the network returns pooled features.
        in_chans: channels of the image.
        global_pool: as timm's; "" for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; it grows linearly from 0.
    """

    def __init__(
        self,
        cfg: Any,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        parts = self.parts(cfg, in_chans, drop_path_rates(drop_path_rate, self.blocks_by_stage(cfg)))
        widths = [width for _, width in parts.stages]
        self.cfg = cfg
        self.num_classes, self.drop_rate, self.in_chans = num_classes, drop_rate, in_chans
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{i}"}
            for i, (width, reduction) in enumerate(zip(widths, parts.reductions))
        ]
        self.input_check = InputCheck(in_chans, parts.reductions[-1])
        self.stem = parts.stem
        self.stages = nn.Sequential(*(stage for stage, _ in parts.stages))
        self.norm_pre = parts.norm_pre or nn.Identity()
        self.feature_norms = nn.ModuleList(parts.feature_norms)
        self.head: Any
        if parts.head_norm:
            self.head = NormMlpClassifierHead(
                widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=LayerNorm2d
            )
        else:
            self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.init_weights()

    def parts(self, cfg: Any, in_chans: int, rates: list[list[float]]) -> Parts:
        """Make what the family puts into the frame, given the drop-path rate of every block, listed by stage."""
        raise NotImplementedError

    def blocks_by_stage(self, cfg: Any) -> Sequence[int]:
        """Count the blocks, or units, of each stage."""
        return cfg.depths

    def init_weights(self) -> None:
        """Draw the initial weights where PyTorch's own are not wanted."""

    def layouts(self) -> tuple[Layout, ...]:
        """Give the official checkpoint layouts of this network; the first one is written, all are read."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name parameters to spare from weight decay beyond those of one dimension."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Give the patterns that layer-wise learning rates group parameters by."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm_pre|^feature_norms", (99999,)),
            ]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each stage in the backward pass instead of storing them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Give the classifier layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Put a new classifier in; 0 classes for none, `global_pool=""` for no pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, reset_other=reset_other)

    def intermediate(self, index: int, x: Tensor) -> Tensor:
        """Give the feature map of stage `index` in the form in which it is handed out."""
        for i, norm in enumerate(self.feature_norms):  # TorchScript cannot pick one
            if i == index:
                x = norm(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the feature maps of several stages.

        Args:
            x: images (N, in_chans, H, W).
            indices: of the stages; an integer for the last n, None for all.
            norm: apply the final norm to the last stage's map.
            stop_early: do not compute the stages after the last one asked for.
            output_fmt: only "NCHW".
            intermediates_only: return only the list of maps.

        Returns:
            The final map and the list of intermediate ones (N, C, H, W), or only the list.
        """
        if output_fmt != "NCHW":
            raise ArgumentError(f"output_fmt '{output_fmt}' is not supported: these networks give 'NCHW' maps")
        take, last = feature_take_indices(len(self.stages), indices)
        final = len(self.stages) - 1
        last = last if stop_early else final
        maps: list[Tensor] = []
        x = self.stem(self.input_check(x))
        for i, stage in enumerate(self.stages):
            if i <= last:
                x = stage(x)
                if i in take:
                    maps.append(self.norm_pre(x) if norm and i == final else self.intermediate(i, x))
        if intermediates_only:
            return maps
        return (self.norm_pre(x) if last == final else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what is not needed to compute the feature maps of the stages `indices`."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.input_check.stride = self.feature_info[last]["reduction"]
        for i in range(len(self.feature_norms)):
            if i not in take:
                self.feature_norms[i] = nn.Identity()
        if prune_norm or shortened:
            self.norm_pre = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.num_classes = 0
            self.head.reset(0, "", reset_other=True, in_features=self.num_features)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last feature map (N, num_features, H', W')."""
        x = self.stem(self.input_check(x))
        return self.norm_pre(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, H', W') -> logits (N, num_classes), or what the classifier would get."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Let the drop-path rate run linearly from 0 to `rate` over all the blocks, listed by stage."""
    return calculate_drop_path_rates(rate, list(depths), stagewise=True)  # type: ignore[return-value]


def check_stages(**per_stage: Sequence[Any]) -> None:
    """Raise unless every given sequence has the same length, one entry a stage."""
    for name, values in per_stage.items():
        if not isinstance(values, Sequence):
            raise ArgumentError(f"{name} must be a sequence with one entry a stage, not {values!r}")
        if name == "depths" and not all(isinstance(value, int) and value >= 0 for value in values):
            raise ArgumentError(f"depths are {tuple(values)}: every stage needs a whole number of blocks, 0 or more")
    lengths = {name: len(values) for name, values in per_stage.items()}
    if len(set(lengths.values())) != 1:
        raise ArgumentError(f"one entry a stage is needed, all alike, but the lengths are {lengths}")


def check_widths(**widths: Sequence[int]) -> None:
    """Raise unless every stage has at least one channel."""
    for name, values in widths.items():
        if min(values) < 1:
            raise ArgumentError(f"{name} come out as {tuple(values)}: every stage needs at least one channel")


def check_choices(config: Any) -> None:
    """Raise unless every field of a configuration that is declared as one of several words is one of them."""
    for name, kind in get_type_hints(type(config)).items():
        words, value = get_args(kind), getattr(config, name)
        if get_origin(kind) is Literal and value not in words:
            choices = ", ".join(map(repr, words))
            hint = nearest(str(value), words)
            raise ArgumentError(f"{name} {value!r} is unknown: it must be one of {choices}.{hint}")


def default_cfg(input_size: int = 224, stride: int = 32, **kwargs: Any) -> dict[str, Any]:
    """Describe a network's preprocessing and head the way timm wants it; `kwargs` overrides entries."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, input_size, input_size),
        "pool_size": (input_size // stride, input_size // stride),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        **kwargs,
    }


def build(
    model_cls: Callable[..., nn.Module], variant: str, config: ConfigT, pretrained: bool, kwargs: dict[str, Any]
) -> Any:
    """Create a network from its configuration, arguments that override parts of it, and timm's usual ones.

    Raises:
        UnknownArgumentError: a TypeError, for an argument that nobody takes; names the nearest.
    """
    fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    of_model = [name for name in inspect.signature(model_cls).parameters if name != "cfg"]
    known = [*fields, *of_model, *BUILDER_ARGUMENTS]
    for name in kwargs:
        if name not in known:
            raise UnknownArgumentError(
                f"{variant} got an unknown argument {name!r}.{nearest(name, known)} It takes {', '.join(fields + of_model)}"
            )
    overrides = {name: _frozen(kwargs.pop(name)) for name in fields if name in kwargs}
    # timm hands the pretrained configuration's arguments to every model; the defaults are the same here.
    feature_cfg = {"feature_cls": "getter", **_default_indices(model_cls, config, overrides)}
    if kwargs.get("feature_cls") in ("list", "dict"):
        feature_cfg["flatten_sequential"] = True
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        model_cfg=dataclasses.replace(config, **overrides),  # type: ignore[type-var]
        feature_cfg=feature_cfg,
        pretrained_filter_fn=_to_native,
        **kwargs,
    )


def register(network: type[StagedConvNet], name: str, config: Any, doc: str) -> None:
    """Register a configuration of a network with timm, as a function of that name in the network's module."""

    def entry(pretrained: bool = False, **kwargs: Any) -> Any:
        return build(network, name, config, pretrained, kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = doc
    entry.__module__ = network.__module__
    setattr(sys.modules[network.__module__], name, entry)
    register_model(entry)


def _default_indices(model_cls: Any, config: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    config = dataclasses.replace(config, **overrides)
    choose = getattr(model_cls, "default_out_indices", None)
    return {"out_indices": choose(config) if choose else tuple(range(len(config.depths)))}


def _to_native(state: dict[str, Tensor], model: StagedConvNet) -> dict[str, Tensor]:
    """Translate a pretrained state dict for timm's loader, which is to name the keys that no rule knows."""
    found = translate(model, state)
    unknown = {key: state[key] for key in found.unknown if key in state}
    return {**unknown, **found.state}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
