"""Finding the layers of a network that have an alternative implementation, and reasons to leave some of them alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from widekernel.layers import DepthwiseConv2d, NativeBatchNorm2d, PointwiseConv2d, PointwiseGradConv2d, PointwiseLinear
from widekernel.layers.alterations import replaced_method
from widekernel.layers.batch_norm import reasons_against_native
from widekernel.layers.conv import reasons_against_depthwise
from widekernel.layers.pointwise import reasons_against_pointwise

ACCELERATED = (DepthwiseConv2d, PointwiseConv2d, PointwiseGradConv2d, PointwiseLinear, NativeBatchNorm2d)
_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {PointwiseLinear: nn.Linear, NativeBatchNorm2d: nn.BatchNorm2d}


@dataclass(frozen=True)
class Candidate:
    """A depthwise or pointwise layer, or a batch norm in training.

    Attributes:
        name: its name in the network, the first one if it has several.
        layer: the layer itself.
        replacement: class of the alternative implementation; None if the layer must be left alone.
        reason: why the layer must be left alone.
    """

    name: str
    layer: Any
    replacement: type[nn.Module] | None
    reason: str = ""

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a linear layer or a 1x1 convolution."""
        return self.replacement in (PointwiseConv2d, PointwiseGradConv2d, PointwiseLinear)

    def others(self, trains: bool) -> list[Candidate]:
        """Return the candidates for the same layer with other implementations, which may be faster than this one.

        Args:
            trains: whether the backward pass counts.
        """
        return [replace(self, replacement=PointwiseGradConv2d)] if trains and self.replacement is PointwiseConv2d else []


def candidates(model: nn.Module, pointwise: bool) -> list[Candidate]:
    """List the depthwise layers, the batch norms that are trained and, with `pointwise`, the pointwise layers.

    Layers that are used repeatedly appear once.
    """
    found = []
    for name, module in model.named_modules():
        replacement = _replacement(module)
        if replacement is None or (replacement not in (DepthwiseConv2d, NativeBatchNorm2d) and not pointwise):
            continue
        reason = reason_against(module, replacement)
        found.append(Candidate(name, module, None if reason else replacement, reason))
    return found


def trains(layer: nn.Module) -> bool:
    """Return whether a layer runs in training, now that the caller accelerates it: with its backward pass."""
    return layer.training and torch.is_grad_enabled()


def describe(layer: Any) -> str:
    """Return a short description of a layer: class, sizes and channels."""
    kind = type(layer).__name__
    if isinstance(layer, nn.Linear):
        return f"{kind} {layer.in_features} -> {layer.out_features}"
    if isinstance(layer, nn.BatchNorm2d):
        return f"{kind}, {layer.num_features} channels"
    size = "x".join(str(number) for number in layer.kernel_size)
    if layer.groups == layer.in_channels == layer.out_channels:
        return f"{kind} {size} depthwise, {layer.in_channels} channels"
    depthwise = " depthwise," if layer.groups > 1 else ""
    return f"{kind} {size}{depthwise} {layer.in_channels} -> {layer.out_channels}"


def _replacement(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of the alternative implementation of a layer like `module`, if there is one."""
    if isinstance(module, nn.Linear):
        return PointwiseLinear
    if isinstance(module, nn.BatchNorm2d) and trains(module):
        return NativeBatchNorm2d
    if not isinstance(module, nn.Conv2d):
        return None
    # With one input channel, a convolution is depthwise only if it also has one output channel; otherwise it is ordinary.
    if module.groups == module.in_channels and (module.groups > 1 or module.out_channels == 1):
        return DepthwiseConv2d
    if module.groups == 1 and tuple(module.kernel_size) == (1, 1):
        return PointwiseConv2d
    return DepthwiseConv2d if isinstance(module, DepthwiseConv2d) else None


def reason_against(module: Any, replacement: type[nn.Module]) -> str:
    """Return why a layer must be left alone; "" if nothing prevents the alternative implementation."""
    kind = type(module)
    expected = _ORIGINALS.get(replacement, nn.Conv2d)
    if isinstance(module, ACCELERATED):
        return "; ".join(["accelerated already", *getattr(module, "reasons_against", list)()])
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        return "its parameters do not exist yet: run the network once first"
    if is_parametrized(module):
        return "its weights are parametrized, which gives it a class of its own"
    if kind is not expected:
        return f"{kind.__module__}.{kind.__qualname__} is a subclass of nn.{expected.__name__}: it may do something else"
    if replaced_method(module):
        return f"its {replaced_method(module)} has been replaced"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it is compiled: accelerate before compiling"
    if replacement is NativeBatchNorm2d:
        return "; ".join(reasons_against_native(module))
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.layout != torch.strided:
        return f"its weight is not a plain tensor but {type(getattr(weight, 'data', weight)).__name__}"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not a floating-point type"
    if replacement is DepthwiseConv2d:
        return "; ".join(reasons_against_depthwise(module))
    if replacement in (PointwiseConv2d, PointwiseGradConv2d) and reasons_against_pointwise(module):
        return "; ".join(reasons_against_pointwise(module))
    if weight.device.type != "cpu":
        return f"it is on {weight.device}; pointwise layers have an alternative implementation only on the CPU"
    return ""
