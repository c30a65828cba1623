"""All logs of a run: metrics.jsonl, which is the truth, and further loggers, which never take the run down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from widekernel.engine.logger import Logger
from widekernel.engine.metrics_log import MetricsLog, read_metrics
from widekernel.errors import in_short


class RunLog:
    """All logs of a run. It has the interface of `MetricsLog`, and passes rows on to the loggers.

    Args:
        path: path of metrics.jsonl
        loggers: further loggers; only the process that writes files has any
        message: shows a message when a logger fails
    """

    def __init__(self, path: Path, loggers: Sequence[Logger] = (), message: Callable[[str], object] | None = None) -> None:
        self.metrics = MetricsLog(path)
        self._loggers = list(loggers)
        self._message = message or (lambda text: None)

    @property
    def rows(self) -> int:
        """Number of rows in metrics.jsonl."""
        return self.metrics.rows

    def truncate(self, rows: int) -> None:
        """Keep only the first `rows` rows, and open the loggers, or set them back, to continue from there.

        Called before any `append`.

        Raises:
            WidekernelError: see `MetricsLog.truncate`.
        """
        before = read_metrics(self.metrics.path) if self._loggers else []
        self.metrics.truncate(rows)
        logged = before[-1]["step"] if before else 0
        self._each(lambda logger: logger.resume(before[:rows], logged))

    def append(self, row: dict[str, Any]) -> None:
        """Append one row, which has a `step`, to all logs.

        Raises:
            WidekernelError: metrics.jsonl cannot be written. The loggers have the row.
        """
        try:
            self.metrics.append(row)
        finally:  # if the run goes on, metrics.jsonl gets the row later
            self._each(lambda logger: logger.row(row["step"], row))

    def sync(self) -> None:
        """Force all rows to disk, before a training state refers to them.

        Raises:
            WidekernelError: metrics.jsonl cannot be written.
        """
        self.metrics.sync()
        self._each(lambda logger: logger.flush())

    def close(self, finished: bool) -> None:
        """Close the loggers; `finished` tells a run that came to its end from one that was stopped or failed."""
        self._each(lambda logger: logger.close(finished))
        self._loggers.clear()

    def _each(self, act: Callable[[Logger], object]) -> None:
        for logger in tuple(self._loggers):
            try:
                act(logger)
            except Exception as error:
                self._loggers.remove(logger)
                self._message(
                    f"{logger.name} is off from now on, because it failed ({in_short(error)}). The run goes on, and "
                    f"{self.metrics.path} has all rows."
                )
                with suppress(Exception):
                    logger.close(finished=False)
