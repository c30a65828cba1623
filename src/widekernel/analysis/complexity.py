"""Parameters, multiply-accumulates and activations of a network, counted by PyTorch's own counter without computing.

A sparse network has three sizes: all that it holds (dense), what of that is not zero - the figures of the papers -, and what
is computed once it is folded and what is dead removed (realised). Only the last one is time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from widekernel.errors import ShapeError
from widekernel.layers import FoldedLargeKernel, LargeKernel
from widekernel.layers.notes import recall
from widekernel.layers.sources import SourceGroup, rects_of
from widekernel.sparsity.semi_structured import SemiStructured, convert
from widekernel.transforms.compaction import compact
from widekernel.transforms.fold import fold

aten = torch.ops.aten
_LAYERS = (aten.convolution, aten.addmm, aten.mm, aten.bmm, torch.ops.widekernel.depthwise_sum)


@dataclass(frozen=True)
class Cost:
    """What one form of a network costs for one image.

    Attributes:
        params: elements of all parameters.
        macs: multiply-accumulates of convolutions and linear layers; taps on padding count.
        activations: elements put out by convolutions and linear layers.
    """

    params: int
    macs: int
    activations: int


@dataclass(frozen=True)
class Complexity:
    """Cost of a network in its training form, without its zeros, folded, and as it is executed in the end.

    Attributes:
        input_size: (channels, height, width) of the image.
        training: as it is executed here; the dense size.
        folded: after `fold`.
        published_macs: of the training form as the authors' code executes it. Differs where tiles are convolved one by
            one there, while here they are put together to a strip first.
        nonzero: of the training form, without what a zero weight of a convolution, linear layer or large kernel costs.
            Vectors (biases, norms, layer scales) count in full.
        realised: after `widekernel.sparsity.compact`; scattered zeros save nothing there.
    """

    input_size: tuple[int, int, int]
    training: Cost
    folded: Cost
    published_macs: int
    nonzero: Cost
    realised: Cost

    @property
    def dense(self) -> Cost:
        """Another name of `training`."""
        return self.training

    def rows(self) -> list[tuple[str, int, int, int]]:
        """List (form, parameters, multiply-accumulates, activations) of the training and of the folded form."""
        return [
            ("training", self.training.params, self.training.macs, self.training.activations),
            ("folded", self.folded.params, self.folded.macs, self.folded.activations),
        ]

    def columns(self) -> dict[str, Cost]:
        """Give the costs by the name of their column."""
        return {"dense": self.training, "non-zero": self.nonzero, "folded": self.folded, "realised": self.realised}

    def to_dict(self) -> dict[str, Any]:
        """Give the JSON form."""
        costs = {name.replace("-", ""): asdict(cost) for name, cost in self.columns().items()}
        return {"input_size": list(self.input_size), "published_macs": self.published_macs, **costs}


def complexity(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> Complexity:
    """Count what `model` costs for one image, in evaluation. Nothing is computed and the model stays as it is.

    Args:
        model: the network, in its training form. Its zeros are those of its weights, so that a mask has to be applied; a
            network without weights (meta device) counts as one without zeros. Learned 2:4 masks are applied first.
            Non-zero multiply-accumulates are those of two-dimensional convolutions, linear layers and large kernels that
            are called as modules; whatever else multiplies counts in full there, though its parameters are counted.
        input_size: (channels, height, width).

    Raises:
        ShapeError: if the network cannot take such an image.
    """
    if len(input_size) != 3 or min(input_size) < 1:
        raise ShapeError(f"input_size {tuple(input_size)} must be three positive numbers: channels, height, width")
    size = (input_size[0], input_size[1], input_size[2])
    record = recall(model)
    if isinstance(record, SemiStructured) and record.is_learned:
        model = convert(model)  # whose logits are no part of it
    training, extra = _cost(model, size)
    folded, _ = _cost(fold(_without_data(model)), size)
    zero_weights = sum(parameter.numel() - _nonzero(parameter) for parameter in _weights(model))
    nonzero = Cost(training.params - zero_weights, training.macs - extra.zeros, training.activations)
    realised = _cost(compact(model), size)[0] if _has_dead_parts(model) else folded
    return Complexity(size, training, folded, training.macs + extra.published, nonzero, realised)


@dataclass
class _Extra:
    """What the counter cannot know of a forward pass: multiply-accumulates beside those that it counts.

    Attributes:
        published: by how many the authors' execution has more.
        zeros: how many have a zero weight.
    """

    published: int = 0
    zeros: int = 0


def _without_data(model: nn.Module) -> nn.Module:
    """Copy a network without copying its weights."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    memo.update((id(buffer), buffer.to("meta")) for buffer in model.buffers())
    return copy.deepcopy(model, memo)


