"""The program: prepares the Python of the machine, runs the stages, and collects the results in one folder."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import shutil
import signal
import site
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu_session import wheels
from benchmarks.gpu_session.record import FILES, Record
from benchmarks.gpu_session.schedule import DONE, Result, Schedule
from benchmarks.gpu_session.stages import stages

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "build" / "offline-bundle"
MINUTES = 9.0
_RESERVE = 6.0
"""Seconds reserved for the work after the last stage."""
_USAGE_ERROR = 2
# Variables that would change the measurements, or that point to files that must not be used.
_DROPPED = ("TRITON_INTERPRET", "WIDEKERNEL_REQUIRE_NATIVE", "WIDEKERNEL_LIBRARY", "WIDEKERNEL_ISA", "PYTHONHOME")


class UsageError(Exception):
    """The session cannot begin."""


def main(arguments: Sequence[str]) -> int:
    """Run a session; return 0 if every stage was done, 1 if not, 2 if it could not begin, 128 + n for signal n."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    scratch = None
    try:
        out = _folder(options.out)
        if not 0 < options.minutes < 1440:
            raise UsageError(f"--minutes is {options.minutes:g}, but must be positive and less than a day")
        scratch = _scratch(out)
        return _run(options, out, scratch, started)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return _USAGE_ERROR
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_session", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, new or empty")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time for everything; default {MINUTES:g}")
    usual = "default: build/offline-bundle, if it exists"
    parser.add_argument("--wheels", type=Path, default=None, help=f"folder that `make offline-bundle` has filled; {usual}")
    parser.add_argument("--rehearse", action="store_true", help="use a pretended GPU, with tiny sizes")
    return parser


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _folder(path: Path) -> Path:
    """Create the folder of the results, or check that it is empty and writable."""
    try:
        path = path.expanduser().resolve()
        path.mkdir(parents=True, exist_ok=True)
        there = [entry.name for entry in path.iterdir()]
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:
        raise UsageError(f"--out is {path}, where nothing can be written ({error}): give another folder") from error
    if there:
        raise UsageError(
            f"--out is {path}, which holds {sorted(there)[0]}: give a new folder, so that results are not mixed up"
        )
    return path


def _scratch(out: Path) -> Path:
    """Create a folder for caches and unpacked packages, because home folder and source tree may not be writable."""
    try:
        return Path(tempfile.mkdtemp(prefix="widekernel-"))
    except OSError:
        return Path(tempfile.mkdtemp(prefix=".scratch-", dir=out))


def _run(options: argparse.Namespace, out: Path, scratch: Path, started: float) -> int:
    facts: dict[str, Any] = {
        "begun": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "rehearsal": options.rehearse,
        "executable": sys.executable,
    }
    record = Record(out, facts)
    if options.rehearse:
        record.output(b"A REHEARSAL: the GPU is pretended, and all numbers are meaningless.\n")
    _prepare(options.wheels, scratch / "site", record)
    found = scratch / "facts.json"
    left = 60 * options.minutes - (time.monotonic() - started) - _RESERVE
    schedule = Schedule(stages(out, found, options.rehearse), left, _FactRecorder(record, found), environment(scratch))
    code = 0
    try:
        schedule.run()
    except KeyboardInterrupt as error:
        code = 128 + (error.args[0] if error.args else signal.SIGINT)
    record.finish(schedule.results)
    _print_outcome(schedule.results, out, time.monotonic() - started)
    return code or int(any(result.state != DONE for result in schedule.results))


def _prepare(folder: Path | None, target: Path, record: Record) -> None:
    """Unpack the packages that this Python lacks; some stages may work without all of them."""
    target.mkdir()
    if folder is None and not BUNDLE.is_dir():
        record.output(b"No folder of wheels was given: this Python must have all packages.\n")
        return
    try:
        unpacked, foreign = wheels.unpack(folder or BUNDLE, target)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        record.output(f"error: {error}\n".encode())
        return
    record.facts["unpacked"] = unpacked
    record.output(f"From the wheels: {', '.join(unpacked) or 'nothing, this Python has all packages'}\n".encode())
    if foreign:
        record.output(f"error: left out wheels for another Python: {', '.join(foreign)}\n".encode())


def environment(scratch: Path) -> dict[str, str]:
    """Return the environment of the stages: our source comes first, and every cache is in a writable folder."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    path = [str(ROOT / "src"), str(ROOT), str(scratch / "site"), os.environ.get("PYTHONPATH", "")]
    folders = {
        "HOME": "home",
        "TMPDIR": "tmp",
        "XDG_CACHE_HOME": "cache",
        "TRITON_CACHE_DIR": "cache/triton",
        "TORCHINDUCTOR_CACHE_DIR": "cache/inductor",
        "MPLCONFIGDIR": "cache/matplotlib",
        "HF_HOME": "cache/huggingface",
    }
    for name in folders.values():
        (scratch / name).mkdir(parents=True, exist_ok=True)
    return {
        **kept,
        **{name: str(scratch / folder) for name, folder in folders.items()},
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "PYTHONUSERBASE": site.getuserbase(),  # packages of the user, although HOME is changed
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "OMP_WAIT_POLICY": "passive",
        "WIDEKERNEL_NATIVE": "0",  # the native CPU library need not be built
    }


class _FactRecorder:
    """A recorder that passes everything on to the record, with the facts about the machine once they are known."""

    def __init__(self, record: Record, found: Path) -> None:
        self._record, self._found = record, found

    def output(self, data: bytes) -> None:
        self._record.output(data)

    def update(self, results: Sequence[Result]) -> None:
        if "machine" not in self._record.facts and self._found.is_file():
            self._record.facts["machine"] = json.loads(self._found.read_text(encoding="utf-8"))
        self._record.update(results)


def _print_outcome(results: Sequence[Result], out: Path, seconds: float) -> None:
    files = [name for name in FILES if (out / name).is_file()]
    bad = [f"{result.stage}: {result.state}, {result.reason}" for result in results if result.state != DONE]
    print(f"{seconds:.0f} s; in {out}: {', '.join(files)}")
    for line in bad:
        print(line)
