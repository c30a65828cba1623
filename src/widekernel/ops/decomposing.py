"""What the operators are made of, for exported programs that are to run without widekernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from widekernel.ops import plain
from widekernel.ops.registration import pairs

_OPS = torch.ops.widekernel


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Give for every operator the function that computes it with PyTorch's own operators.

    An exported program holds calls of our operators, and the file that it is saved in needs `import widekernel` before it is
    loaded. Decomposed, it does not: `torch.export.export(...).run_decompositions(ops.decompositions())`. What is left are
    convolutions, which every converter, counter and quantiser knows, and which run without our kernels.
    """
    return {
        _OPS.depthwise_sum.default: _sum,
        _OPS.depthwise_sum_of_taps.default: _sum_of_taps,
        _OPS.depthwise_branches.default: _branches,
        _OPS.depthwise_sum_of_branches.default: _sum_of_branches,
        _OPS.depthwise_weight_grad.default: _weight_grad,
    }


def _sum(
    x: Tensor, kernels: Any, anchors: Sequence[int], bias: Any, scale: Any, relu: bool, backend: str, algorithm: str
) -> Tensor:
    return plain.depthwise_sum(x, kernels, pairs(anchors), bias, scale, relu)


def _sum_of_taps(x: Tensor, taps: Tensor, geometry: Sequence[int], backend: str, algorithm: str) -> Tensor:
    rects = list(zip(geometry[::4], geometry[1::4]))
    parts = taps.split([kh * kw for kh, kw in rects], 1)
    kernels = [part.reshape(taps.shape[0], 1, kh, kw) for part, (kh, kw) in zip(parts, rects)]
    return plain.depthwise_sum(x, kernels, list(zip(geometry[2::4], geometry[3::4])))


def _branches(x: Tensor, kernels: Any, anchors: Sequence[int], backend: str, algorithm: str) -> list[Tensor]:
    return plain.depthwise_branches(x, kernels, pairs(anchors))


def _sum_of_branches(xs: Any, kernels: Any, anchors: Sequence[int], backend: str, algorithm: str) -> Tensor:
    total: Tensor | None = None
    for x, kernel, anchor in zip(xs, kernels, pairs(anchors)):
        part = plain.depthwise_sum(x, [kernel], [anchor])
        total = part if total is None else total + part
    assert total is not None
    return total


def _weight_grad(x: Tensor, grad: Tensor, geometry: Sequence[int], backend: str, algorithm: str) -> Tensor:
    return plain.depthwise_weight_grad(x, grad, (geometry[0], geometry[1]), (geometry[2], geometry[3]))


# Where PyTorch's ONNX exporter looks for what it does not know.
for _operator, _function in decompositions().items():
    register_decomposition(_operator)(_function)
