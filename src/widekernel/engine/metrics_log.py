"""File metrics.jsonl: one JSON object per line, without duplicates even if the run was interrupted.

Every row has `epoch` (counted from 1), `step` (optimizer steps done), `lr` and, unless all steps since the previous row were
skipped, `train_loss` (their mean). The last row of an epoch also has the metrics of the evaluation.
"""

import json
import os
from pathlib import Path
from typing import Any

from widekernel.errors import WidekernelError
from widekernel.files import explained


class MetricsLog:
    """File of rows that can be cut back to an earlier length, which training states store.

    Attributes:
        path: the file
        rows: number of complete rows in the file, without those that could not be written yet
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._size: int | None = None  # in bytes, of the rows in the file
        self._waiting: list[bytes] = []

    def truncate(self, rows: int) -> None:
        """Keep only the first `rows` rows.

        Raises:
            WidekernelError: the file cannot be written, or has fewer rows and so does not belong to the training state.
        """
        with explained(self.path):
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if len(lines) < rows or (rows and not lines[rows - 1].endswith(b"\n")):
            raise WidekernelError(
                f"{self.path} has {len(lines)} rows, but the training state was saved after {rows}: the file was "
                "changed. Restore it, or choose another --output."
            )
        self.rows, self._size, self._waiting = rows, sum(len(line) for line in lines[:rows]), []
        if lines:
            with explained(self.path), self.path.open("ab") as file:
                file.truncate(self._size)

    def append(self, row: dict[str, Any]) -> None:
        """Append one row, and pass it to the file system.

        Raises:
            WidekernelError: the file cannot be written. The row is written with the next one that can be.
        """
        self._waiting.append((json.dumps(row) + "\n").encode())
        self._write_waiting()

    def _write_waiting(self) -> None:
        content = b"".join(self._waiting)
        with explained(self.path), self.path.open("ab", buffering=0) as file:
            there = os.fstat(file.fileno()).st_size
            size = there if self._size is None else self._size
            if there < size:
                raise WidekernelError(
                    f"{self.path} has {there} bytes, but {size} were written: the file was changed or removed. Restore it."
                )
            file.truncate(size)  # a write that failed may have left a part of a row
            try:
                written = 0
                while written < len(content):
                    written += file.write(content[written:])
            except OSError:
                file.truncate(size)
                raise
        self.rows += len(self._waiting)
        self._size, self._waiting = size + len(content), []

    def sync(self) -> None:
        """Force all rows to disk, before a training state refers to them.

        Raises:
            WidekernelError: rows cannot be written.
        """
        if self._waiting:
            self._write_waiting()
        if self.path.exists():
            with explained(self.path), self.path.open("ab") as file:
                os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all complete rows of a metrics file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
