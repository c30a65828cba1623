"""What a task measures: named numbers that say of themselves how to show and compare them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Description of a number that an evaluation yields.

    Args:
        name: key in metrics.jsonl and in the summary, such as val_top1
        label: name for people, such as top-1
        unit: unit, such as %; "" for a number without one
        larger_is_better: direction in which the number improves
        digits: decimals that are shown
    """

    name: str
    label: str
    unit: str = ""
    larger_is_better: bool = True
    digits: int = 2

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether `value` is better than the best so far; NaN never is, and any number is better than NaN."""
        if math.isnan(value):
            return False
        if best is None or math.isnan(best):
            return True
        return value > best if self.larger_is_better else value < best

    def text(self, value: float) -> str:
        """Return the value with its unit, such as 81.25 %."""
        return f"{value:.{self.digits}f} {self.unit}".rstrip()
