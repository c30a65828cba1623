"""The order in which the grid of a sweep is covered, and its classes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from widekernel.bench import PASSES, Case
from widekernel.bench.cases import SWEPT_BATCHES, SWEPT_CHANNELS, SWEPT_MAPS, swept_cases
from widekernel.bench.sweep import class_of, ordered, units_of

CASES = [
    Case("some", batch, channels, extent, extent, kernel)
    for batch in (1, 8)
    for channels in (16, 48, 96)
    for extent in (7, 14)
    for kernel in ((3, 3), (4, 4), (13, 5))
]


@settings(max_examples=25, deadline=None)
@given(cases=st.sets(st.sampled_from(CASES), min_size=1), seed=st.integers(0, 99), length=st.integers(0, 108))
def test_every_beginning_covers_the_strata_evenly(cases: set[Case], seed: int, length: int) -> None:
    units = units_of(sorted(cases, key=str))
    order = list(ordered(units, seed))
    assert order == list(ordered(units, seed)) and set(order) == set(units) and len(order) == len(units)
    sizes = Counter(unit.stratum for unit in units)
    begun = Counter(unit.stratum for unit in order[:length])
    fewest = min((begun[stratum] for stratum in sizes if begun[stratum] < sizes[stratum]), default=length)
    assert all(count <= fewest + 1 for count in begun.values())


def test_a_short_beginning_covers_every_value() -> None:
    cases, _ = swept_cases(even=True)
    beginning = list(itertools.islice(ordered(units_of(cases), 0), 60))
    assert Counter(unit.direction for unit in beginning) == dict.fromkeys(PASSES, 20)
    assert {unit.case.kernel for unit in beginning} == {case.kernel for case in cases}
    for values, wanted in (
        ([unit.case.height for unit in beginning], SWEPT_MAPS),
        ([unit.case.channels for unit in beginning], SWEPT_CHANNELS),
        ([unit.case.batch for unit in beginning], SWEPT_BATCHES),
    ):
        counts = Counter(values)
        assert set(counts) == set(wanted) and min(counts.values()) >= 60 / len(wanted) / 2


def test_the_seed_changes_the_order() -> None:
    orders = {tuple(ordered(units_of(CASES), seed)) for seed in range(3)}
    assert len(orders) == 3


@pytest.mark.parametrize(
    ("extent", "kernel", "kind"),
    [
        (7, (3, 3), ("squares to 7", "maps to 14")),
        (15, (9, 9), ("squares to 21", "maps to 56")),
        (224, (51, 5), ("tall strips to 61", "maps to 224")),
        (224, (5, 13), ("wide strips to 21", "maps to 224")),
        (14, (8, 8), ("even to 21", "maps to 14")),
        (300, (71, 71), ("squares to 71", "maps to 300")),
    ],
)
def test_classes(extent: int, kernel: tuple[int, int], kind: tuple[str, str]) -> None:
    assert class_of(Case("some", 1, 2, extent, extent, kernel)) == kind