def _cost(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[Cost, _Extra]:
    """Count, and say what the counter does not know."""
    modes = [(module, module.training) for module in model.modules()]
    extra = _Extra()
    hooks = [module.register_forward_hook(_noting(extra, module)) for module in model.modules() if _holds_weights(module)]
    meta = {key: value.to("meta") for key, value in (*model.named_parameters(), *model.named_buffers())}
    image = torch.empty(1, *input_size, device="meta", dtype=_dtype(model))
    try:
        model.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _Activations() as activations:
            torch.func.functional_call(model, meta, (image,))
    finally:
        for module, mode in modes:
            module.training = mode
        for hook in hooks:
            hook.remove()
    params = sum(parameter.numel() for parameter in model.parameters())
    return Cost(params, counter.get_total_flops() // 2, activations.total), extra


def _noting(extra: _Extra, module: nn.Module) -> Any:
    """Give a hook that adds to `extra`; zeros are counted now, because a counted pass runs on weights without data."""
    zeros = _zeros(module)

    def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(layer, LargeKernel):
            extra.published += _difference(layer, args[0])
        if zeros:
            channels = out.shape[-1] if isinstance(layer, nn.Linear) else out.shape[1]
            extra.zeros += zeros * (out.numel() // channels)

    return hook


def _holds_weights(module: nn.Module) -> bool:
    return isinstance(module, (LargeKernel, FoldedLargeKernel, nn.Conv2d, nn.Linear))


@torch.no_grad()
def _zeros(module: nn.Module) -> int:
    """Count the zeros among the weights that a layer multiplies with at every pixel of its output."""
    if isinstance(module, LargeKernel):
        weights = _multiplied(module.source)
    else:
        weights = list(module.kernels) if isinstance(module, FoldedLargeKernel) else [module.weight]  # type: ignore[list-item]
    return sum(weight.numel() - _nonzero(weight) for weight in weights)


def _multiplied(source: nn.Module) -> list[Tensor]:
    """List the kernels that a source convolves with; one that has no rectangles convolves with its tiles once a branch."""
    if isinstance(source, SourceGroup):
        return [kernel for part in source.sources for kernel in _multiplied(part)]
    rects = rects_of(source)
    if rects is not None:
        return [rect.kernel for rect in rects]
    return [weight for weight in _weights(source) for _ in range(source.num_branches)]  # type: ignore[arg-type]


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.dim() > 1]


def _nonzero(weight: Tensor) -> int:
    return weight.numel() if weight.is_meta else int(weight.detach().count_nonzero())


def _has_dead_parts(model: nn.Module) -> bool:
    """Whether a factor is zero anywhere; if none is, there is nothing to compact, and no need for a copy of the weights."""
    named = list(model.named_parameters())
    if any(parameter.is_meta for _, parameter in named):
        return False
    return any(_nonzero(p) < p.numel() for name, p in named if p.dim() > 1 or not name.endswith("bias"))


def _difference(layer: LargeKernel, x: Tensor) -> int:
    height, width = x.shape[-2:]
    rects = rects_of(layer.source)
    if rects is None:
        return 0
    realised = sum(rect.kernel.numel() for rect in rects) * height * width
    return layer.source.published_macs(height, width) - realised


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)


class _Activations(TorchDispatchMode):
    """Adds up the sizes of what convolutions and linear layers put out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in _LAYERS and isinstance(out, Tensor):
            self.total += out.numel()
        return out
