"""The grid of a sweep, its classes, and the order in which it is measured.

A unit of the grid is one pass of one case. It has two cells, one for each layout, which are measured together.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from widekernel.bench.cases import PASSES, Case
from widekernel.bench.rows import SweepRow

# Upper limits of the classes of kernels (longer side) and of maps.
_KERNELS, _MAPS = (7, 21, 61), (14, 56, 224)
# Weight of a single property of a unit, relative to that of a pair of properties.
_SINGLE = 10.0


@dataclass(frozen=True)
class Unit:
    """One pass of one case."""

    case: Case
    direction: str

    @property
    def key(self) -> tuple[str, str]:
        """The texts by which rows name the unit."""
        return str(self.case), self.direction

    @property
    def stratum(self) -> Hashable:
        """What a longer sweep covers once before it covers anything twice: the pass, the kernel and the map."""
        return self.direction, self.case.kernel, self.case.shape[2:]


def units_of(cases: Sequence[Case]) -> list[Unit]:
    """Return all units of a grid."""
    return [Unit(case, direction) for case in cases for direction in PASSES]


def class_of(case: Case) -> tuple[str, str]:
    """Return the class of a kernel and that of a map, such as "squares to 21" and "maps to 56"."""
    (kh, kw), longer = case.kernel, max(case.kernel)
    kind = "even" if kh % 2 == 0 or kw % 2 == 0 else "squares" if kh == kw else "tall strips" if kh > kw else "wide strips"
    size = next((limit for limit in _KERNELS if longer <= limit), longer)
    extent = next((limit for limit in _MAPS if max(case.shape[2:]) <= limit), max(case.shape[2:]))
    return f"{kind} to {size}", f"maps to {extent}"


def case_of(row: SweepRow) -> Case:
    """Return the case of a row."""
    return Case(row.case, row.batch, row.channels, row.height, row.width, (row.kernel_height, row.kernel_width))


def ordered(units: Sequence[Unit], seed: int) -> Iterator[Unit]:
    """Yield all units so that every beginning of the sequence is spread evenly over the grid.

    The next unit is in one of the strata with the fewest units so far. Among those, it is the unit whose properties (pass,
    kernel, map, channels, batch) and pairs of properties have been used least so far, relative to the number of units that
    have them. The seed decides between equals.
    """
    chance = random.Random(seed)
    members = [_members(units, axis) for axis in _axes(units)]
    strata: dict[Hashable, list[int]] = defaultdict(list)
    for number, unit in enumerate(units):
        strata[unit.stratum].append(number)
    # One unit in a stratum weighs more than all shares, each of which is at most 1.
    most = 1 + sum(weight for weight, _, _ in members)
    # Chance is weaker than any difference of shares.
    score = np.array([chance.random() for _ in units]) * 1e-6
    for _ in units:
        chosen = int(score.argmin())
        unit = units[chosen]
        yield unit
        score[strata[unit.stratum]] += most
        for weight, values, indices in members:
            alike = indices[values[chosen]]
            score[alike] += weight / len(alike)
        score[chosen] = np.inf


def _axes(units: Sequence[Unit]) -> Iterator[tuple[float, list[Hashable]]]:
    """Yield the values of every property and of every pair of them, with their weight."""
    properties: list[list[Hashable]] = [
        [unit.direction for unit in units],
        [unit.case.kernel for unit in units],
        [unit.case.shape[2:] for unit in units],
        [unit.case.channels for unit in units],
        [unit.case.batch for unit in units],
    ]
    for values in properties:
        yield _SINGLE, values
    for one, other in itertools.combinations(properties, 2):
        yield 1.0, list(zip(one, other))


def _members(
    units: Sequence[Unit], axis: tuple[float, list[Hashable]]
) -> tuple[float, list[Hashable], dict[Hashable, np.ndarray]]:
    """Return the weight and the values of an axis, and which units have each value."""
    weight, values = axis
    found: dict[Hashable, list[int]] = defaultdict(list)
    for number, value in enumerate(values):
        found[value].append(number)
    return weight, values, {value: np.array(numbers) for value, numbers in found.items()}
