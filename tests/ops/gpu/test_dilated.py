"""Dilated rectangles: the operators on the GPU kernels, what `explain` says, and limits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES
from tests.ops.gpu.helpers import DEVICE, DTYPES, H200, assert_exact
from tests.ops.gpu.operator_cases import CONTIGUOUS, NHWC, SUM, WEIGHT_GRAD, ran
from widekernel import ops
from widekernel.ops import reference
from widekernel.ops.backends.triton import MOST_SPANNED, TritonBackend
from widekernel.ops.gpu.candidates import LARGEST_DIRECT
from widekernel.ops.gpu.config_choice import ranked_configs
from widekernel.ops.gpu.kernel_configs import DirectNhwc, Toeplitz, ToeplitzGrad
from widekernel.ops.problem import Problem

TRITON = TritonBackend()

Rects = list[tuple[tuple[int, int], tuple[int, int], int]]

# Sizes, anchors and dilations.
RECTS: dict[str, Rects] = {
    "block": [((7, 7), (3, 3), 1), ((4, 3), (1, 2), 2), ((3, 3), (1, 1), 3)],
    "even-sizes": [((2, 11), (1, 0), 2), ((4, 2), (3, 1), 4)],
    "small": [((3, 3), (1, 1), 2), ((2, 3), (0, 2), 3)],
}
# Images with many pixels are computed as bands, those with few as whole planes; in the last, all outer taps meet padding.
SHAPES = {"bands": (2, 2, 9, 15), "plane": (3, 2, 7, 6), "tiny": (2, 3, 2, 3)}


def arguments(shape: tuple[int, ...], rects: Rects, dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    """Return x and the kernels, all requiring gradients."""
    x = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).contiguous(memory_format=layout)
    kernels = [torch.randn(shape[1], 1, *size, dtype=torch.float64).to(x) for size, _, _ in rects]
    return [t.requires_grad_() for t in (x, *kernels)]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


FEW = [
    ("branches", "bands", "block", torch.float32, CONTIGUOUS),
    ("sum", "plane", "block", torch.bfloat16, CONTIGUOUS),
    ("branches", "plane", "even-sizes", torch.float16, CONTIGUOUS),
    ("sum", "tiny", "small", torch.float32, NHWC),
]
MANY = [
    (form, *case, dtype, layout)
    for form in ("sum", "branches")
    for case in itertools.product(SHAPES, RECTS)
    for dtype, layout in zip(DTYPES, (CONTIGUOUS, NHWC, NHWC if "small" in case else CONTIGUOUS))
]


@pytest.mark.interpreted
@pytest.mark.usefixtures("no_tuned_table")
@pytest.mark.parametrize(
    ("form", "shape", "rects", "dtype", "layout"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in MANY if case not in FEW)],
    ids=str,
)
def test_values_and_gradients(form: str, shape: str, rects: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    inputs = arguments(SHAPES[shape], RECTS[rects], dtype, layout)
    sizes, anchors, dilations = zip(*RECTS[rects])
    exact = doubled(inputs)
    alone = [
        reference.depthwise_sum(exact[0], [kernel], [anchor], dilations=(dilation,))
        for kernel, anchor, dilation in zip(exact[1:], anchors, dilations)
    ]
    with ops.trace() as trace:
        if form == "branches":
            got, want = ops.depthwise_branches(inputs[0], inputs[1:], anchors, backend="triton", dilations=dilations), alone
        else:
            got = [ops.depthwise_sum(inputs[0], inputs[1:], anchors, backend="triton", dilations=dilations)]
            want = [sum(alone)]
        grads = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in got]
        gradients = torch.autograd.grad(got, inputs, grads)
    keeps_layout = layout is NHWC and max(map(max, sizes)) <= LARGEST_DIRECT
    fused = [SUM] * 2 * len(sizes) if keeps_layout else [BRANCHES, SUM_OF_BRANCHES]
    assert ran(trace) == sorted([*(fused if form == "branches" else [SUM, SUM]), *[WEIGHT_GRAD] * len(sizes)])
    assert {problem.dilations for _, problem in trace.calls if len(problem.kernels) > 1} <= {dilations}
    assert {problem.dilations[0] for _, problem in trace.calls if problem.op == WEIGHT_GRAD} == set(dilations)
    wanted = torch.autograd.grad(want, exact, [grad.double().cpu() for grad in grads])
    for mine, truth in zip((*got, *gradients), (*want, *wanted), strict=True):
        assert mine.dtype == dtype
        assert_exact(mine.detach(), truth.detach())
    assert all(y.is_contiguous(memory_format=layout) for y in got)


@pytest.mark.interpreted
@pytest.mark.usefixtures("no_tuned_table")
@pytest.mark.parametrize("layout", [CONTIGUOUS, NHWC], ids=["contiguous", "channels_last"])
def test_the_direct_algorithm_reads_no_pixel_in_a_gap(layout: torch.memory_format) -> None:
    x = torch.randn(1, 2, 7, 8).to(DEVICE).contiguous(memory_format=layout)
    kernel = torch.randn(2, 1, 3, 3).to(x)
    x[0, 0, 3, 3] = float("inf")
    y = ops.depthwise_sum(x, [kernel], backend="triton", algorithm="direct", dilations=[2])
    reached = torch.zeros(x.shape, dtype=torch.bool, device=DEVICE)
    reached[0, 0, 1:6:2, 1:6:2] = True
    assert torch.equal(~y.isfinite(), reached)


def problem(op: str = SUM, *, kernel: int = 3, dilation: int = 5) -> Problem:
    shape, dtype = (64, 160, 28, 28), torch.bfloat16
    return Problem(op, "cuda", dtype, shape, ((kernel, kernel),), ((kernel // 2, kernel // 2),), dilations=(dilation,))


@pytest.mark.usefixtures("no_tables")
def test_every_kernel_takes_the_same_configurations_with_gaps_and_without() -> None:
    for op in (SUM, WEIGHT_GRAD):
        with_gaps = problem(op)
        assert set(ranked_configs(with_gaps, H200)) == set(ranked_configs(replace(with_gaps, dilations=()), H200))


@pytest.mark.usefixtures("h200", "no_tables")
def test_explain_says_how_gaps_are_computed() -> None:
    large = problem(kernel=7, dilation=2)
    assert TRITON.describe(large).endswith(f"estimated, not measured; {Toeplitz.gaps}")
    assert TRITON.describe(replace(large, dilations=())).endswith("estimated, not measured")
    assert TRITON.describe(problem(WEIGHT_GRAD)).endswith(f"; {ToeplitzGrad.gaps}")
    small = TRITON.describe(replace(large, channels_last=True))
    assert small.startswith(DirectNhwc.method) and small.endswith("estimated, not measured")


@pytest.mark.usefixtures("h200", "no_tables")
def test_kernels_that_span_many_pixels_are_left_to_pytorch() -> None:
    assert TRITON.can_run(problem(dilation=MOST_SPANNED // 2))
    too_far = problem(dilation=MOST_SPANNED // 2 + 1)
    assert not TRITON.can_run(too_far)
    assert TRITON.reasons_against(too_far) == [
        f"it computes dilated kernels whose taps span at most {MOST_SPANNED} pixels, not {MOST_SPANNED + 2}"
    ]
    assert TRITON.can_run(problem(kernel=MOST_SPANNED + 2, dilation=1))
