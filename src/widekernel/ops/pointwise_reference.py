"""The definition of blocks of products over channels or patches, and of gates, in plain PyTorch: the oracle of tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.ops.patch import NormAfter, Patch

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def rounded(x: Tensor, precision: str) -> Tensor:
    """Return the factors of products in `precision`: x itself, or rounded to bfloat16, where subnormal numbers are zero."""
    if precision == "float32":
        return x
    return torch.where(x.abs() < torch.finfo(torch.bfloat16).tiny, 0.0, x.bfloat16().to(x.dtype))


def weights_in_int8(weight: Tensor) -> Tensor:
    """Return the numbers that weights (O, ...) stand for in int8: n · scale with a whole n from -127 to 127.

    The scale of an output is the largest absolute value of its weights, divided by 127.
    """
    rows = weight.flatten(1)
    scale = _scale(rows.abs().amax(1, keepdim=True) / 127)
    return (_divided(rows, scale).round() * scale).view_as(weight)


def pixels_in_int8(x: Tensor) -> Tensor:
    """Return the numbers that channels (..., C) stand for in int8: scale · (n - zero) with a whole n from 0 to 255.

    The range of the channels of a pixel, and 0, has 255 steps of the size `scale`; `zero` is a whole number, so 0 is exact.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = _scale((high - low) / 255)
    zero = _divided(-low, scale).round()
    return ((_divided(x, scale) + zero).round().clamp(0, 255) - zero) * scale


def units_in_int8(x: Tensor) -> Tensor:
    """Return the numbers that hidden units (..., H) stand for in int8: chunks of them are scaled like pixels.

    The chunks are equal ones of up to 512 units that are multiples of 64, as few as possible; the last one may be smaller.
    """
    units = x.shape[-1]
    chunks = math.ceil(units / 512)
    size = math.ceil(math.ceil(units / chunks) / 64) * 64
    return torch.cat([pixels_in_int8(chunk) for chunk in x.split(size, -1)], -1)


def _scale(scale: Tensor) -> Tensor:
    """Replace negligible scales by 0 and infinite ones by NaN."""
    return torch.where(scale < 1e-30, 0.0, torch.where(scale.isfinite(), scale, torch.nan))


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, x / scale)


class ReferenceBlock:
    """y = residual + second · response(act(after(first · norm(x · gate(x)) + first_bias))) + second_bias, for every pixel.

    With a patch, `first` acts on the patches of norm(x · gate(x)): it is a convolution.

    Args:
        first: (H, C); with a patch, (H, C, rows, columns).
        first_bias: (H,), or None for none.
        activation: a key of `ACTIVATIONS`.
        second: (O, H), or None for none; then y = residual + act(first · norm(x) + first_bias).
        second_bias: (O,), or None for none.
        norm_eps: epsilon of a layer norm over the channels of x, without affine parameters; None for no norm.
        patch: the patches of images; None if every pixel is computed alone.
        after: a layer norm over the results of the first product; None for none.
        response: (H,), the weight of a response norm of hidden units (`response_norm`); None for none.
        response_eps: its epsilon.
        gate: the arguments of `gate` after `x`; None for no gate.
        precision: type of the factors of both products, `float32`, `bfloat16` or `int8`; everything else has the type of x.
            Tensors in float64 stand for float32 in exact arithmetic.
    """

    def __init__(
        self,
        first: Tensor,
        first_bias: Tensor | None,
        activation: str,
        second: Tensor | None,
        second_bias: Tensor | None,
        norm_eps: float | None,
        patch: Patch | None = None,
        after: NormAfter | None = None,
        response: Tensor | None = None,
        response_eps: float = 1e-6,
        gate: tuple[Any, ...] | None = None,
        precision: str = "float32",
    ) -> None:
        self.first, self.first_bias = first, first_bias
        self.activation = activation
        self.second, self.second_bias = second, second_bias
        self.norm_eps = norm_eps
        self.patch, self.after = patch, after
        self.response, self.response_eps = response, response_eps
        self.gate = gate
        self.precision = precision

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) -> (N, O, H', W'), or rows (R, C) -> (R, O); `residual` has the shape of the result.

        Patches and gates need images. For a response norm, rows count as the pixels of one image.
        """
        if self.gate is not None:
            x = x * gate(x, *self.gate)[:, :, None, None]
        y = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        if self.norm_eps is not None:
            y = F.layer_norm(y, y.shape[-1:], eps=self.norm_eps)
        y = self._first(y) if self.patch is None else self._convolution(y, self.patch)
        if self.after is not None:
            y = F.layer_norm(y, y.shape[-1:], self.after.scale, self.after.shift, self.after.eps)
        y = ACTIVATIONS[self.activation](y)
        if self.response is not None:
            y = response_norm(y if x.dim() == 4 else y[None, None], self.response, self.response_eps).view_as(y)
        if self.second is not None:
            units = units_in_int8(y) if self.precision == "int8" else rounded(y, self.precision)
            y = F.linear(units, self._weights(self.second), self.second_bias)
        y = y.permute(0, 3, 1, 2) if x.dim() == 4 else y
        return y if residual is None else residual + y

    def _first(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., H); C may be the numbers of a patch."""
        factors = pixels_in_int8(x) if self.precision == "int8" else rounded(x, self.precision)
        return F.linear(factors, self._weights(self.first).flatten(1), self.first_bias)

    def _convolution(self, x: Tensor, patch: Patch) -> Tensor:
        """(N, H, W, C) -> (N, H', W', hidden units)."""
        images = x.permute(0, 3, 1, 2)
        patches = F.unfold(images, patch.kernel, padding=patch.padding, stride=patch.stride).transpose(1, 2)
        return self._first(patches).unflatten(1, patch.size(*images.shape[2:]))

    def _weights(self, weight: Tensor) -> Tensor:
        return weights_in_int8(weight) if self.precision == "int8" else rounded(weight, self.precision)


def response_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale every channel by 1 + weight · size / (mean of the sizes of all channels + eps).

    The size of a channel is its Euclidean norm over the pixels of an image. This is ConvNeXt V2's global response norm
    without a bias (Woo et al., CVPR 2023).

    Args:
        x: (N, H, W, C).
        weight: (C,).
        eps: epsilon.
    """
    sizes = x.square().sum((1, 2), keepdim=True).sqrt()
    return x * (1 + weight * sizes / (sizes.mean(-1, keepdim=True) + eps))


def gate(
    x: Tensor, first: Tensor, first_bias: Tensor | None, activation: str, second: Tensor, second_bias: Tensor | None
) -> Tensor:
    """Compute squeeze-excite's factors: sigmoid(second · act(first · mean + first_bias) + second_bias).

    The mean is that over the pixels of an image (Hu et al., Squeeze-and-Excitation Networks, CVPR 2018).

    Args:
        x: (N, C, H, W).
        first: (H, C).
        first_bias: (H,), or None for none.
        activation: a key of `ACTIVATIONS`.
        second: (C, H).
        second_bias: (C,), or None for none.

    Returns:
        (N, C).
    """
    hidden = ACTIVATIONS[activation](F.linear(x.mean((2, 3)), first, first_bias))
    return torch.sigmoid(F.linear(hidden, second, second_bias))
