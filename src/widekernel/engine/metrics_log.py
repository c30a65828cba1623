"""File metrics.jsonl: one JSON object per line, without duplicates even if the run was interrupted.

Every row has `epoch` (counted from 1), `step` (optimizer steps done), `train_loss` (mean since the previous row) and
`lr`. The last row of an epoch also has the metrics of the evaluation.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from widekernel.errors import WidekernelError
from widekernel.files import explained


class MetricsLog:
    """File of rows that can be cut back to an earlier length, which training states store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0

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
        self.rows = rows
        if not lines:
            return
        with explained(self.path), self.path.open("ab") as file:
            file.truncate(sum(len(line) for line in lines[:rows]))

    def append(self, row: dict[str, Any]) -> None:
        """Append one row, and pass it to the file system.

        Raises:
            WidekernelError: the file cannot be written; it is as it was, so that later rows can follow.
        """
        left = (json.dumps(row) + "\n").encode()
        with explained(self.path), self.path.open("ab", buffering=0) as file:
            length = file.seek(0, os.SEEK_END)
            try:
                while left:  # a disk that becomes full takes a part
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(length)
                raise
        self.rows += 1

    def sync(self) -> None:
        """Force all rows to disk, before a training state refers to them."""
        if self.path.exists():
            with explained(self.path), self.path.open("ab") as file:
                os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all complete rows of a metrics file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
