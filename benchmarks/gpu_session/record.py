"""What a session leaves: at most eight files in one folder, each of a size that travels."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu_session.schedule import Result

SUMMARY, LOG, CORRECTNESS, OPS, OPS_PAGE, TUNED, MODELS, MODELS_PAGE = FILES = (
    "summary.json",
    "session.log",
    "correctness.csv",
    "ops.csv",
    "ops.md",
    "tuned.json",
    "models.csv",
    "models.md",
)
LARGEST = 16 * 2**20
"""Bytes of a file."""
LONGEST_LOG = LARGEST // 2


class Record:
    """The folder, and what is noted in it while the session goes on.

    Args:
        folder: exists and can be written to.
        facts: stand at the beginning of the summary; more may be added at any time.
        screen: shows the output as well.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], screen: TextIO | None = None) -> None:
        self.folder, self.facts = folder, facts
        self._screen = sys.stdout if screen is None else screen
        self._before = {path.name for path in folder.iterdir()}
        self._log = (folder / LOG).open("wb")
        self._written, self._lock = 0, threading.Lock()
        self._begun = time.monotonic()

    def output(self, data: bytes, always: bool = False) -> None:
        """Append to the log, as long as it is not too long, and show it."""
        with self._lock:
            room = len(data) if always else max(0, LONGEST_LOG - self._written)
            self._log.write(data[:room])
            if 0 < room < len(data):
                self._log.write(b"\nThe log is full: what follows was shown only.\n")
            self._log.flush()
            self._written += len(data)
        self._screen.write(data.decode(errors="replace"))
        self._screen.flush()

    def update(self, results: Sequence[Result], ended: bool = False) -> None:
        """Write the summary anew, in one step."""
        content = {
            **self.facts,
            "ended": ended,
            "seconds": round(time.monotonic() - self._begun, 1),
            "stages": [_rounded(result) for result in results],
            "files": {name: (self.folder / name).stat().st_size for name in FILES if (self.folder / name).is_file()},
        }
        beside = self.folder / f".{SUMMARY}.new"
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.folder / SUMMARY)

    def finish(self, results: Sequence[Result]) -> None:
        """Say how it went, and see to it that the folder holds what it may hold and nothing else."""
        self.tidy()
        self.output(table(results).encode(), always=True)
        self.update(results, ended=True)
        self._log.close()

    def tidy(self) -> None:
        """Remove what stages that were broken off have left here, and cut what is too large."""
        for path in self.folder.iterdir():
            if path.name not in FILES and path.name not in self._before and path.is_file():
                path.unlink()
        for name in FILES:
            path = self.folder / name
            if path.is_file() and path.stat().st_size > LARGEST:
                os.truncate(path, LARGEST)
                self.output(f"{name} was cut to {LARGEST} bytes.\n".encode(), always=True)


def table(results: Sequence[Result]) -> str:
    """Give the results as text, a line a stage."""
    lines = [f"\n{'stage':<14}{'state':<14}{'start':>8}{'budget':>9}{'took':>8}{'exit':>6}  reason"]
    for result in results:
        code = "" if result.exit is None else result.exit
        times = f"{result.start:>7.1f}s{result.budget:>8.1f}s{result.seconds:>7.1f}s"
        lines.append(f"{result.stage:<14}{result.state:<14}{times}{code:>6}  {result.reason}".rstrip())
    return "\n".join(lines) + "\n"


def _rounded(result: Result) -> dict[str, Any]:
    return {key: round(value, 1) if isinstance(value, float) else value for key, value in asdict(result).items()}
