"""Packing of weights for the native calls of fused blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from widekernel.ops.cpu.depthwise_conv import PackedDepthwiseConv
from widekernel.ops.cpu.gate import Gate
from widekernel.ops.cpu.pointwise import PackedBlock, reason_against
from widekernel.transforms.acceleration.fusion.weights import BlockWeights, DepthwiseWeights


def missing(precision: str = "float32") -> str | None:
    """Return why there are no native calls of this precision on this machine; None if there are."""
    return reason_against(precision)


def pack(weights: BlockWeights | DepthwiseWeights, precision: str = "float32") -> Callable[..., Tensor]:
    """Return a function that computes the products of these weights as `ReferenceBlock` does, with its gate's factors.

    A depthwise convolution is float32 in every precision.
    """
    if isinstance(weights, DepthwiseWeights):
        conv = PackedDepthwiseConv(*weights)
        return lambda x, residual=None: conv(x)
    block = PackedBlock(*weights[:-1], precision=precision)
    if weights.gate is None:
        return block
    gate = Gate(*weights.gate)
    return lambda x, residual=None: block(x, residual, gate(x))
