"""Parameters, multiply-accumulates and activations of a network, counted by PyTorch's counter without running the network.

A sparse network has three sizes: with all its weights (dense); without the weights that are zero, as papers report it
(non-zero); and after folding and removing dead parts (realized). Only the last one saves time.
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

from widekernel.dense.counting import countable
from widekernel.deprecation import renamed_attribute
from widekernel.errors import ShapeError
from widekernel.layers import FoldedLargeKernel, LargeKernel
from widekernel.layers.dry_run import run_without_data
from widekernel.layers.notes import recall
from widekernel.layers.sources import SourceGroup, rects_of
from widekernel.layers.training_modes import training_modes_restored
from widekernel.sparsity.semi_structured import SemiStructured, convert
from widekernel.transforms.compaction import compact
from widekernel.transforms.fold import fold

aten = torch.ops.aten
_LAYERS = (aten.convolution, aten.addmm, aten.mm, aten.bmm, torch.ops.widekernel.depthwise_sum)


@dataclass(frozen=True)
class Cost:
    """Cost of one form of a network for one image.

    Attributes:
        params: number of elements of all parameters.
        macs: multiply-accumulates of convolutions and linear layers, including those with padding.
        activations: number of elements that convolutions and linear layers output.
    """

    params: int
    macs: int
    activations: int


@dataclass(frozen=True)
class Complexity:
    """Cost of a network in its training form, without its zeros, folded, and compacted.

    Attributes:
        input_size: (channels, height, width) of the image.
        training: cost of the training form as it is executed here: the dense size.
        folded: cost after `fold`.
        published_macs: multiply-accumulates of the training form as the authors' code executes it. They differ for tiles,
            which the authors' code convolves one by one, and which this library first assembles into strips.
        nonzero: cost of the training form without the zero weights of convolutions, linear layers and large kernels.
            Vectors (biases, norms, layer scales) count in full.
        realized: cost after `widekernel.transforms.compaction.compact`, where scattered zeros save nothing.
    """

    input_size: tuple[int, int, int]
    training: Cost
    folded: Cost
    published_macs: int
    nonzero: Cost
    realized: Cost

    realised = renamed_attribute("realised", "realized")

    @property
    def dense(self) -> Cost:
        """Cost of the training form: another name for `training`."""
        return self.training

    def rows(self) -> list[tuple[str, int, int, int]]:
        """Return (form, parameters, multiply-accumulates, activations) of the training and the folded form."""
        return [
            ("training", self.training.params, self.training.macs, self.training.activations),
            ("folded", self.folded.params, self.folded.macs, self.folded.activations),
        ]

    def columns(self) -> dict[str, Cost]:
        """Return the costs by the names of their columns."""
        return {"dense": self.training, "non-zero": self.nonzero, "folded": self.folded, "realized": self.realized}

    def to_dict(self) -> dict[str, Any]:
        """Return the costs as a dictionary for JSON."""
        costs = {name.replace("-", ""): asdict(cost) for name, cost in self.columns().items()}
        return {"input_size": list(self.input_size), "published_macs": self.published_macs, **costs}


def complexity(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> Complexity:
    """Count the cost of `model` for one image in evaluation mode.

    Nothing is computed, and the model is not changed. Zero weights save multiply-accumulates only in two-dimensional
    convolutions, linear layers and large kernels that are called as modules; other products count in full. Auxiliary heads,
    which only training uses, have parameters but do not run. Two-stage detectors run on 1,000 boxes per box head and on 100
    per mask head, without RoIAlign, as in published counts.

    Args:
        model: the network in its training form. Masks must be applied to its weights, except learned 2:4 masks, which this
            function applies. A network without data (meta device) counts as one without zeros.
        input_size: (channels, height, width) of the image.

    Raises:
        ShapeError: if the network cannot take such an image.
    """
    if len(input_size) != 3 or min(input_size) < 1:
        raise ShapeError(f"input_size {tuple(input_size)} must be three positive numbers: channels, height, width")
    size = (input_size[0], input_size[1], input_size[2])
    record = recall(model)
    if isinstance(record, SemiStructured) and record.is_learned:
        model = convert(model)  # the logits of the masks do not count
    model = countable(model)
    training, extra = _cost(model, size)
    folded, _ = _cost(fold(_without_data(model)), size)
    zero_weights = sum(parameter.numel() - _nonzero(parameter) for parameter in _weights(model))
    nonzero = Cost(training.params - zero_weights, training.macs - extra.zeros, training.activations)
    realized = _cost(compact(model), size)[0] if _has_dead_parts(model) else folded
    return Complexity(size, training, folded, training.macs + extra.published, nonzero, realized)


@dataclass
class _Uncounted:
    """Counts of multiply-accumulates of a forward pass that PyTorch's counter does not provide.

    Attributes:
        published: additional multiply-accumulates in the authors' execution.
        zeros: multiply-accumulates with a zero weight.
    """

    published: int = 0
    zeros: int = 0


def _without_data(model: nn.Module) -> nn.Module:
    """Copy a network to the meta device, without copying its weights."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    memo.update((id(buffer), buffer.to("meta")) for buffer in model.buffers())
    return copy.deepcopy(model, memo)


