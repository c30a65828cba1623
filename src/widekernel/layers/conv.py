"""Convolutions: a drop-in depthwise one on our operator, and convolution with batch norm that folds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.layers.alterations import alterations
from widekernel.layers.folding import Fusable, is_trained
from widekernel.layers.norms import affine_of, is_foldable
from widekernel.layers.pointwise import PointwiseConv2d, PointwiseLinear


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` that runs depthwise, stride 1, same-size convolutions on `ops.depthwise_sum`.

    Takes the constructor of `nn.Conv2d` and has its state dict, so it replaces one anywhere. What the operator does not
    cover (strides, dilation, other paddings, several filters a channel) it computes as `nn.Conv2d` does; `reasons_against`
    says which applies.
    """

    def reasons_against(self) -> list[str]:
        """List what keeps this layer off the operator; empty if it runs there."""
        return reasons_against_depthwise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) -> the same as `nn.Conv2d`."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._computed(x)

    @torch.jit.unused
    def _computed(self, x: Tensor) -> Tensor:
        # Looked up at every call, because code that adapts networks sets strides and paddings of existing layers.
        if x.dim() not in (3, 4) or not x.dtype.is_floating_point or self.reasons_against():
            return super().forward(x)
        batched = x if x.dim() == 4 else x.unsqueeze(0)
        # With padding="same" PyTorch puts the odd pixel of an even kernel to the right and below.
        anchor = (self.kernel_size[0] - 1) // 2, (self.kernel_size[1] - 1) // 2
        y = ops.depthwise_sum(batched, [self.weight], [anchor], self.bias)
        return y if x.dim() == 4 else y.squeeze(0)


def reasons_against_depthwise(conv: nn.Conv2d) -> list[str]:
    """List what keeps a convolution off `ops.depthwise_sum`; empty if that computes it."""
    reasons = []
    if not conv.in_channels == conv.out_channels == conv.groups:
        reasons.append(f"not depthwise: {conv.in_channels} -> {conv.out_channels} channels, {conv.groups} groups")
    if tuple(conv.stride) != (1, 1):
        reasons.append(f"stride {tuple(conv.stride)} is not 1")
    if tuple(conv.dilation) != (1, 1):
        reasons.append(f"dilation {tuple(conv.dilation)} is not 1")
    if conv.padding_mode != "zeros":
        reasons.append(f"padding mode {conv.padding_mode!r} is not 'zeros'")
    if not _keeps_size(conv):
        reasons.append(f"padding {conv.padding} changes the size with a {tuple(conv.kernel_size)} kernel")
    return reasons


class ConvNorm(Fusable, nn.Module):
    """Convolution, batch norm and activation; the convolution has a bias only once the norm is folded into it.

    Args:
        conv: the convolution.
        bn: the normalisation after it.
        act: the activation after that, by default none.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return self.act(self.bn(self.conv(x)))

    def foldable(self) -> bool:
        """Whether the norm is an affine map in evaluation, and the convolution a plain one; neither with hooks."""
        return is_foldable(self.bn) and is_plain(self.conv) and not alterations(self, ("", "conv"))

    def alterations(self) -> list[str]:
        """List hooks and replaced methods that keep a norm from being folded; empty without a norm."""
        return [] if type(self.bn) is nn.Identity else alterations(self, ("", "conv", "bn"))

    def folded(self, before: nn.Module | None = None) -> ConvNorm:
        """Give the layer with the norm folded into the convolution.

        Args:
            before: a batch norm whose output the layer takes, folded in too; only where the convolution pads nothing,
                because the shift of that norm does not reach padded pixels.
        """
        conv = fold_affine(self.conv, *affine_of(self.bn, self.conv.out_channels))
        if before is not None:
            conv = fold_affine_before(conv, *affine_of(before, self.conv.in_channels))
        conv.requires_grad_(is_trained(self.conv, self.bn, before))
        return ConvNorm(conv, nn.Identity(), self.act)


_CONVOLUTIONS = (nn.Conv2d, DepthwiseConv2d, PointwiseConv2d)
_LINEAR = (nn.Linear, PointwiseLinear)


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` computes what a convolution or linear layer with its weight and bias does, parametrised or not."""
    return type(layer).forward in {kind.forward for kind in (*_CONVOLUTIONS, *_LINEAR)}


@torch.no_grad()
def fold_affine(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> Any:
    """Give a layer that computes scale · layer(x) + shift, per output channel (both (C_out,))."""
    weight = layer.weight.double() * scale.to(layer.weight.device).view(-1, *[1] * (layer.weight.dim() - 1))
    bias = shift.to(weight.device)
    if layer.bias is not None:
        bias = bias + layer.bias.double() * scale.to(weight.device)
    return _rebuilt(layer, weight, bias)


@torch.no_grad()
def fold_affine_before(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> Any:
    """Give a layer that computes layer(scale · x + shift), per input channel (both (C_in,))."""
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or _pads(layer)):
        raise ArgumentError(f"a norm cannot be folded into the input of {layer}: it must be ungrouped and without padding")
    per_input = [1, -1, *[1] * (layer.weight.dim() - 2)]
    scale, shift = scale.to(layer.weight.device), shift.to(layer.weight.device)
    weight = layer.weight.double()
    bias = (weight * shift.view(per_input)).flatten(1).sum(1)
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    return _rebuilt(layer, weight * scale.view(per_input), bias)


def _keeps_size(conv: nn.Conv2d) -> bool:
    if conv.padding == "same":
        return True
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    return all(2 * pad == size - 1 for pad, size in zip(padding, conv.kernel_size))


def _pads(conv: nn.Conv2d) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding == "same" and any(size > 1 for size in conv.kernel_size)
    return any(pad != 0 for pad in conv.padding)


def _rebuilt(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> nn.Module:
    """Give a plain layer like `layer`, which may be parametrised, with other weights."""
    like = layer.weight
    new: nn.Module
    # The most special kind that it is, so that what was accelerated stays so.
    kind: Any = next(k for k in reversed((*_CONVOLUTIONS, *_LINEAR)) if isinstance(layer, k))
    # Made without data: the constructors would draw from the global random numbers.
    if isinstance(layer, nn.Linear):
        new = kind(layer.in_features, layer.out_features, device="meta")
    else:
        new = kind(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            device="meta",
        )
    new.weight = nn.Parameter(weight.to(like))
    new.bias = nn.Parameter(bias.to(like))
    return new.train(layer.training)
