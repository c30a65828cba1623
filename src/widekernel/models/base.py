"""What all the networks here share: stem, stages and head, timm's model contract, and checks of the input."""

# No `from __future__ import annotations` here: graphs that torch.fx makes of a network keep the types of `forward`, and
# TorchScript does not know them as text.
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import ClassifierHead, NormMlpClassifierHead, get_device_dtype, register_notrace_module
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from widekernel import layers
from widekernel.errors import ArgumentError
from widekernel.layers.folding import Fusable, is_folded
from widekernel.layers.grouped import GroupedKernels
from widekernel.layers.strict_loading import load_strictly
from widekernel.models.asked import Asked, check_drop_rates, drop_path_rates
from widekernel.models.input_check import InputCheck
from widekernel.models.layouts.layout import Layout

_LARGE = (layers.DepthwiseConv2d, layers.FoldedLargeKernel, layers.FoldedPartialChannels, layers.LargeKernel)
for _leaf in (*_LARGE, layers.PartialChannels, layers.PointwiseConv2d, layers.PointwiseLinear):
    register_notrace_module(_leaf)  # feature extraction by tracing keeps these whole


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


class StagedConvNet(Fusable, nn.Module):
    """stem -> stages -> norm -> pooling, norm, classifier; with everything that timm expects of a model.

    Args:
        cfg: architecture.
        num_classes: 0 for none, then the network returns pooled features.
        in_chans: channels of the image.
        global_pool: as timm's; "" for none.
        output_stride: 8 or 16 for maps of that stride: the later stages keep the resolution and their kernels are dilated
            instead, as in timm's ConvNeXt. 32 changes nothing.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; it grows linearly from 0.
        act_layer: name or maker of the activation between the two pointwise layers of the blocks (the road: of every
            activation), in the place of the family's own.
        norm_layer: name or maker of the norm in the place of the family's layer norms ("rmsnorm", "simplenorm"), in
            RepLKNet, and on the road before it turns to layer norms, in the place of its batch norms.
        device: where the network is made, "meta" for one without memory.
        dtype: type of its weights, a floating-point one.
    """

    # Not for TorchScript, which would compile it.
    __jit_unused_properties__ = ["_model_args"]

    def __init__(
        self,
        cfg: Any,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str | Callable[..., nn.Module] | None = None,
        norm_layer: str | Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ArgumentError(f"dtype {dtype!r} is no type of weights: give a floating-point one, such as torch.bfloat16")
        check_drop_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        rates = drop_path_rates(drop_path_rate, self.blocks_by_stage(cfg))
        asked = Asked(in_chans, rates, output_stride, act_layer, norm_layer)
        with nullcontext() if device is None else torch.device(device):
            self._make(cfg, asked, num_classes, global_pool, drop_rate)
            self.init_weights()
        load_strictly(self)
        if dtype is not None:
            self.to(dtype)

    def _make(self, cfg: Any, asked: Asked, num_classes: int, global_pool: str, drop_rate: float) -> None:
        parts = self.parts(cfg, asked)
        in_chans = asked.in_chans
        widths = [width for _, width in parts.stages]
        self.cfg = cfg
        self._recorded_args: dict[str, Any] = {}
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
                widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=asked.channel_norm()
            )
        else:
            self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def parts(self, cfg: Any, asked: Asked) -> Parts:
        """Make what the family puts into the frame."""
        raise NotImplementedError

    def blocks_by_stage(self, cfg: Any) -> Sequence[int]:
        """Count the blocks, or units, of each stage."""
        return cfg.depths

    def init_weights(self) -> None:
        """Draw the initial weights where PyTorch's own are not wanted."""

    def layouts(self) -> tuple[Layout, ...]:
        """Give the official checkpoint layouts of this network; the first one is written, all are read."""
        raise NotImplementedError

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm's hub format records, so that the network can be made again: timm's arguments, and the form.

        Raises:
            ArgumentError: if no arguments lead to a network like this.
        """
        if any(isinstance(module, GroupedKernels) for module in self.modules()) or hasattr(self, "compaction"):
            raise ArgumentError(
                "a compacted network cannot be made again from its arguments, so that timm's hub format has no place for "
                "it: save the masked network it comes from, and compact again after loading"
            )
        return {**self._recorded_args, **({"folded": True} if is_folded(self) else {})}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._recorded_args = {key: value for key, value in args.items() if key != "folded"}

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
        self.head.reset(
            num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **get_device_dtype(self)
        )
        self.head_hidden_size = self.head.num_features

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
            self.reset_classifier(0, "", reset_other=True)
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
