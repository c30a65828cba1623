"""Interface of the logs of a run besides metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Logger(Protocol):
    """Further place that gets the rows of metrics.jsonl. Its errors turn it off and do not reach the run."""

    name: str
    """Name of the place in messages, such as TensorBoard."""

    def resume(self, rows: Sequence[Mapping[str, Any]], logged: int) -> None:
        """Open the log, before the first row; or, if it is open, go back to an earlier step.

        Args:
            rows: rows of metrics.jsonl from which the run goes on; none if it starts.
            logged: step of the last row that was ever written, or 0; rows after those in `rows` will come again.
        """

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        """Log the row that was added to metrics.jsonl after `step` optimizer steps."""

    def flush(self) -> None:
        """Write all rows, before a training state refers to them, if the log cannot get them again from `resume`."""

    def close(self, finished: bool) -> None:
        """Close the log; `finished` tells a run that came to its end from one that was stopped or failed."""


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row that are worth a curve: all but `step` and what is no number."""
    return {
        key: value
        for key, value in row.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
