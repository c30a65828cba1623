"""The loop of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from widekernel.bench.cases import Case
from widekernel.bench.checking import check_operator
from widekernel.bench.operators import OperatorPlan, measure_operators
from widekernel.bench.platforms import Platform
from widekernel.bench.precision import FLOAT32, Precision
from widekernel.bench.rows import SweepRow
from widekernel.bench.sweep.grid import case_of, class_of, ordered, units_of
from widekernel.bench.sweep.record import Record
from widekernel.bench.time_budget import TimeBudget

# A call that takes more than the second share of `longest` is made once, one that takes more than the first share twice.
_PATIENCE = 0.2, 0.8
# Size of the images of the check, which may exceed it only to hold a single plane: the definition is computed tap by tap.
_CHECKED_NUMBERS, _CHECKED_CHANNELS = 50_000, 17


@dataclass(frozen=True)
class SweepPlan:
    """What to sweep, and how.

    Attributes:
        cases: the convolutions of the grid.
        precision: type of the tensors.
        seed: determines the order.
        seconds: time to spend on each implementation of each unit.
        longest: seconds; slower calls of PyTorch are timed on fewer images.
    """

    cases: Sequence[Case]
    precision: Precision = FLOAT32
    seed: int = 0
    seconds: float = 0.05
    longest: float = 1.0


def measure_sweep(
    plan: SweepPlan,
    platform: Platform,
    record: Record,
    budget: TimeBudget,
    advance: Callable[[str, int], None] = lambda what, steps: None,
) -> None:
    """Measure the units that the record lacks, in order, until the time is over; add the rows of each to the record.

    Args:
        plan: what to sweep.
        platform: the CPU.
        record: receives the rows.
        budget: tells when the time is over.
        advance: called with a description of the next step, and the number of units that were finished.

    Raises:
        BenchmarkError: if our operator computes wrong results: on a small shape of the class of a unit, which is compared
            with the definition in float64 before the first unit of the class, or in a unit.
    """
    slow, very_slow = _PATIENCE
    platform = replace(platform, operator_patience=(slow * plan.longest, very_slow * plan.longest))
    done = {(row.shape, row.direction) for row in record.rows}
    checked = {class_of(case_of(row)) for row in record.rows}
    for unit in ordered(units_of(plan.cases), plan.seed):
        if unit.key in done:
            advance("", 1)
            continue
        if not budget.has_time():
            return
        left = f"{budget.seconds_left() / 60:.1f} min left"
        kind = class_of(unit.case)
        if kind not in checked:
            advance(f"{left}, checking {' on '.join(kind)}", 0)
            check_class(unit.case, plan.precision)
            checked.add(kind)
        advance(f"{left}, {unit.direction} of {unit.case}", 0)
        settings = OperatorPlan([unit.case], [plan.precision], [unit.direction], seconds=plan.seconds, longest=plan.longest)
        of_unit = TimeBudget()  # unlimited: what has been started is finished
        rows = [row for row in measure_operators(settings, platform, of_unit) if isinstance(row, SweepRow)]
        of_unit.finish()
        record.append(rows)
        advance("", 1)


def check_class(case: Case, precision: Precision) -> None:
    """Compare our operator with its definition in float64, with the kernel and the map of a case, and few channels.

    Raises:
        BenchmarkError: if a number is wrong.
    """
    kh, kw = case.kernel
    planes = max(1, _CHECKED_NUMBERS // (case.height * case.width))
    images = min(2, planes)
    shape = images, min(_CHECKED_CHANNELS, planes // images), case.height, case.width
    check_operator(problems=[(shape, [((kh, kw), (kh // 2, kw // 2))])], precision=precision)
