"""The definition of blocks of products over channels or patches, and of gates, in plain PyTorch: the oracle of tests."""

from __future__ import annotations

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
        precision: type of the factors of both products, `float32` or `bfloat16`; everything else has the type of x. Tensors
            in float64 stand for float32 in exact arithmetic.
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
        y = self._product(y, self.first, self.first_bias) if self.patch is None else self._convolution(y, self.patch)
        if self.after is not None:
            y = F.layer_norm(y, y.shape[-1:], self.after.scale, self.after.shift, self.after.eps)
        y = ACTIVATIONS[self.activation](y)
        if self.response is not None:
            y = response_norm(y if x.dim() == 4 else y[None, None], self.response, self.response_eps).view_as(y)
        if self.second is not None:
            y = self._product(y, self.second, self.second_bias)
        y = y.permute(0, 3, 1, 2) if x.dim() == 4 else y
        return y if residual is None else residual + y

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rounded(x, self.precision), rounded(weight, self.precision), bias)

    def _convolution(self, x: Tensor, patch: Patch) -> Tensor:
        images, weight = rounded(x.permute(0, 3, 1, 2), self.precision), rounded(self.first, self.precision)
        return F.conv2d(images, weight, self.first_bias, patch.stride, patch.padding).permute(0, 2, 3, 1)


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
