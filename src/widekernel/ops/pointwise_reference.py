"""The definition of a block of pointwise products, in plain PyTorch: slow, readable, and the oracle of tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """y = residual + second · act(first · norm(x) + first_bias) + second_bias, for every pixel.

    Args:
        first: (H, C).
        first_bias: (H,), or None for none.
        activation: a key of `ACTIVATIONS`.
        second: (O, H), or None for none; then y = residual + act(first · norm(x) + first_bias).
        second_bias: (O,), or None for none.
        norm_eps: epsilon of a layer norm over the channels of x, without affine parameters; None for no norm.
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
        precision: str = "float32",
    ) -> None:
        self.first, self.first_bias = first, first_bias
        self.activation = activation
        self.second, self.second_bias = second, second_bias
        self.norm_eps = norm_eps
        self.precision = precision

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) -> (N, O, H, W), or rows (R, C) -> (R, O); `residual` has the shape of the result."""
        y = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        if self.norm_eps is not None:
            y = F.layer_norm(y, y.shape[-1:], eps=self.norm_eps)
        y = ACTIVATIONS[self.activation](self._product(y, self.first, self.first_bias))
        if self.second is not None:
            y = self._product(y, self.second, self.second_bias)
        y = y.permute(0, 3, 1, 2) if x.dim() == 4 else y
        return y if residual is None else residual + y

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rounded(x, self.precision), rounded(weight, self.precision), bias)
