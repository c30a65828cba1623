"""Matching of candidates to boxes."""

from __future__ import annotations

import pytest
import torch

from widekernel.dense.detection.matching import NEGATIVE, NEITHER, MatchOptions, match
from widekernel.errors import ArgumentError

BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
# Overlaps with the first box: 1, 0.5, 0.2, 0. With the second: 0, 0, 0, 0.4.
CANDIDATES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 5.0, 10.0], [0.0, 0.0, 2.0, 10.0], [20.0, 0.0, 24.0, 10.0]])


def test_positive_negative_and_neither() -> None:
    matches = match(BOXES, CANDIDATES, MatchOptions(0.7, 0.3))
    assert matches.index.tolist() == [0, NEITHER, NEGATIVE, NEITHER]
    torch.testing.assert_close(matches.overlap, torch.tensor([1.0, 0.5, 0.2, 0.4]))


@pytest.mark.parametrize(("lowest", "last"), [(0.3, 1), (0.5, NEITHER)])
def test_the_best_candidates_of_a_box_stand_for_it(lowest: float, last: int) -> None:
    index = match(BOXES, CANDIDATES, MatchOptions(0.7, 0.3, lowest, low_quality=True)).index
    assert index.tolist() == [0, NEITHER, NEGATIVE, last]


def test_all_equally_good_candidates_stand_for_a_box_and_leave_a_better_one() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 20.0]])
    twice = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0]])
    options = MatchOptions(0.7, 0.3, 0.3, low_quality=True)
    assert match(boxes, twice, options).index.tolist() == [1, 1]
    assert match(boxes.flip(0), twice, options).index.tolist() == [1, 1]
    assert match(boxes, twice, MatchOptions(0.7, 0.3)).index.tolist() == [0, 0]


def test_unusable_candidates_stand_for_nothing() -> None:
    usable = torch.tensor([False, True, True, False])
    matches = match(BOXES, CANDIDATES, MatchOptions(0.7, 0.3, 0.3, low_quality=True), usable)
    # Without the first candidate, the second one is the best of the first box.
    assert matches.index.tolist() == [NEITHER, 0, NEGATIVE, NEITHER]
    assert matches.overlap.tolist()[::3] == [-1.0, -1.0]


def test_no_boxes_or_no_candidates() -> None:
    usable = torch.tensor([True, True, False, True])
    assert match(BOXES[:0], CANDIDATES, MatchOptions(0.7, 0.3)).index.tolist() == [NEGATIVE] * 4
    assert match(BOXES[:0], CANDIDATES, MatchOptions(0.7, 0.3), usable).index.tolist() == [-1, -1, NEITHER, -1]
    assert match(BOXES, CANDIDATES[:0], MatchOptions(0.7, 0.3, low_quality=True)).index.shape == (0,)


@pytest.mark.parametrize("wrong", [(0.3, 0.7), (1.5, 0.3), (0.7, -0.1), (0.7, 0.3, 2.0)])
def test_rules_are_checked(wrong: tuple) -> None:
    with pytest.raises(ArgumentError, match="must lie between 0 and 1, and negative must not be above positive"):
        MatchOptions(*wrong)
