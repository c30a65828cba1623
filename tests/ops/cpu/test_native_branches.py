"""Native kernels with gaps between their taps, and several branches in one call, against convolutions in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native import needs_native
from tests.ops.cases import LAYOUTS, relative_error
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.ops.backends.native import NativeBackend
from widekernel.ops.cpu import library
from widekernel.ops.cpu.plan import Pass, Piece, Plan
from widekernel.ops.cpu.prepared import PreparedSum, PreparedWeightGrad
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Problem,
    center_anchors,
    flipped,
    mirror_anchors,
)

pytestmark = needs_native

# UniRepLKNet's block of the largest kernel.
SIZES, DILATIONS = (13, 5, 7, 3, 3, 3), (1, 1, 2, 3, 4, 5)
LIMIT = {torch.float32: 5e-6, torch.bfloat16: 2**-8 + 5e-6, torch.float16: 2**-11 + 5e-6}
BOTH_LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def correlation(x: Tensor, kernel: Tensor, anchor: tuple[int, int], dilation: int) -> Tensor:
    """Compute one branch."""
    (kh, kw), (row, column), d = kernel.shape[2:], anchor, dilation
    padded = F.pad(x, (column * d, (kw - 1 - column) * d, row * d, (kh - 1 - row) * d))
    return F.conv2d(padded, kernel, dilation=d, groups=x.shape[1])


def truths(
    x: Tensor, kernels: Sequence[Tensor], grads: Sequence[Tensor], anchors: Sequence, dilations: Sequence[int]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Return the outputs of all branches, the input gradient and the weight gradients in float64."""
    x, kernels = x.double().requires_grad_(), [kernel.double().requires_grad_() for kernel in kernels]
    ys = [correlation(x, *branch) for branch in zip(kernels, anchors, dilations)]
    for_x, *for_kernels = torch.autograd.grad(ys, [x, *kernels], [grad.double() for grad in grads])
    return [y.detach() for y in ys], for_x, for_kernels


def forced(problem: Problem, filled: bool, threads: int) -> Plan:
    """Compute each kernel separately and directly, with its gaps filled with zeros or not."""
    rects = zip(problem.kernels, problem.anchors, problem.dilations)
    pieces = [Piece(*size, *anchor, dilation) for size, anchor, dilation in rects]
    passes = [Pass(piece.filled() if filled else piece, library.DIRECT) for piece in pieces]
    return Plan(tuple(passes), tuple(range(len(pieces))), threads, 0.0)


def check(
    x: Tensor, kernels: list[Tensor], grads: list[Tensor], anchors: list, dilations: tuple, filled: bool, threads: int
) -> None:
    """Check every operator on random data; sums may cancel, so errors are compared to sums of absolute values."""
    ys, for_x, for_kernels = truths(x, kernels, grads, anchors, dilations)
    positive = truths(x.abs(), [k.abs() for k in kernels], [g.abs() for g in grads], anchors, dilations)
    limit = LIMIT[x.dtype]

    def close(got: Tensor, want: Tensor, weight: Tensor) -> bool:
        return bool((got.double() - want).abs().max() <= limit * weight.max())

    problem = Problem.of_branches(x, kernels, anchors, None, dilations)
    got = PreparedSum(problem, forced(problem, filled, threads)).branches(x, kernels, anchors)
    assert all(map(close, got, ys, positive[0]))
    problem = Problem.of_sum(x, kernels, anchors, None, dilations)
    y = PreparedSum(problem, forced(problem, filled, threads))(x, kernels, anchors)
    assert close(y, sum(ys), sum(positive[0]))
    turned, mirrored = flipped(kernels), mirror_anchors(kernels, anchors)
    problem = Problem.of_sum_of_branches(grads[0], turned, mirrored, None, dilations)
    got_for_x = PreparedSum(problem, forced(problem, filled, threads)).sum_of_branches(grads, turned, mirrored)
    assert close(got_for_x, for_x, positive[1])
    for kernel, grad, anchor, d, want, weight in zip(kernels, grads, anchors, dilations, for_kernels, positive[2]):
        size = (kernel.shape[2], kernel.shape[3])
        problem = Problem.of_weight_grad(x, size, anchor, None, (d,))
        w = PreparedWeightGrad(problem, forced(problem, filled, threads))(x, grad, size, anchor)
        assert close(w, want, weight)


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    shape = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 7, 16, 18, 33])),
        draw(st.integers(1, 30)),
        draw(st.integers(1, 30)),
    )
    sizes = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4))
    anchors = [(draw(st.integers(0, kh - 1)), draw(st.integers(0, kw - 1))) for kh, kw in sizes]
    dilations = tuple(draw(st.integers(1, 5)) for _ in sizes)
    layouts = [draw(st.sampled_from(sorted(LAYOUTS))) for _ in sizes]
    return shape, sizes, anchors, dilations, layouts, draw(st.booleans()), draw(st.integers(1, 4))


def fuzzed(problem: tuple) -> None:
    shape, sizes, anchors, dilations, layouts, filled, threads = problem
    x, *grads = [LAYOUTS[layout](torch.randn(shape)) for layout in [layouts[0], *layouts]]
    kernels = [torch.randn(shape[1], 1, *size) for size in sizes]
    check(x, kernels, grads, anchors, dilations, filled, threads)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_random_problems(problem: tuple) -> None:
    fuzzed(problem)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(problems())
