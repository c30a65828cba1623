"""The base of all networks: stem, stages and head, and timm's model interface."""

# No `from __future__ import annotations` here: torch.fx copies the annotations of `forward` into its graphs, and TorchScript
# cannot read them as strings.
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
from widekernel.models.checkpoint.loading import load_pretrained
from widekernel.models.input_check import InputCheck
from widekernel.models.options import ModelOptions, linear_drop_path_rates
from widekernel.models.validation import require_drop_rates

_LARGE_KERNELS = (layers.DepthwiseConv2d, layers.FoldedLargeKernel, layers.FoldedPartialChannels, layers.LargeKernel)
_POINTWISE = (layers.PointwiseConv2d, layers.PointwiseGradConv2d, layers.PointwiseLinear)
for _leaf in (*_LARGE_KERNELS, layers.NativeBatchNorm2d, layers.PartialChannels, *_POINTWISE):
    register_notrace_module(_leaf)  # torch.fx keeps these whole when timm extracts features with it


class Stage(nn.Module):
    """Downsampling, then residual blocks at one resolution.

    Args:
        downsample: module that changes the resolution and the width.
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
    """The parts of a network that its family defines.

    Attributes:
        stem: first layers, from the image to the first stage.
        stages: the stages, each with its width.
        reductions: total stride of each stage's output, in pixels of the image.
        norm_pre: normalization of the last feature map, before pooling; None for none.
        head_norm: whether the head normalizes the pooled features before the classifier.
        feature_norms: normalizations of the stages' feature maps in feature extraction; empty for none.
    """

    stem: nn.Module
    stages: Sequence[tuple[Stage, int]]
    reductions: Sequence[int]
    norm_pre: nn.Module | None = None
    head_norm: bool = True
    feature_norms: Sequence[nn.Module] = ()


class StagedConvNet(Fusable, nn.Module):
    """Base network: stem -> stages -> norm -> pooling, norm, classifier; with everything that timm expects of a model.

    A family is a subclass: it defines `parts`, and may define `init_weights` and `blocks_by_stage`. It may also define a
    static method `default_out_indices(cfg)`, which chooses the default stages of feature extractors.

    Args:
        cfg: architecture, a frozen dataclass of the family.
        num_classes: number of classes; with 0 the network returns the pooled features.
        in_chans: number of channels of the image.
        global_pool: type of pooling, as in timm; "" for none.
        output_stride: 8 or 16 for feature maps of that stride: later stages then keep the resolution and have dilated
            kernels instead, as in timm's ConvNeXt. 32 changes nothing.
        drop_rate: dropout rate before the classifier.
        drop_path_rate: drop-path rate of the last block; the rates grow linearly from 0.
        act_layer: name or constructor of the activation between the two pointwise layers of each block (roadmap networks:
            of every activation); None for the family's own.
        norm_layer: name or constructor of the norm that replaces the family's layer norms ("rmsnorm", "simplenorm"), or
            the batch norms of RepLKNet and of the roadmap networks that have them; None for the family's own.
        device: device to create the network on; "meta" for a network without memory.
        dtype: floating-point type of the weights.
    """

    # TorchScript would compile this property.
    __jit_unused_properties__ = ["_model_args"]
    # Nor may it read the property, which raises for a compacted network.
    __jit_ignored_attributes__ = ["_model_args"]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # TorchScript looks for ignored properties in the class itself, not in its bases.
        cls._model_args = StagedConvNet._model_args  # type: ignore[method-assign]

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
            raise ArgumentError(
                f"dtype {dtype!r} cannot be the type of weights: give a floating-point type, such as torch.bfloat16"
            )
        require_drop_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        rates = linear_drop_path_rates(drop_path_rate, self.blocks_by_stage(cfg))
        options = ModelOptions(in_chans, rates, output_stride, act_layer, norm_layer)
        with nullcontext() if device is None else torch.device(device):
            self._assemble(cfg, options, num_classes, global_pool, drop_rate)
            self.init_weights()
        load_strictly(self)
        if dtype is not None:
            self.to(dtype)

    def _assemble(self, cfg: Any, options: ModelOptions, num_classes: int, global_pool: str, drop_rate: float) -> None:
        parts = self.parts(cfg, options)
        in_chans = options.in_chans
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
                widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=options.channel_norm()
            )
        else:
            self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def parts(self, cfg: Any, options: ModelOptions) -> Parts:
        """Create the parts of the network that its family defines."""
        raise NotImplementedError

    def blocks_by_stage(self, cfg: Any) -> Sequence[int]:
        """Return the number of blocks, or units, of each stage: as many as it has drop-path rates."""
        return cfg.depths

    def init_weights(self) -> None:
        """Initialize the weights; by default, PyTorch's initialization is kept."""

    @property
    def _model_args(self) -> dict[str, Any]:
        """The arguments that timm's hub format records to rebuild the network, with `folded` for a folded one.

        Raises:
            ArgumentError: if the network is compacted, because no arguments can rebuild it.
        """
        if any(isinstance(module, GroupedKernels) for module in self.modules()) or hasattr(self, "compaction"):
            raise ArgumentError(
                "a compacted network cannot be built from arguments, so timm's hub format cannot store it: "
                "save the masked network that it comes from, and compact again after loading"
            )
        return {**self._recorded_args, **({"folded": True} if is_folded(self) else {})}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._recorded_args = {key: value for key, value in args.items() if key != "folded"}

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Load a published checkpoint for timm, which adapts weights to other images and leaves other classifiers out."""
        load_pretrained(self, path)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to one-dimensional ones."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that group the parameters for layer-wise learning rates."""
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
        """Enable or disable gradient checkpointing: recomputing each stage's activations in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier: 0 classes for none, `global_pool=""` for no pooling."""
        self.num_classes = num_classes
        self.head.reset(
            num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **get_device_dtype(self)
        )
        self.head_hidden_size = self.head.num_features

    def intermediate(self, index: int, x: Tensor) -> Tensor:
        """Return the feature map `x` of stage `index` as in feature extraction: normalized if the stage has a norm."""
        for i, norm in enumerate(self.feature_norms):  # TorchScript cannot index them
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
            indices: indices of the stages; an integer n for the last n stages, None for all.
            norm: whether to apply the final norm to the last stage's map.
            stop_early: whether to skip the stages after the last requested one.
            output_fmt: must be "NCHW".
            intermediates_only: whether to return only the list of maps.

        Returns:
            The final map and the list of intermediate maps (N, C, H, W), or only the list.
        """
        if output_fmt != "NCHW":
            raise ArgumentError(f"output_fmt '{output_fmt}' is not supported: these networks return 'NCHW' maps")
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
        """Remove the parts that are not needed for the feature maps of the stages `indices`; return these indices."""
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
        """(N, num_features, H', W') -> logits (N, num_classes), or the input of the classifier."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))
