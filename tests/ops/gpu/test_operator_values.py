"""The operators on the GPU kernels: values and gradients, and numbers that are not finite."""

from __future__ import annotations

import pytest
import torch

from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES
from tests.ops.cases import Case
from tests.ops.gpu.helpers import DEVICE, DTYPES, assert_exact
from tests.ops.gpu.operator_cases import (
    BANDS,
    BOTH_LAYOUTS,
    CASES,
    CONTIGUOUS,
    CROSS,
    LARGE,
    NHWC,
    PATHS,
    SMALL,
    SUM,
    WEIGHT_GRAD,
    arguments,
    doubled,
    ours,
    ours_branched,
    ran,
    theirs,
    theirs_branched,
)
from widekernel import ops
from widekernel.ops import reference
from widekernel.ops.backends import triton

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("no_tuned_table")]


def check(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    inputs = arguments(case, dtype, layout)
    exact = doubled(inputs)
    with ops.trace() as trace:
        y = ours(case, *inputs)
        grad = torch.randn(y.shape, dtype=torch.float64).to(y)
        got = torch.autograd.grad(y, inputs, grad)
    assert ran(trace) == sorted([SUM, SUM, *[WEIGHT_GRAD] * len(case.rects)])
    truth = theirs(case, *exact)
    assert_exact(y, truth)
    assert y.stride() == inputs[0].stride() or 1 in y.shape
    for mine, want in zip(got, torch.autograd.grad(truth, exact, grad.double())):
        assert mine.dtype == dtype
        assert_exact(mine, want)


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, layout: torch.memory_format) -> None:
    check(case, torch.float32, layout)


