"""Parameters, multiply-accumulates and activations of a network, counted by PyTorch's own counter without computing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from widekernel.errors import ShapeError
from widekernel.layers import LargeKernel
from widekernel.layers.sources import rects_of
from widekernel.transforms.fold import fold

aten = torch.ops.aten
_SUM = torch.ops.widekernel.depthwise_sum
_WEIGHT_GRAD = torch.ops.widekernel.depthwise_weight_grad
_LAYERS = (aten.convolution, aten.addmm, aten.mm, aten.bmm, _SUM)


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
    """Cost of a network in its training and in its folded form.

    Attributes:
        input_size: (channels, height, width) of the image.
        training: as it is executed here.
        folded: after `fold`.
        published_macs: of the training form as the authors' code executes it. Differs where tiles are convolved one by
            one there, while here they are put together to a strip first.
    """

    input_size: tuple[int, int, int]
    training: Cost
    folded: Cost
    published_macs: int

    def rows(self) -> list[tuple[str, int, int, int]]:
        """List (form, parameters, multiply-accumulates, activations)."""
        return [
            ("training", self.training.params, self.training.macs, self.training.activations),
            ("folded", self.folded.params, self.folded.macs, self.folded.activations),
        ]


def complexity(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> Complexity:
    """Count what `model` costs for one image, in evaluation. Nothing is computed and the model stays as it is.

    Args:
        model: the network, in its training form.
        input_size: (channels, height, width).

    Raises:
        ShapeError: if the network cannot take such an image.
    """
    if len(input_size) != 3 or min(input_size) < 1:
        raise ShapeError(f"input_size {tuple(input_size)} must be three positive numbers: channels, height, width")
    size = (input_size[0], input_size[1], input_size[2])
    training, difference = _cost(model, size)
    folded, _ = _cost(fold(_without_data(model)), size)
    return Complexity(size, training, folded, training.macs + difference)


def _without_data(model: nn.Module) -> nn.Module:
    """Copy a network without copying its weights."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    memo.update((id(buffer), buffer.to("meta")) for buffer in model.buffers())
    return copy.deepcopy(model, memo)


def _cost(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[Cost, int]:
    """Count, and say by how many multiply-accumulates the authors' execution differs."""
    modes = [(module, module.training) for module in model.modules()]
    differences: list[int] = []
    hooks = [
        module.register_forward_hook(lambda layer, args, _: differences.append(_difference(layer, args[0])))
        for module in model.modules()
        if isinstance(module, LargeKernel)
    ]
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
    return Cost(params, counter.get_total_flops() // 2, activations.total), sum(differences)


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


def _sum_flops(x: Any, kernels: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, _, height, width = x
    return 2 * batch * height * width * sum(torch.Size(kernel).numel() for kernel in kernels)


def _weight_grad_flops(x: Any, grad: Any, geometry: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * torch.Size(x).numel() * geometry[0] * geometry[1]


for _op, _formula in ((_SUM, _sum_flops), (_WEIGHT_GRAD, _weight_grad_flops)):
    if _op not in flop_registry:  # the registry refuses a second entry, as when a module is reloaded
        register_flop_formula(_op)(_formula)
