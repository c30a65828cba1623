"""Folding affine maps per channel into convolutions and linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.layers.rebuilding import layer_like
from widekernel.layers.sides import sides


@torch.no_grad()
def fold_affine(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> Any:
    """Return a layer that computes scale · layer(x) + shift, per output channel.

    Args:
        layer: a convolution or linear layer.
        scale: (C_out,).
        shift: (C_out,).
    """
    weight = layer.weight.double() * scale.to(layer.weight.device).view(-1, *[1] * (layer.weight.dim() - 1))
    bias = shift.to(weight.device)
    if layer.bias is not None:
        bias = bias + layer.bias.double() * scale.to(weight.device)
    return layer_like(layer, weight, bias)


@torch.no_grad()
def fold_input_affine(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> Any:
    """Return a layer that computes layer(scale · x + shift), per input channel.

    Args:
        layer: a linear layer, or an ungrouped convolution without padding: the shift does not reach padded pixels.
        scale: (C_in,).
        shift: (C_in,).

    Raises:
        ArgumentError: if the convolution is grouped or pads its input.
    """
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or _pads(layer)):
        raise ArgumentError(f"a norm cannot be folded into the input of {layer}: it must be ungrouped and without padding")
    per_input = [1, -1, *[1] * (layer.weight.dim() - 2)]
    scale, shift = scale.to(layer.weight.device), shift.to(layer.weight.device)
    weight = layer.weight.double()
    bias = (weight * shift.view(per_input)).flatten(1).sum(1)
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    return layer_like(layer, weight * scale.view(per_input), bias)


def _pads(conv: nn.Conv2d) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding == "same" and any(size > 1 for size in conv.kernel_size)
    return sides(conv.padding) != (0, 0)