@BOTH_LAYOUTS
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[] if at == number else [pytest.mark.slow])
        for at, case in enumerate([CROSS, SMALL])
        for number, dtype in enumerate(DTYPES[1:])
    ],
    ids=str,
)
def test_values_and_gradients_in_short_types(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    check(case, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_values_and_gradients_of_bands_in_short_types(dtype: torch.dtype) -> None:
    check(BANDS, dtype, CONTIGUOUS)


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [
        *((CROSS, dtype, CONTIGUOUS) for dtype in DTYPES),
        (CROSS, torch.bfloat16, NHWC),
        (BANDS, torch.float32, CONTIGUOUS),
    ],
    ids=str,
)
def test_branches_and_their_gradients(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    inputs = arguments(case, dtype, layout)[:-1]
    exact = doubled(inputs)
    with ops.trace() as trace:
        ys = ours_branched(case, *inputs)
        grads = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in ys]
        got = torch.autograd.grad(ys, inputs, grads)
    assert ran(trace) == sorted([BRANCHES, SUM_OF_BRANCHES, *[WEIGHT_GRAD] * len(case.rects)])
    truths = theirs_branched(case, *exact)
    for mine, want in zip((*ys, *got), (*truths, *torch.autograd.grad(truths, exact, [g.double() for g in grads]))):
        assert_exact(mine, want)
    assert all(y.is_contiguous(memory_format=layout) for y in ys)


def test_small_branches_of_channels_last_images_are_computed_one_by_one() -> None:
    case = Case("small", SMALL.shape, (*SMALL.rects, (1, 2, None)))
    inputs = arguments(case, torch.float32, NHWC)[:-1]
    with ops.trace() as trace:
        ys = ours_branched(case, *inputs)
        sum(y.sin().sum() for y in ys).backward()
    assert ran(trace) == sorted([*[SUM] * 4, *[WEIGHT_GRAD] * 2])
    for y, want in zip(ys, theirs_branched(case, *doubled(inputs))):
        assert_exact(y, want)


def test_more_branches_than_one_launch_takes() -> None:
    case = Case("many", (1, 2, 4, 5), tuple((1 + i % 3, 1 + i % 2, None) for i in range(triton.MOST_RECTS + 1)))
    inputs = arguments(case)[:-1]
    with ops.trace() as trace:
        ys = ours_branched(case, *inputs)
    assert ran(trace) == [SUM] * len(case.rects)
    for y, want in zip(ys, theirs_branched(case, *doubled(inputs))):
        assert_exact(y, want)


BIASES = {
    "strided": lambda bias: torch.stack([bias, bias + 7], 1)[:, 0],
    "expanded": lambda bias: bias[:1].expand_as(bias),
    "negative": torch._neg_view,
}


@pytest.mark.parametrize("stored", BIASES)
@PATHS
def test_a_bias_may_be_stored_in_any_way(case: Case, layout: torch.memory_format, stored: str) -> None:
    x, *kernels, bias = (t.detach() for t in arguments(case, torch.float32, layout))
    bias = BIASES[stored](bias)
    assert_exact(ours(case, x, *kernels, bias), theirs(case, *doubled([x, *kernels, bias])))


def test_inference_mode() -> None:
    with torch.inference_mode():
        inputs = [t.detach() for t in arguments(CROSS)]
        y = ours(CROSS, *inputs)
        assert y.is_inference()
    assert_exact(y, theirs(CROSS, *doubled(inputs)))


# ---- Numbers that are not finite


@PATHS
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_numbers_that_are_not_finite_stay_in_their_plane(case: Case, layout: torch.memory_format) -> None:
    value = float("inf") if case is LARGE else float("nan")
    x, *kernels, bias = arguments(case, torch.float32, layout)
    clean = ours(case, x, *kernels, bias)
    corrupted = x.detach().clone()
    corrupted[1, 0, 2, 3] = value
    corrupted.requires_grad_()
    y = ours(case, corrupted, *kernels, bias)
    assert not y[1, 0, 2, 3].isfinite()
    elsewhere = torch.ones(y.shape[:2], dtype=torch.bool, device=DEVICE)
    elsewhere[1, 0] = False
    assert torch.equal(y[elsewhere], clean[elsewhere])
    # The gradient of a kernel sums over the images of its channel, and so stays in its channel.
    grad = torch.randn_like(clean)
    for mine, want in zip(torch.autograd.grad(y, kernels, grad), torch.autograd.grad(clean, kernels, grad)):
        assert not mine[0].isfinite().all()
        assert torch.equal(mine[1:], want[1:])
    # The gradient of the image is the same operator, applied to the incoming gradient.
    grad = grad.clone()
    grad[1, 0, 2, 3] = value
    (for_x,) = torch.autograd.grad(ours(case, x, *kernels, bias), x, grad)
    assert for_x[elsewhere].isfinite().all()


@BOTH_LAYOUTS
def test_the_direct_algorithm_is_for_small_kernels(layout: torch.memory_format) -> None:
    x, kernel, _ = (t.detach() for t in arguments(SMALL, torch.float32, layout))
    x[0, 0, 2, 3] = float("inf")
    with ops.trace() as trace:
        y = ops.depthwise_sum(x, [kernel], backend="triton", algorithm="direct")
    assert ran(trace) == [SUM]
    under = torch.zeros(x.shape, dtype=torch.bool, device=DEVICE)
    under[0, 0, 1:4, 2:5] = True
    assert torch.equal(~y.isfinite(), under)
    wide = torch.randn(3, 1, 3, 31, device=DEVICE)
    refused = "triton cannot compute depthwise_sum of .*: its matrix products multiply pixels outside the kernel by zero"
    with pytest.raises(ops.NoBackendError, match=refused):
        ops.depthwise_sum(x, [wide], backend="triton", algorithm="direct")
    with pytest.raises(ops.NoBackendError, match=f"{WEIGHT_GRAD} of .*algorithm 'direct' excludes"):
        ops.depthwise_weight_grad(x, x, (3, 31), backend="triton", algorithm="direct")


@BOTH_LAYOUTS
def test_direct_gradients_of_small_kernels(layout: torch.memory_format) -> None:
    """An infinite pixel in a corner affects the taps that reach it; the others are right."""
    x, kernel, _ = (t.detach() for t in arguments(SMALL, torch.float32, layout))
    grad = torch.randn_like(x)
    x[0, 0, 0, 0] = float("inf")
    kernel.requires_grad_()
    with ops.trace() as trace:
        y = ops.depthwise_sum(x, [kernel], backend="triton", algorithm="direct")
        (got,) = torch.autograd.grad(y, [kernel], grad)
    assert ran(trace) == [SUM, WEIGHT_GRAD]
    of = x.double().cpu(), grad.double().cpu(), tuple(kernel.shape[2:]), (kernel.shape[2] // 2, kernel.shape[3] // 2)
    want = reference.depthwise_weight_grad(*of)
    finite = want.isfinite()
    assert 0 < (~finite).sum() < finite[0].numel()
    assert torch.equal(got.cpu().isfinite(), finite)
    assert_exact(got.cpu()[finite], want[finite])
