"""Choice of passes and algorithms, which does not need the library."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widekernel.ops.cpu.costs import AVX2, AVX512, AVX512_ON_ZEN4, Costs, costs_of
from widekernel.ops.cpu.library import DIRECT, ISAS
from widekernel.ops.cpu.plan import Piece, Plan, plan, reason_for_pytorch
from widekernel.ops.problem import Problem


def of(
    kernels,
    shape=(8, 128, 56, 56),
    op="depthwise_sum",
    algorithm=None,
    anchors=None,
    channels_last=False,
    dilations=(),
) -> Problem:
    anchors = anchors or tuple((kh // 2, kw // 2) for kh, kw in kernels)
    layout = channels_last, algorithm
    return Problem(op, "cpu", torch.float32, shape, tuple(kernels), tuple(anchors), *layout, dilations=tuple(dilations))


def methods(chosen: Plan) -> list[bool]:
    """Return whether each pass is hybrid."""
    return [step.method != DIRECT for step in chosen.passes]


@pytest.mark.parametrize("op", ["depthwise_sum", "depthwise_weight_grad"])
def test_long_kernels_on_large_maps_are_hybrid_and_short_ones_direct(op: str) -> None:
    assert methods(plan(of([(31, 31)], op=op), 2, 16)) == [True]
    assert methods(plan(of([(51, 51)], op=op), 2, 16)) == [True]
    assert methods(plan(of([(5, 51)], op=op), 2, 16)) == [True]
    assert methods(plan(of([(7, 7)], op=op), 2, 16)) == [False]
    assert methods(plan(of([(13, 13)], (8, 1024, 7, 7), op), 2, 16)) == [False]


def test_the_transform_runs_along_the_long_axis() -> None:
    assert str(plan(of([(5, 51)]), 2, 16)) == "5x51 hybrid along rows"
    assert str(plan(of([(51, 5)]), 2, 16)) == "51x5 hybrid along columns"


def test_the_direct_algorithm_is_never_hybrid() -> None:
    assert methods(plan(of([(31, 31)], algorithm="direct"), 2, 16)) == [False]
    assert methods(plan(of([(31, 31)], op="depthwise_weight_grad", algorithm="direct"), 2, 16)) == [False]


def test_covered_kernels_are_added_into_those_that_cover_them() -> None:
    chosen = plan(of([(5, 5), (31, 31)]), 2, 16)
    assert [step.piece for step in chosen.passes] == [Piece(31, 31, 15, 15)]
    assert chosen.targets == (0, 0)
    off_centre = plan(of([(3, 3), (7, 3)], (8, 16, 7, 7), anchors=((1, 1), (0, 1))), 2, 16)
    assert len(off_centre.passes) == 2 or off_centre.passes[0].piece == Piece(8, 3, 1, 1)


def test_taps_that_see_no_pixel_are_left_out() -> None:
    (step,) = plan(of([(5, 47)], (8, 499, 14, 14)), 2, 16).passes
    assert step.piece == Piece(5, 27, 2, 13)


def test_kernels_beyond_the_longest_transform_are_direct() -> None:
    assert methods(plan(of([(401, 401)], (8, 16, 400, 400)), 2, 16)) == [False]


def test_every_instruction_set_has_costs() -> None:
    assert costs_of("avx512") is AVX512
    assert costs_of("avx2") is AVX2
    assert costs_of("avx512", "zen4") is AVX512_ON_ZEN4
    assert costs_of("avx2", "zen4") is AVX2
    for isa in ISAS:
        assert costs_of(isa).measured_with in ("avx512", "avx2")


@pytest.mark.parametrize("costs", [AVX512, AVX512_ON_ZEN4, AVX2], ids=lambda costs: costs.measured_with)
def test_the_choice_follows_the_costs(costs: Costs) -> None:
    problem = of([(31, 31)])
    assert methods(plan(problem, 2, 16, costs)) == [True]
    slow_transforms = replace(costs, transform_rate=costs.transform_rate / 100)
    assert methods(plan(problem, 2, 16, slow_transforms)) == [False]
    # Twice as slow in every respect: the same choice, and twice the cycles.
    times = ("tile", "packing", "fetching")
    rates = {name: value / 2 for name, value in vars(costs).items() if name.endswith("rate")}
    slower = replace(costs, **rates, **{name: value * 2 for name, value in vars(costs).items() if name.endswith(times)})
    for kernels in ([(7, 7)], [(31, 31)]):
        one, other = plan(of(kernels), 2, 16, costs), plan(of(kernels), 2, 16, slower)
        assert methods(one) == methods(other)
        assert 1.9 < other.cycles / one.cycles <= 2


def test_small_calls_wake_no_thread() -> None:
    assert plan(of([(3, 3)], (1, 16, 7, 7)), 8, 16).threads == 1
    assert plan(of([(31, 31)]), 8, 16).threads == 8


def test_problems_that_pytorch_computes_faster() -> None:
    def on(problem: Problem) -> tuple[bool, ...]:
        processors = ("other", "avx512"), ("amd", "avx512"), ("amd", "avx2")
        for isa in ("avx512", "avx2"):
            assert (reason_for_pytorch(problem, "zen4", isa) is None) == (reason_for_pytorch(problem, "amd", isa) is None)
        return tuple(reason_for_pytorch(problem, processor, isa) is not None for processor, isa in processors)

    assert on(of([(3, 3)], channels_last=True)) == (True, False, True)
    assert on(of([(7, 7)], (8, 1024, 14, 14), channels_last=True)) == (True, False, True)
    for problem in (
        of([(3, 3)], (1, 64, 56, 56), channels_last=True),
        of([(5, 5)], (2, 128, 56, 56), channels_last=True),
        of([(7, 7)], (8, 512, 14, 14), channels_last=True),
    ):
        assert on(problem) == (True, False, False)
    for problem in [
        of([(3, 3)]),
        of([(7, 7)], channels_last=True),
        of([(3, 3)], (1, 16, 7, 7), channels_last=True),
        of([(3, 3)], op="depthwise_weight_grad", channels_last=True),
        of([(3, 3), (5, 1)], channels_last=True),
    ]:
        assert on(problem) == (False, False, False)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_tap_that_sees_a_pixel_is_in_its_pass(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4))
    anchors = [(data.draw(st.integers(0, kh - 1)), data.draw(st.integers(0, kw - 1))) for kh, kw in sizes]
    dilations = data.draw(st.lists(st.integers(1, 6), min_size=len(sizes), max_size=len(sizes)))
    algorithm = data.draw(st.sampled_from([None, "direct"]))
    problem = of(sizes, (2, 20, height, width), algorithm=algorithm, anchors=tuple(anchors), dilations=dilations)
    chosen = plan(problem, 2, 16)
    assert len(chosen.targets) == len(sizes)
    for (kh, kw), (row, column), dilation, target in zip(sizes, anchors, dilations, chosen.targets):
        piece = chosen.passes[target].piece
        assert dilation % piece.dilation == 0
        for taps, anchor, extent, covered, at in [
            (kh, row, height, piece.rows, piece.row),
            (kw, column, width, piece.columns, piece.column),
        ]:
            seen = [(tap - anchor) * dilation for tap in range(taps) if abs(tap - anchor) * dilation < extent]
            assert -at * piece.dilation <= min(seen)
            assert max(seen) < (covered - at) * piece.dilation


# UniRepLKNet's block of the largest kernel.
SIZES, DILATIONS = [(13, 13), (5, 5), (7, 7), (3, 3), (3, 3), (3, 3)], (1, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("algorithm", [None, "direct"])
def test_dilated_kernels_that_a_dense_one_covers_fill_their_gaps(algorithm: str | None) -> None:
    chosen = plan(of(SIZES, (8, 160, 28, 28), algorithm=algorithm, dilations=DILATIONS), 2, 16)
    assert [step.piece for step in chosen.passes] == [Piece(13, 13, 6, 6)]
    assert chosen.targets == (0,) * 6
    assert str(chosen).endswith(", gaps of 4 of 6 kernels filled with zeros")


def test_kernels_of_one_dilation_are_merged() -> None:
    chosen = plan(of([(7, 7), (3, 3)], (8, 160, 28, 28), dilations=(4, 4)), 2, 16)
    assert [step.piece for step in chosen.passes] == [Piece(7, 7, 3, 3, 4)]
    assert str(chosen) == "7x7 with dilation 4 direct"


@pytest.mark.parametrize("op", ["depthwise_branches", "depthwise_sum_of_branches"])
def test_each_branch_has_a_pass(op: str) -> None:
    chosen = plan(of(SIZES, (8, 160, 28, 28), op, dilations=DILATIONS), 2, 16)
    assert [step.piece.dilation for step in chosen.passes] == list(DILATIONS)
    assert chosen.targets == tuple(range(6))


def test_taps_beyond_the_image_are_left_out_in_units_of_the_dilation() -> None:
    (step,) = plan(of([(7, 7)], (8, 640, 7, 7), dilations=(4,)), 2, 16).passes
    assert step.piece == Piece(3, 3, 1, 1, 4)
    (step,) = plan(of([(3, 3)], (8, 640, 4, 4), dilations=(5,)), 2, 16).passes
    assert step.piece == Piece(1, 1, 0, 0, 1)


def test_the_direct_algorithm_never_puts_zeros_between_taps() -> None:
    for op in ("depthwise_sum", "depthwise_branches", "depthwise_weight_grad"):
        (step,) = plan(of([(15, 15)], op=op, algorithm="direct", dilations=(2,)), 2, 16).passes
        assert step.piece == Piece(15, 15, 7, 7, 2)
    crossed = plan(of([(51, 5), (5, 51)], (8, 128, 7, 7), algorithm="direct"), 2, 16)
    assert len(crossed.passes) == 2
