"""Decompositions of the operators into PyTorch's own, for exported programs that must run without widekernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from widekernel.ops import plain
from widekernel.ops.operators import split_kernels
from widekernel.ops.pointwise_grad import plain_pointwise_weight_grad
from widekernel.ops.registration import unflatten_anchors

_OPS = torch.ops.widekernel


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return a dict from each operator to the function that computes it with PyTorch's own operators.

    An exported program calls our operators, so `import widekernel` must come before its file is loaded. A decomposed one,
    `torch.export.export(...).run_decompositions(ops.decompositions())`, does not need widekernel: it consists of
    convolutions, which every converter, operation counter and quantizer supports, and runs without our kernels.
    """
    return {
        _OPS.depthwise_sum.default: _sum,
        _OPS.depthwise_sum_of_taps.default: _sum_of_taps,
        _OPS.depthwise_branches.default: _branches,
        _OPS.depthwise_sum_of_branches.default: _sum_of_branches,
        _OPS.depthwise_weight_grad.default: _weight_grad,
        _OPS.pointwise_weight_grad.default: plain_pointwise_weight_grad,
    }


def _sum(x: Tensor, kernels: Any, anchors: Sequence[int], bias: Any, scale: Any, relu: bool, *options: Any) -> Tensor:
    return plain.depthwise_sum(x, kernels, list(unflatten_anchors(anchors)), bias, scale, relu, _dilations(options))


def _sum_of_taps(x: Tensor, taps: Tensor, geometry: Sequence[int], *options: Any) -> Tensor:
    kernels = split_kernels(taps, list(zip(geometry[::4], geometry[1::4])))
    return plain.depthwise_sum(x, kernels, list(zip(geometry[2::4], geometry[3::4])), dilations=_dilations(options))


def _branches(x: Tensor, kernels: Any, anchors: Sequence[int], *options: Any) -> list[Tensor]:
    return plain.depthwise_branches(x, kernels, list(unflatten_anchors(anchors)), _dilations(options))


def _sum_of_branches(xs: Any, kernels: Any, anchors: Sequence[int], *options: Any) -> Tensor:
    total: Tensor | None = None
    dilations = _dilations(options) or [1] * len(kernels)
    for x, kernel, anchor, dilation in zip(xs, kernels, unflatten_anchors(anchors), dilations):
        part = plain.depthwise_sum(x, [kernel], [anchor], dilations=[dilation])
        total = part if total is None else total + part
    assert total is not None
    return total


def _weight_grad(x: Tensor, grad: Tensor, geometry: Sequence[int], *options: Any) -> Tensor:
    (dilation,) = _dilations(options) or [1]
    return plain.depthwise_weight_grad(x, grad, (geometry[0], geometry[1]), (geometry[2], geometry[3]), dilation)


def _dilations(options: Sequence[Any]) -> list[int] | None:
    """Return the dilations among the last arguments of an operator (backend, algorithm, dilations); None if all are 1."""
    return list(options[2]) if len(options) > 2 and options[2] else None


# PyTorch's ONNX exporter looks up unknown operators here.
for _operator, _function in decompositions().items():
    register_decomposition(_operator)(_function)
