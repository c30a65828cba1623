"""The operators on the GPU kernels: layouts and strides, empty problems, determinism, and a layer that is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES, registered, several
from tests.ops.cases import EMPTY, Case, definition
from tests.ops.gpu.helpers import DEVICE, assert_exact, draw
from tests.ops.gpu.operator_cases import (
    BOTH_LAYOUTS,
    CONTIGUOUS,
    CROSS,
    LARGE,
    NHWC,
    OPERATORS,
    SMALL,
    WEIGHT_GRAD,
    arguments,
    assert_near,
    ours,
)
from tests.ops.test_registration import AMBIGUOUS, flat
from widekernel import ops
from widekernel.layers import LargeKernel, Rectangles
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.problem import Problem, memory_format

TRITON = TritonBackend()

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("no_tuned_table")]


def strides(case: Case, x: Tensor, kernels: list[Tensor]) -> list[tuple]:
    """Return shape, type and strides of the output of every operator."""
    y = ops.depthwise_sum(x, kernels, case.anchors, backend="triton")
    w = ops.depthwise_weight_grad(x, x, kernels[0].shape[2:], case.anchors[0], backend="triton")
    ys = OPERATORS.depthwise_branches(x, kernels, flat(case.anchors), "triton", "")
    total = OPERATORS.depthwise_sum_of_branches([x] * len(kernels), kernels, flat(case.anchors), "triton", "")
    return [(t.shape, t.dtype, t.stride()) for t in (y, w, *ys, total)]


def check_strides(case: Case, x: Tensor, kernels: list[Tensor]) -> None:
    mode = FakeTensorMode()
    fake = [mode.from_tensor(t) for t in (x, *kernels)]
    with mode:
        promised = strides(case, fake[0], fake[1:])
    assert strides(case, x, kernels) == promised


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", [CROSS, SMALL, *map(several, EMPTY)], ids=str)
def test_strides_equal_those_of_fake_tensors(case: Case, layout: torch.memory_format) -> None:
    check_strides(case, *draw(case, torch.float32, layout))


@pytest.mark.parametrize("kernel", [(3, 3), (2, 11), (11, 2)], ids=["3x3", "2x11", "11x2"])
@pytest.mark.parametrize("stored", AMBIGUOUS)
def test_strides_where_dimensions_are_one(stored: str, kernel: tuple[int, int]) -> None:
    of = AMBIGUOUS[stored]
    x = torch.empty_strided(of.shape, of.stride(), device=DEVICE).copy_(of)
    case = Case(stored, tuple(x.shape), ((*kernel, (0, kernel[1] - 1)), (2, 2, None)))
    _, kernels = draw(case, torch.float32)
    check_strides(case, x, kernels)
    assert_exact(
        ops.depthwise_sum(x, kernels, case.anchors, backend="triton"), definition(*map(_doubles, (x, kernels)), case.anchors)
    )


def _doubles(tensors: Any) -> Any:
    return tensors.double() if isinstance(tensors, Tensor) else [t.double() for t in tensors]


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_nothing_to_compute(case: Case, layout: torch.memory_format) -> None:
    inputs = arguments(case, torch.float32, layout)
    y = ours(case, *inputs)
    got = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert [g.shape for g in got] == [t.shape for t in inputs]
    assert not any(g.count_nonzero() for g in got)


@pytest.mark.parametrize(("case", "layout"), [(LARGE, CONTIGUOUS), (SMALL, NHWC)], ids=str)
def test_two_steps_are_bitwise_equal(case: Case, layout: torch.memory_format) -> None:
    inputs = arguments(case, torch.float32, layout)
    steps = []
    for _ in range(2):
        y = ours(case, *inputs)
        steps.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    assert all(map(torch.equal, *steps))


# ---- A layer


class Preferred(ops.Backend):
    """The Triton backend under another name, in front of all the others, on whatever device it can run."""

    name = "preferred"
    operators, calls_pytorch = TRITON.operators, TRITON.calls_pytorch

    def reasons_against(self, problem: Problem) -> list[str]:
        return [] if TRITON.can_run(problem) else TRITON.reasons_against(problem)

    def prepare(self, problem: Problem) -> Any:
        return TRITON.prepare(problem)


@BOTH_LAYOUTS
def test_a_layer_trained_for_a_step(layout: torch.memory_format) -> None:
    def step(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(4)
        source = Rectangles(3, [(13, 3), (3, 13), (3, 3)])
        layer = LargeKernel(source, [nn.BatchNorm2d(3) for _ in range(3)], identity=True).to(DEVICE, dtype)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        x = torch.randn(2, 3, 7, 6, dtype=torch.float64).to(DEVICE, dtype).contiguous(memory_format=layout).requires_grad_()
        y = layer(x)
        y.sin().square().sum().backward()
        optimizer.step()
        assert memory_format(y) == layout
        return [y.detach(), x.grad, *(p.detach() for p in layer.parameters())]

    want = step(torch.float64)
    with registered(Preferred()), ops.trace() as trace:
        got = step(torch.float32)
    calls = sorted((name, problem.op) for name, problem in trace.calls)
    fused = sorted(("preferred", op) for op in [BRANCHES, SUM_OF_BRANCHES, *[WEIGHT_GRAD] * 3])
    # The input gradient of three branches is the sum of branches; each kernel has a gradient of its own.
    assert calls == fused
    for mine, truth in zip(got, want):
        assert_near(mine, truth)
