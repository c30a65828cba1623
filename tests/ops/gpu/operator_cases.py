"""Cases, inputs and comparisons for tests of the operators on the GPU kernels from end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cases import Case, definition, relative_error
from tests.ops.gpu.helpers import draw
from widekernel import ops
from widekernel.ops import call_trace

SUM, WEIGHT_GRAD = "depthwise_sum", "depthwise_weight_grad"
OPERATORS = torch.ops.widekernel
CONTIGUOUS, NHWC = torch.contiguous_format, torch.channels_last
BOTH_LAYOUTS = pytest.mark.parametrize("layout", [CONTIGUOUS, NHWC], ids=["contiguous", "channels_last"])
# Relative error allowed for float32 results of several operator calls.
SEVERAL_CALLS = 2e-5

CROSS = Case("cross", (2, 3, 7, 6), ((11, 3, None), (3, 7, None), (2, 3, (1, 0))))
SMALL = Case("small", (2, 3, 4, 5), ((3, 3, None),))
LARGE = Case("large", (2, 3, 7, 6), ((9, 11, (3, 8)),))
# Too many pixels for a single product, so that banded products are used.
BANDS = Case("bands", (2, 2, 9, 15), ((3, 11, None), (5, 2, None)))
CASES = [
    CROSS,
    SMALL,
    LARGE,
    BANDS,
    Case("tall-and-narrow", (2, 2, 33, 4), ((5, 11, None),)),
    Case("one-row", (2, 3, 1, 6), ((3, 3, None),)),
    Case("few-columns", (2, 3, 4, 3), ((3, 3, None),)),
]

# One of each kernel for sums.
PATHS = pytest.mark.parametrize(
    ("case", "layout"),
    [(LARGE, CONTIGUOUS), (BANDS, CONTIGUOUS), (SMALL, CONTIGUOUS), (SMALL, NHWC)],
    ids=["large", "bands", "small", "small-channels_last"],
)


def arguments(case: Case, dtype: torch.dtype = torch.float32, layout: torch.memory_format = CONTIGUOUS) -> list[Tensor]:
    """Return x, the kernels and a bias, all requiring gradients."""
    x, kernels = draw(case, dtype, layout)
    bias = torch.randn(x.shape[1], dtype=torch.float64).to(x)
    return [t.requires_grad_() for t in (x, *kernels, bias)]


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def ours(case: Case, *inputs: Tensor) -> Tensor:
    return ops.depthwise_sum(inputs[0], inputs[1:-1], case.anchors, inputs[-1], backend="triton")


def theirs(case: Case, *inputs: Tensor) -> Tensor:
    return definition(inputs[0], inputs[1:-1], case.anchors, inputs[-1])


def ours_branched(case: Case, x: Tensor, *kernels: Tensor) -> list[Tensor]:
    return ops.depthwise_branches(x, kernels, case.anchors, backend="triton")


def theirs_branched(case: Case, x: Tensor, *kernels: Tensor) -> list[Tensor]:
    return [definition(x, [kernel], [anchor]) for kernel, anchor in zip(kernels, case.anchors)]


def assert_near(got: Tensor, want: Tensor) -> None:
    error = relative_error(got.cpu(), want.cpu())
    assert error <= SEVERAL_CALLS, f"relative error {error:.3g}"


def ran(trace: call_trace.Trace) -> list[str]:
    """Return the operators that ran, after checking that all of them ran on the kernels under test."""
    assert set(trace.backends()) == {"triton"}
    return sorted(problem.op for _, problem in trace.calls)


@dataclass(frozen=True)
class Form:
    """One of the two operators, ours and its definition, as functions from (x, kernels...) to one tensor."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]

    def __str__(self) -> str:
        return self.name

    def inputs(self) -> list[Tensor]:
        inputs = arguments(CROSS)
        return inputs if self.name == "sum" else inputs[:-1]


def mixed(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Combine the outputs of an operator into one tensor, in which every branch plays a different part."""

    def run(*inputs: Tensor) -> Tensor:
        y = function(CROSS, *inputs)
        return y.sin() if isinstance(y, Tensor) else y[0].sin() + y[1].cos() * y[2]

    return run


FORMS = [
    Form("sum", mixed(ours), mixed(theirs)),
    Form("branches", mixed(ours_branched), mixed(theirs_branched)),
]
BOTH_FORMS = pytest.mark.parametrize("form", FORMS, ids=str)


def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a scalar function whose second derivatives do not vanish."""

    def run(*inputs: Tensor) -> Tensor:
        y = function(*inputs)
        return (y.sin() * torch.linspace(1, 2, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)).sum()

    return run
