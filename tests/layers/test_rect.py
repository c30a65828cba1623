"""Rectangles: geometry, sums and the collapse to maximal ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cases import assert_close, definition
from widekernel.layers import Rect, maximal_rectangles


def rect(kh: int, kw: int, anchor: tuple[int, int] | None = None, channels: int = 2) -> Rect:
    kernel = torch.randn(channels, 1, kh, kw, dtype=torch.float64)
    return Rect(kernel, anchor or (kh // 2, kw // 2))


def test_size_and_reach() -> None:
    strip = rect(3, 51, (1, 24))
    assert strip.size == (3, 51)
    assert strip.reach == (1, 1, 24, 26)


def test_a_dilated_rectangle() -> None:
    sparse = Rect(torch.randn(2, 1, 3, 4, dtype=torch.float64), (0, 3), 2)
    assert (sparse.size, sparse.reach, sparse.label) == ((3, 4), (0, 4, 6, 0), "3×4 (dilation 2)")
    dense = sparse.dense()
    assert (dense.size, dense.anchor, dense.dilation) == ((5, 7), (0, 6), 1)
    assert torch.equal(dense.kernel[..., ::2, ::2], sparse.kernel)
    assert dense.kernel.count_nonzero() == sparse.kernel.count_nonzero()
    assert dense.dense() is dense
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    want = definition(x, [dense.kernel], [dense.anchor])
    assert_close(definition(x, [sparse.kernel], [sparse.anchor], None, [2]), want)
    scaled = sparse.scaled(torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert (scaled.anchor, scaled.dilation) == (sparse.anchor, 2)
    # It has no tap in its gaps, so it covers nothing; a dense one of its reach covers it.
    assert not sparse.covers(Rect.identity(sparse.kernel))
    assert dense.covers(sparse)
    assert_close(dense.plus(sparse).kernel, 2 * dense.kernel)
    (merged,) = maximal_rectangles([Rect.identity(sparse.kernel), sparse])
    assert merged.size == (5, 7)
    assert_close(definition(x, [merged.kernel], [merged.anchor]), want + x)


@pytest.mark.parametrize("dilation", [0, True, 1.5, -1])
def test_wrong_dilations(dilation: object) -> None:
    with pytest.raises(ValueError, match=f"dilation is {dilation!r}: .*positive whole number"):
        Rect(torch.zeros(2, 1, 3, 3), (1, 1), dilation)


def test_centered() -> None:
    assert Rect.centered(torch.zeros(2, 1, 5, 7), 3).dilation == 3
    assert Rect.centered(torch.zeros(2, 1, 5, 7)).anchor == (2, 3)
    with pytest.warns(FutureWarning, match=r"Rect\.centred is now called Rect\.centered"):
        assert Rect.centred(torch.zeros(2, 1, 5, 7)).anchor == (2, 3)


def test_identity() -> None:
    like = torch.zeros(4, 1, 5, 7, dtype=torch.float64)
    one = Rect.identity(like)
    assert one.size == (1, 1)
    assert one.kernel.dtype == torch.float64
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(definition(x, [one.kernel], [one.anchor]), x)


@pytest.mark.parametrize(
    ("large", "small", "covered"),
    [
        ((5, 5, (2, 2)), (3, 3, (1, 1)), True),
        ((5, 5, (2, 2)), (5, 5, (2, 2)), True),
        ((5, 5, (2, 2)), (1, 1, (0, 0)), True),
        ((5, 5, (2, 2)), (3, 3, (0, 0)), True),
        ((5, 5, (2, 2)), (4, 3, (0, 1)), False),
        ((5, 5, (0, 0)), (3, 3, (1, 1)), False),
        ((51, 5, (25, 2)), (5, 51, (2, 25)), False),
        ((3, 3, (1, 1)), (5, 5, (2, 2)), False),
        ((3, 51, (1, 24)), (3, 51, (1, 25)), False),
    ],
)
def test_covers(large: tuple, small: tuple, covered: bool) -> None:
    assert rect(*large).covers(rect(*small)) is covered


def test_plus_is_the_sum_of_both() -> None:
    large, small = rect(4, 7, (1, 3)), rect(2, 3, (0, 2))
    x = torch.randn(1, 2, 6, 5, dtype=torch.float64)
    total = large.plus(small)
    assert total.anchor == large.anchor
    both = definition(x, [large.kernel, small.kernel], [large.anchor, small.anchor])
    assert_close(definition(x, [total.kernel], [total.anchor]), both)


def test_plus_refuses_rectangles_that_it_does_not_cover() -> None:
    with pytest.raises(ValueError, match=r"a 3x3 rectangle of 2 channels .* cannot absorb one of 5x1, 2 channels"):
        rect(3, 3).plus(rect(5, 1))
    with pytest.raises(ValueError, match=r"anchored at \(0, 0\).* cannot absorb .* anchored at \(1, 1\)"):
        rect(5, 5, (0, 0)).plus(rect(3, 3))


def test_plus_refuses_other_channels() -> None:
    with pytest.raises(ValueError, match=r"of 3 channels .* 1 channels"):
        rect(3, 3, channels=3).plus(rect(3, 3, channels=1))


def test_scaled() -> None:
    one, scale = rect(3, 5, (0, 4)), torch.tensor([2.0, -3.0], dtype=torch.float64)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    twice = one.scaled(scale)
    assert twice.anchor == one.anchor
    want = definition(x, [one.kernel], [one.anchor]) * scale.view(-1, 1, 1)
    assert_close(definition(x, [twice.kernel], [twice.anchor]), want)


@pytest.mark.parametrize(
    ("shape", "anchor", "message"),
    [
        ((2, 3, 3), (1, 1), r"kernel has shape \(2, 3, 3\): a Rect needs \(C, 1, kh, kw\)"),
        ((2, 2, 3, 3), (1, 1), r"kernel has shape \(2, 2, 3, 3\)"),
        ((2, 1, 3, 3), (3, 1), r"anchor \(3, 1\) lies outside the 3x3 kernel"),
        ((2, 1, 3, 3), (0, -1), r"anchor \(0, -1\) lies outside"),
        ((2, 1, 0, 3), (0, 1), r"anchor \(0, 1\) lies outside the 0x3 kernel"),
    ],
)
def test_wrong_rectangles(shape: tuple[int, ...], anchor: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rect(torch.zeros(shape), anchor)


def test_a_small_square_disappears_in_a_large_one() -> None:
    large, small = rect(31, 31), rect(5, 5)
    (merged,) = maximal_rectangles([small, large])
    assert merged.size == (31, 31)
    inside = merged.kernel[..., 13:18, 13:18] - large.kernel[..., 13:18, 13:18]
    assert_close(inside, small.kernel)


def test_crossed_strips_stay_two() -> None:
    merged = maximal_rectangles([rect(51, 5), rect(5, 51), rect(5, 5), rect(1, 1)])
    assert sorted(m.size for m in merged) == [(5, 51), (51, 5)]


def test_equal_rectangles_become_one() -> None:
    assert [m.size for m in maximal_rectangles([rect(3, 5)] * 4)] == [(3, 5)]


def test_an_empty_sum_stays_empty() -> None:
    assert maximal_rectangles([]) == []


@st.composite
def many(draw: st.DrawFn) -> list[Rect]:
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    rects = []
    for _ in range(draw(st.integers(1, 6))):
        kh, kw = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        rects.append(rect(kh, kw, (draw(st.integers(0, kh - 1)), draw(st.integers(0, kw - 1)))))
    return rects


@given(many())
@settings(max_examples=40, deadline=None)
def test_the_collapse_keeps_the_operator_and_leaves_no_rectangle_covered(rects: list[Rect]) -> None:
    before = [one.kernel.clone() for one in rects]
    merged = maximal_rectangles(rects)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    want = definition(x, [one.kernel for one in rects], [one.anchor for one in rects])
    got = definition(x, [one.kernel for one in merged], [one.anchor for one in merged])
    assert_close(got, want)
    assert not any(a.covers(b) for a in merged for b in merged if a is not b)
    assert all(any(a.covers(b) for a in merged) for b in rects)
    assert all(torch.equal(one.kernel, kernel) for one, kernel in zip(rects, before))
    assert {one.size for one in merged} <= {one.size for one in rects}


def test_the_collapse_is_differentiable() -> None:
    kernels = [torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True) for size in [(5, 5), (3, 3)]]
    (merged,) = maximal_rectangles([Rect.centered(kernel) for kernel in kernels])
    merged.kernel.sum().backward()
    assert all(torch.equal(kernel.grad, torch.ones_like(kernel)) for kernel in kernels)
