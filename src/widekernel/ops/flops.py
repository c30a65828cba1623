"""FLOP formulas of the operators for `torch.utils.flop_counter`: two operations per tap and pixel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from widekernel.ops import operators  # noqa: F401 - it defines what is counted

_OPS = torch.ops.widekernel


def _of_sum(x: Any, kernels: Any, *others: Any, **named: Any) -> int:
    batch, _, height, width = x
    return 2 * batch * height * width * sum(math.prod(kernel) for kernel in kernels)


def _of_sum_of_branches(xs: Any, kernels: Any, *others: Any, **named: Any) -> int:
    return sum(_of_sum(x, [kernel]) for x, kernel in zip(xs, kernels))


def _of_sum_of_taps(x: Any, taps: Any, *others: Any, **named: Any) -> int:
    return _of_sum(x, [taps])


def _of_weight_grad(x: Any, grad: Any, geometry: Any, *others: Any, **named: Any) -> int:
    return 2 * math.prod(x) * geometry[0] * geometry[1]


for _operator, _formula in (
    (_OPS.depthwise_sum, _of_sum),
    (_OPS.depthwise_sum_of_taps, _of_sum_of_taps),
    (_OPS.depthwise_branches, _of_sum),
    (_OPS.depthwise_sum_of_branches, _of_sum_of_branches),
    (_OPS.depthwise_weight_grad, _of_weight_grad),
):
    if _operator not in flop_registry:  # the registry refuses a second entry, as when a module is reloaded
        register_flop_formula(_operator)(_formula)
