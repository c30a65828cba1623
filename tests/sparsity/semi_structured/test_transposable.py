"""Masks that are 2:4 in both directions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from widekernel.errors import ShapeError
from widekernel.sparsity import semi_structured as ss
from widekernel.sparsity.semi_structured.learned import kept_share
from widekernel.sparsity.semi_structured.masks import check_semi_structured, magnitude_choices
from widekernel.sparsity.semi_structured.patterns import PATTERNS
from widekernel.sparsity.semi_structured.transposable import transposable_patterns


def test_there_are_ninety_patterns() -> None:
    patterns = torch.tensor(transposable_patterns())
    assert patterns.shape == (90, 4, 4) and len(set(map(str, patterns.tolist()))) == 90
    assert bool((patterns.sum(1) == 2).all()) and bool((patterns.sum(2) == 2).all())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.sampled_from([None, (1, 1), (3, 2)]), st.integers(0, 2**31))
def test_both_directions(rows: int, columns: int, kernel: tuple[int, int] | None, seed: int) -> None:
    weight = torch.randn((rows, columns, *(kernel or ())), generator=torch.Generator().manual_seed(seed))
    mask = ss.transposable_mask(weight)
    assert mask.shape == weight.shape and mask.dtype == torch.bool
    check_semi_structured(mask)
    check_semi_structured(mask.transpose(0, 1))
    assert torch.equal(mask, ss.transposable_mask(weight))


def test_the_best_pattern_is_chosen() -> None:
    """Compared with every way to keep two of four in four rows, block by block."""
    weight = torch.randn(8, 8)
    mask = ss.transposable_mask(weight)
    for i, j in itertools.product((0, 4), (0, 4)):
        block = weight[i : i + 4, j : j + 4].abs()
        every = [torch.tensor(rows) for rows in itertools.product(PATTERNS, repeat=4)]
        most = max(float((block * one).sum()) for one in every if bool((one.sum(0) == 2).all()))
        assert float((block * mask[i : i + 4, j : j + 4]).sum()) == pytest.approx(most)


def test_gaussian_share() -> None:
    weight = torch.randn(256, 256)
    kept = float((weight.abs() * ss.transposable_mask(weight)).sum() / weight.abs().sum())
    assert kept == pytest.approx(0.703, abs=0.004)
    assert kept < kept_share(weight, magnitude_choices(weight), "channels")


def test_extreme_values_and_errors() -> None:
    weight = torch.randn(4, 4)
    weight[0, 0], weight[1, 1] = torch.nan, torch.inf
    mask = ss.transposable_mask(weight)
    assert bool(mask[0, 0]) and bool(mask[1, 1])
    with pytest.raises(ShapeError, match=r"shape \(3,\) has no 4 x 4 blocks"):
        ss.transposable_mask(torch.randn(3))