def _cost(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[Cost, _Uncounted]:
    """Count the cost of a network, and the multiply-accumulates that the counter does not provide."""
    extra = _Uncounted()
    hooks = [
        module.register_forward_hook(_counting_hook(extra, module)) for module in model.modules() if _holds_weights(module)
    ]
    try:
        with training_modes_restored(model):
            model.eval()
            with FlopCounterMode(display=False) as counter, _Activations() as activations:
                run_without_data(model, (1, *input_size))
    finally:
        for hook in hooks:
            hook.remove()
    params = sum(parameter.numel() for parameter in model.parameters())
    return Cost(params, counter.get_total_flops() // 2, activations.total), extra


def _counting_hook(extra: _Uncounted, module: nn.Module) -> Any:
    """Return a forward hook that adds to `extra`; zeros are counted now, because the pass itself has no data."""
    zeros = _zeros(module)

    def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(layer, LargeKernel):
            extra.published += _published_difference(layer, args[0])
        if zeros:
            channels = out.shape[-1] if isinstance(layer, nn.Linear) else out.shape[1]
            extra.zeros += zeros * (out.numel() // channels)

    return hook


def _holds_weights(module: nn.Module) -> bool:
    return isinstance(module, (LargeKernel, FoldedLargeKernel, nn.Conv2d, nn.Linear))


@torch.no_grad()
def _zeros(module: nn.Module) -> int:
    """Count the zeros among the weights that a layer uses at every output pixel."""
    if isinstance(module, LargeKernel):
        weights = _convolved_kernels(module.source)
    else:
        weights = list(module.kernels) if isinstance(module, FoldedLargeKernel) else [module.weight]  # type: ignore[list-item]
    return sum(weight.numel() - _nonzero(weight) for weight in weights)


def _convolved_kernels(source: nn.Module) -> list[Tensor]:
    """Return the kernels that a source convolves with: its rectangles or, if it has none, its tiles once per branch."""
    if isinstance(source, SourceGroup):
        return [kernel for part in source.sources for kernel in _convolved_kernels(part)]
    rects = rects_of(source)
    if rects is not None:
        return [rect.kernel for rect in rects]
    return [weight for weight in _weights(source) for _ in range(source.num_branches)]  # type: ignore[arg-type]


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.dim() > 1]


def _nonzero(weight: Tensor) -> int:
    return weight.numel() if weight.is_meta else int(weight.detach().count_nonzero())


def _has_dead_parts(model: nn.Module) -> bool:
    """Return whether any weight is zero; otherwise there is nothing to compact, and no need to copy the weights."""
    named = list(model.named_parameters())
    if any(parameter.is_meta for _, parameter in named):
        return False
    return any(_nonzero(p) < p.numel() for name, p in named if p.dim() > 1 or not name.endswith("bias"))


def _published_difference(layer: LargeKernel, x: Tensor) -> int:
    """Return the number of additional multiply-accumulates in the authors' execution of a layer."""
    height, width = x.shape[-2:]
    rects = rects_of(layer.source)
    if rects is None:
        return 0
    realized = sum(rect.kernel.numel() for rect in rects) * height * width
    return layer.source.published_macs(height, width) - realized


class _Activations(TorchDispatchMode):
    """Mode that adds up the sizes of the outputs of convolutions and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in _LAYERS and isinstance(out, Tensor):
            self.total += out.numel()
        return out
