"""The results of a session: at most eight files in one folder, each small enough to be copied easily."""

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
"""Largest size of a file, in bytes."""
LONGEST_LOG = LARGEST // 2


class Record:
    """The folder of the results, with a log and a summary that are kept up to date.

    Args:
        folder: the folder, which exists and is writable.
        facts: facts for the beginning of the summary; more may be added at any time.
        screen: stream that also receives the output; standard output by default.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], screen: TextIO | None = None) -> None:
        self.folder, self.facts = folder, facts
        self._screen = sys.stdout if screen is None else screen
        self._before = {path.name for path in folder.iterdir()}
        self._log = (folder / LOG).open("wb")
        self._written, self._lock = 0, threading.Lock()
        self._started = time.monotonic()

    def output(self, data: bytes, always: bool = False) -> None:
        """Append to the log, unless it is already too long, and to the screen."""
        with self._lock:
            room = len(data) if always else max(0, LONGEST_LOG - self._written)
            self._log.write(data[:room])
            if 0 < room < len(data):
                self._log.write(b"\nThe log is full: further output was only shown.\n")
            self._log.flush()
            self._written += len(data)
        self._screen.write(data.decode(errors="replace"))
        self._screen.flush()

    def update(self, results: Sequence[Result], ended: bool = False) -> None:
        """Rewrite the summary atomically."""
        content = {
            **self.facts,
            "ended": ended,
            "seconds": round(time.monotonic() - self._started, 1),
            "stages": [_rounded(result) for result in results],
            "files": {name: (self.folder / name).stat().st_size for name in FILES if (self.folder / name).is_file()},
        }
        beside = self.folder / f".{SUMMARY}.new"
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.folder / SUMMARY)

    def finish(self, results: Sequence[Result]) -> None:
        """Print the results of the stages, tidy up and write the final summary."""
        self.tidy()
        self.output(table(results).encode(), always=True)
        self.update(results, ended=True)
        self._log.close()

    def tidy(self) -> None:
        """Remove files left by interrupted stages, and truncate files that are too large."""
        for path in self.folder.iterdir():
            if path.name not in FILES and path.name not in self._before and path.is_file():
                path.unlink()
        for name in FILES:
            path = self.folder / name
            if path.is_file() and path.stat().st_size > LARGEST:
                os.truncate(path, LARGEST)
                self.output(f"{name} was truncated to {LARGEST} bytes.\n".encode(), always=True)


def table(results: Sequence[Result]) -> str:
    """Return the results as text, one line per stage."""
    lines = [f"\n{'stage':<14}{'state':<14}{'start':>8}{'budget':>9}{'took':>8}{'exit':>6}  reason"]
    for result in results:
        code = "" if result.exit is None else result.exit
        times = f"{result.start:>7.1f}s{result.budget:>8.1f}s{result.seconds:>7.1f}s"
        lines.append(f"{result.stage:<14}{result.state:<14}{times}{code:>6}  {result.reason}".rstrip())
    return "\n".join(lines) + "\n"


def _rounded(result: Result) -> dict[str, Any]:
    return {key: round(value, 1) if isinstance(value, float) else value for key, value in asdict(result).items()}
