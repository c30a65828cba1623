"""What `explain` says about native calls: how the image passes through memory, and how much memory they need."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native import instruction_set, needs_native
from widekernel import ops
from widekernel.ops.backends.native import NativeBackend
from widekernel.ops.cpu import library
from widekernel.ops.cpu.library import DIRECT
from widekernel.ops.cpu.prepared import PACKED, PreparedSum
from widekernel.ops.problem import DEPTHWISE_SUM, Problem

pytestmark = needs_native

IN_PLACE, IN_ORDER, ROLLING = "in place", "in order", "rolling rows"
MANY_REGISTERS = ("avx512", "neon")
LARGE = (1, 64, 512, 512)  # 64 MiB in float32, more than the caches hold


def problem_of(
    shape: tuple[int, int, int, int],
    kernels: tuple[tuple[int, int], ...],
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    dilations: tuple[int, ...] = (),
) -> Problem:
    anchors = tuple((rows // 2, columns // 2) for rows, columns in kernels)
    return Problem(DEPTHWISE_SUM, "cpu", dtype, shape, kernels, anchors, channels_last, None, False, dilations)


def prepared(problem: Problem) -> PreparedSum:
    operator = NativeBackend().prepare(problem)
    assert isinstance(operator, PreparedSum)
    return operator


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    shape = draw(st.tuples(*[st.integers(1, most) for most in (3, 200, 300, 300)]))
    kernels = tuple(draw(st.lists(st.tuples(st.integers(1, 15), st.integers(1, 15)), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return problem_of(shape, kernels, draw(st.booleans()) and shape[1] > 1, dtype)


@given(problem=problems())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", library.load().isas)
def test_each_form_needs_what_it_is_made_for(name: str, problem: Problem) -> None:
    with instruction_set(name):
        check_form(problem)


def check_form(problem: Problem) -> None:
    call = prepared(problem)
    form, passes = call.form(), call.plan.passes
    assert form in (PACKED, IN_PLACE, IN_ORDER, ROLLING)
    if form != PACKED:
        assert all(step.method == DIRECT and step.piece.dilation == 1 for step in passes)
    if form in (ROLLING, IN_ORDER):
        assert len(passes) == 1
    if form in (IN_PLACE, IN_ORDER):
        assert problem.dtype is torch.float32
        assert problem.channels_last or problem.shape[1] == 1 or problem.shape[2:] == (1, 1)
        assert problem.shape[1] >= library.load().lanes
    details = NativeBackend().describe(problem)
    assert details.startswith(f"{call.plan};" if form == PACKED else f"{call.plan}, {form};")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("isa")
def test_kernels_of_few_rows_need_memory_for_some_rows_only(channels_last: bool) -> None:
    images, channels, height, width = LARGE
    call = prepared(problem_of(LARGE, ((3, 3),), channels_last))
    taller = prepared(problem_of((images, channels, 2 * height, width), ((3, 3),), channels_last))
    # With few registers, channels_last images pass through a buffer, too.
    expected = IN_ORDER if channels_last and library.load().isa in MANY_REGISTERS else ROLLING
    assert (call.form(), taller.form()) == (expected, expected)
    assert call.workspace() == taller.workspace()
    rows = call.workspace()[0] / (width * library.load().lanes * 4)
    assert rows < height


@pytest.mark.usefixtures("isa")
def test_images_are_read_in_order_unless_strides_or_tiles_are_bad() -> None:
    def form(channels: int, side: int, kernel: tuple[int, int]) -> str:
        return prepared(replace(problem_of((1, channels, side, side), (kernel,), True), algorithm="direct")).form()

    if library.load().isa not in MANY_REGISTERS:
        assert IN_ORDER not in {form(96, 56, (3, 3)), form(96, 56, (7, 7)), form(96, 28, (13, 5))}
        return
    for kernel in ((3, 3), (7, 7), (13, 5)):
        assert form(96, 28, kernel) == IN_ORDER
    # Pixels that are 2 KiB or 4 KiB apart.
    assert [form(channels, 28, (3, 3)) for channels in (512, 1024)] == [IN_ORDER, ROLLING]
    assert form(512, 28, (5, 5)) == ROLLING
    # Rows that are 4 KiB apart; an overlap of 6 rows in 15, which a rolling buffer has, too.
    assert form(32, 32, (7, 7)) == IN_PLACE and form(32, 32, (5, 5)) == IN_ORDER
    assert form(96, 15, (7, 7)) == IN_PLACE and form(96, 15, (5, 5)) == IN_ORDER


@pytest.mark.usefixtures("isa")
def test_other_calls_are_packed() -> None:
    assert prepared(problem_of(LARGE, ((51, 51),))).form() == PACKED
    apart = problem_of((1, 64, 30, 30), ((3, 3),), True, dilations=(4,))
    assert any(step.piece.dilation > 1 or step.method != DIRECT for step in prepared(apart).plan.passes)
    assert prepared(apart).form() == PACKED


@pytest.mark.usefixtures("isa")
def test_the_last_channels_alone_are_not_in_place() -> None:
    """Of fewer channels than a vector holds, all are packed; ReLU is applied to packed results."""
    lanes = library.load().lanes
    shapes = {channels: (1, channels, 4, 4) for channels in (lanes - 1, lanes)}
    forms = {channels: prepared(problem_of(shape, ((3, 3),), True)).form() for channels, shape in shapes.items()}
    assert forms == {lanes - 1: PACKED, lanes: IN_PLACE}
    call = prepared(problem_of(shapes[lanes], ((3, 3),), True))
    like = torch.empty(shapes[lanes], device="meta").contiguous(memory_format=torch.channels_last)
    description = call._description(like, like)
    description.relu = 1
    assert library.load().calls.wk_sum_form(ctypes.byref(description)).decode() == PACKED


@pytest.mark.usefixtures("isa")
def test_memory_is_never_zero() -> None:
    for shape, kernel in (((1, 1, 1, 1), (1, 1)), ((1, 16, 9, 9), (3, 3)), ((1, 512, 224, 224), (61, 61))):
        for explanation in ops.explain(torch.empty(shape), [torch.empty(shape[1], 1, *kernel)], backend="native"):
            found = re.search(r"working memory (\S+) (KiB|MiB) a thread and (\S+) (KiB|MiB) shared$", explanation.details)
            assert found is not None
            for number, unit in (found.groups()[:2], found.groups()[2:]):
                assert float(number) >= 1
                assert ("." in number) == (unit == "MiB")
                assert unit == "MiB" or int(number) <= 1024
