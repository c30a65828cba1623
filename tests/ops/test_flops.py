"""Counts of the operators by PyTorch's own counter of operations, from the first call on."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from widekernel import ops

SHAPE, SIZES = (2, 3, 9, 8), [(5, 3), (3, 7)]
ANCHORS = [(2, 1), (1, 3)]
PIXELS, TAPS = 2 * 3 * 9 * 8, 5 * 3 + 3 * 7


def tensors() -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = torch.randn(SHAPE, requires_grad=True)
    return x, [torch.randn(3, 1, *size, requires_grad=True) for size in SIZES]


def count(function: object) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_forward_and_both_gradients_of_the_sum() -> None:
    x, kernels = tensors()
    with torch.no_grad():
        assert count(lambda: ops.depthwise_sum(x, kernels)) == 2 * PIXELS * TAPS
    assert count(lambda: ops.depthwise_sum(x, kernels).sum().backward()) == 3 * 2 * PIXELS * TAPS


def test_gaps_are_not_counted() -> None:
    x, kernels = tensors()
    assert count(lambda: ops.depthwise_sum(x, kernels, dilations=[2, 3]).sum().backward()) == 3 * 2 * PIXELS * TAPS
    assert count(lambda: ops.depthwise_weight_grad(x, x, (5, 3), dilation=4)) == 2 * PIXELS * 15


def test_the_branches() -> None:
    x, kernels = tensors()
    assert count(lambda: sum(ops.depthwise_branches(x, kernels)).sum().backward()) == 3 * 2 * PIXELS * TAPS


def test_operators_that_are_called_directly() -> None:
    x, kernels = (t.detach() if isinstance(t, torch.Tensor) else [k.detach() for k in t] for t in tensors())
    flat, geometry = [2, 1, 1, 3], [5, 3, 2, 1, 3, 7, 1, 3]
    taps = torch.cat([kernel.flatten(1) for kernel in kernels], 1)
    called = torch.ops.widekernel
    assert count(lambda: called.depthwise_branches(x, kernels, flat, "", "")) == 2 * PIXELS * TAPS
    assert count(lambda: called.depthwise_sum_of_branches([x, x], kernels, flat, "", "")) == 2 * PIXELS * TAPS
    assert count(lambda: called.depthwise_sum_of_taps(x, taps, geometry, "", "")) == 2 * PIXELS * TAPS
    assert count(lambda: ops.depthwise_weight_grad(x, x, (5, 3))) == 2 * PIXELS * 15