def test_three_thousand_random_problems(problem: tuple) -> None:
    fuzzed(problem)


@BOTH_LAYOUTS
def test_every_instruction_set(isa: str, layout: str) -> None:
    for dtype, (channels, height, width, filled) in itertools.product(LIMIT, [(19, 7, 7, False), (17, 6, 23, True)]):
        x, *grads = [LAYOUTS[layout](torch.randn(2, channels, height, width).to(dtype)) for _ in range(1 + len(SIZES))]
        kernels = [torch.randn(channels, 1, k, k).to(dtype) for k in SIZES]
        check(x, kernels, grads, center_anchors(kernels), DILATIONS, filled, 2)


@BOTH_LAYOUTS
def test_a_training_step_runs_on_the_kernels(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 20, 14, 14)).requires_grad_()
    kernels = [torch.randn(20, 1, k, k, requires_grad=True) for k in SIZES]
    grads = [torch.randn_like(x) for _ in kernels]
    with ops.trace() as trace:
        ys = ops.depthwise_branches(x, kernels, dilations=DILATIONS)
        got = torch.autograd.grad(ys, [x, *kernels], grads)
    assert [(backend, problem.op) for backend, problem in trace.calls] == [
        ("native", op) for op in (DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES, *[DEPTHWISE_WEIGHT_GRAD] * len(SIZES))
    ]
    anchors = center_anchors(kernels)
    want, for_x, for_kernels = truths(x.detach(), [k.detach() for k in kernels], grads, anchors, DILATIONS)
    for mine, truth in zip([*ys, *got], [*want, for_x, *for_kernels]):
        assert relative_error(mine.detach(), truth) < 5e-6
    assert all(y.stride() == x.stride() for y in ys)
    forward, for_input, *_ = ops.explain(x, kernels, branches=True, dilations=DILATIONS)
    assert (forward.backend, for_input.backend) == ("native", "native")
    assert "7x7 with dilation 2 direct" in forward.details


def test_gradients_in_different_layouts() -> None:
    x, kernels = torch.randn(2, 5, 9, 8, requires_grad=True), [torch.randn(5, 1, 3, 3), torch.randn(5, 1, 5, 1)]
    first, second = ops.depthwise_branches(x, kernels, dilations=(3, 1))
    grads = [torch.randn(2, 5, 9, 8).contiguous(memory_format=torch.channels_last), torch.randn(()).expand(2, 5, 9, 8)]
    with ops.trace() as trace:
        (got,) = torch.autograd.grad([first, second], x, grads)
    assert trace.backends() == ["native"]
    assert relative_error(got, truths(x.detach(), kernels, grads, center_anchors(kernels), (3, 1))[1]) < 5e-6


def test_nan_and_infinity_stay_under_the_taps() -> None:
    for value, dilation in itertools.product([float("nan"), float("inf")], [2, 5]):
        x = torch.randn(1, 20, 24, 24)
        x[0, 3, 10, 12] = value
        kernel = torch.rand(20, 1, 3, 3) + 0.5
        with ops.trace() as trace:
            y = ops.depthwise_sum(x, [kernel], algorithm="direct", backend="native", dilations=[dilation])
        assert trace.calls[0][1].dilations == (dilation,)
        wrong = torch.zeros_like(y, dtype=torch.bool)
        for i, j in itertools.product((-dilation, 0, dilation), repeat=2):
            wrong[0, 3, 10 + i, 12 + j] = True
        assert torch.equal(~y.isfinite(), wrong)


def test_working_memory_does_not_depend_on_the_batch() -> None:
    sizes = tuple((k, k) for k in SIZES)
    anchors = tuple((k // 2, k // 2) for k in SIZES)
    for op, channels_last in itertools.product([DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES], [False, True]):
        needed = set()
        for batch in (8, 64):
            shape = (batch, 160, 28, 28)
            problem = Problem(op, "cpu", torch.float32, shape, sizes, anchors, channels_last, dilations=DILATIONS)
            details = NativeBackend().describe(problem)
            needed.add(details[details.index("working memory") :])
        assert len(needed) == 1


def test_what_is_refused() -> None:
    x, kernel = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3)
    problem = Problem.of_branches(x, [kernel] * 17, [(1, 1)] * 17)
    assert NativeBackend().reasons_against(problem) == ["it computes at most 16 branches at once, not 17"]
    with ops.trace() as trace:
        ops.depthwise_branches(x, [kernel] * 17, backend="native")
    assert trace.backends() == ["native"] * 17
    # The plan would never ask for a Fourier transform of gaps.
    plan = Plan((Pass(Piece(3, 3, 1, 1, 2), library.HYBRID_ALONG_ROWS),), (0,), 1, 0.0)
    with pytest.raises(ArgumentError, match="do not fit together"):
        PreparedSum(Problem.of_sum(x, [kernel], [(1, 1)], None, (2,)), plan)(x, [kernel], [(1, 1)])
    # Taps of a pass that the kernel does not have.
    plan = Plan((Pass(Piece(3, 3, 1, 1, 2), library.DIRECT),), (0,), 1, 0.0)
    with pytest.raises(ArgumentError, match="do not fit together"):
        PreparedWeightGrad(Problem.of_weight_grad(x, (3, 3), (1, 1)), plan)(x, x, (3, 3), (1, 1))
