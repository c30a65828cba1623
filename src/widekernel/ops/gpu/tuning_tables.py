"""Tuning tables: the shipped one, and the one that `widekernel tune` keeps for this machine.

A table is a JSON file {"format": 1, "gpus": {gpu: {problem: entry}}}. In the shipped table, `gpu` is an architecture such as
sm_90; in the table of a machine, it is the full name of the device. An entry is {"config": …, "us": …, "pytorch_us": …, …}.
Its times are in microseconds, and null if not measured.

A file that changes is read again at the next choice. The dispatcher and compiled code remember earlier choices, so a process
computes a given shape in the same way until it ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from widekernel.errors import ArgumentError
from widekernel.files import write_atomically
from widekernel.ops.gpu.kernel_configs import Chip, KernelConfig, config_from_entry
from widekernel.ops.gpu.launch_geometry import next_power_of_two
from widekernel.ops.problem import Problem

FORMAT = 1
VARIABLE = "WIDEKERNEL_TUNED"
"""Environment variable that names the file of this machine's table, or is 0 for no table."""
SHIPPED = Path(__file__).parent / "configurations.json"
_FIX = f"remove it and run `widekernel tune` again, or set {VARIABLE}=0"

Entry = dict[str, Any]
Entries = dict[str, Entry]
_Stamp = tuple[int, int, int]


def table_key(problem: Problem) -> str:
    """Return the key of a problem in tables; batch and channels are rounded up to powers of two.

    A dilation other than 1 follows the anchor of its rectangle, as in 3x3@1,1*5.
    """
    batch, channels, height, width = problem.shape
    rects = "+".join(
        f"{kh}x{kw}@{r},{c}" + (f"*{dilation}" if dilation != 1 else "")
        for (kh, kw), (r, c), dilation in zip(problem.kernels, problem.anchors, problem.dilations)
    )
    kind = str(problem.dtype).removeprefix("torch.") + (" tf32" if problem.tf32 else "")
    sizes = f"N{next_power_of_two(batch)} C{next_power_of_two(channels)} {height}x{width}"
    how = f" {problem.algorithm}" if problem.algorithm else ""
    return f"{problem.op} {kind} {problem.layout} {sizes} {rects}{how}"


def tuned_file() -> Path | None:
    """Return the file of this machine's table, whether or not it exists; None if tables are switched off."""
    named = os.environ.get(VARIABLE)
    if named == "0":
        return None
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG standard says to ignore relative paths in that variable.
        folder = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    return folder / "widekernel" / "tuned.json"


def read(path: Path) -> dict[str, Entries]:
    """Read a table and validate all of it.

    Raises:
        ArgumentError: if the file is not a valid table.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} cannot be read as a table of configurations ({error}): {_FIX}") from error
    gpus = content.get("gpus") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(gpus, dict) or not all(isinstance(entries, dict) for entries in gpus.values()):
        raise ArgumentError(f'{path} is not a table of configurations in format {FORMAT}, with "gpus": {_FIX}')
    for gpu, entries in gpus.items():
        for key, entry in entries.items():
            try:
                _check(entry)
            except (TypeError, KeyError, ValueError) as error:
                raise ArgumentError(f"{path} has a bad entry for {key} on {gpu} ({error!r}): {_FIX}") from error
    return gpus


def write(path: Path, gpus: dict[str, Entries]) -> None:
    """Write a table atomically: readers see the old one or the new one, even if writing is interrupted."""
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "gpus": gpus}, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def merge(path: Path, gpu: str, entries: Entries) -> None:
    """Add entries to a table, replacing those for the same problems; entries that others wrote in the meantime are kept.

    Raises:
        ArgumentError: if the file exists and is not a valid table; it is left unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        gpus = read(path) if path.exists() else {}
        gpus[gpu] = gpus.get(gpu, {}) | entries
        write(path, gpus)


def find_entry(problem: Problem, chip: Chip, device: str) -> tuple[Entry, str] | None:
    """Return the entry for a problem and its origin, preferring this machine's table; None if there is none."""
    key = table_key(problem)
    path = tuned_file()
    if path is not None:
        entry = _loaded(path, _stamp(path)).get(device, {}).get(key)
        if entry is not None:
            return entry, "tuned on this machine"
    entry = _loaded(SHIPPED, _stamp(SHIPPED)).get(chip.name, {}).get(key)
    return None if entry is None else (entry, "shipped table")


def entry_config(entry: Entry) -> KernelConfig:
    """Return the configuration of an entry."""
    return config_from_entry(entry["config"])


def _check(entry: Entry) -> None:
    """Raise unless `entry` is valid, so that using it at run time cannot fail."""
    if not isinstance(entry, dict) or not isinstance(entry["config"], dict):
        raise TypeError(f"it is {entry!r}, not an object with a config")
    config_from_entry(entry["config"])
    for name in ("us", "pytorch_us"):
        time = entry.get(name)
        if time is not None and (type(time) not in (int, float) or not 0 < time < math.inf):
            raise TypeError(f"{name} is {time!r}, not a positive number or null")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder, where the system supports it: other processes that merge into one of its tables wait.

    Without the lock, no table is damaged, but if two processes merge at the same moment, one may lose its entry.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _stamp(path: Path) -> _Stamp | None:
    """Return a value that changes whenever the file is replaced, even several times within one tick of the clock."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


@lru_cache(maxsize=8)
def _loaded(path: Path, stamp: _Stamp | None) -> dict[str, Entries]:
    if stamp is None:
        return {}
    try:
        return read(path)
    except ArgumentError as error:
        # A damaged table costs speed, so the user should be told, but it must not end a run.
        warnings.warn(f"{error}. Until then it is ignored: other tables or estimates decide.", RuntimeWarning, stacklevel=2)
        return {}
