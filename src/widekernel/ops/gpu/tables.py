"""Tables of configurations: the one that is shipped, and the one that `widekernel tune` keeps for this machine.

A table is a JSON file {"format": 1, "gpus": {gpu: {problem: entry}}}. `gpu` is an architecture such as sm_90 in the table
that is shipped, and the full name of the device in that of a machine. An entry is {"config": …, "us": …,
"pytorch_us": …, …}, its times null where nothing was measured.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from widekernel.errors import ArgumentError
from widekernel.ops.gpu.configs import Chip, Config, from_entry, power_of_two
from widekernel.ops.problem import Problem

FORMAT = 1
VARIABLE = "WIDEKERNEL_TUNED"
"""Environment variable: the file of this machine's table, or 0 for none."""
SHIPPED = Path(__file__).parent / "configurations.json"
_FIX = f"remove it and run `widekernel tune` again, or set {VARIABLE}=0"

Entries = dict[str, dict[str, Any]]


def key_of(problem: Problem) -> str:
    """Give the line of a table that a problem belongs to; batch and channels are rounded up to powers of two."""
    batch, channels, height, width = problem.shape
    rects = "+".join(f"{kh}x{kw}@{r},{c}" for (kh, kw), (r, c) in zip(problem.kernels, problem.anchors))
    kind = str(problem.dtype).removeprefix("torch.") + (" tf32" if problem.tf32 else "")
    layout = "NHWC" if problem.channels_last else "NCHW"
    sizes = f"N{power_of_two(batch)} C{power_of_two(channels)} {height}x{width}"
    how = f" {problem.algorithm}" if problem.algorithm else ""
    return f"{problem.op} {kind} {layout} {sizes} {rects}{how}"


def tuned_file() -> Path | None:
    """Give the file of this machine's table, whether or not it exists; None if the environment says there is none."""
    named = os.environ.get(VARIABLE)
    if named == "0":
        return None
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "widekernel" / "tuned.json"


def read(path: Path) -> dict[str, Entries]:
    """Read a table and check all of it.

    Raises:
        ArgumentError: if the file is not such a table.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be read as a table of configurations ({error}): {_FIX}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("gpus"), dict):
        raise ArgumentError(f'{path} is no table of configurations of format {FORMAT}, with "gpus": {_FIX}')
    for gpu, entries in content["gpus"].items():
        for key, entry in entries.items():
            try:
                from_entry(entry["config"])
            except (TypeError, KeyError, ArgumentError) as error:
                raise ArgumentError(f"{path} has a bad entry for {key} on {gpu} ({error}): {_FIX}") from error
    return content["gpus"]


def write(path: Path, gpus: dict[str, Entries]) -> None:
    """Write a table in one step, so that whoever reads or breaks off meanwhile finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps({"format": FORMAT, "gpus": gpus}, indent=1, sort_keys=True) + "\n")
    beside.replace(path)


def entry_of(problem: Problem, chip: Chip, device: str) -> tuple[dict[str, Any], str] | None:
    """Give the entry for a problem and where it comes from, this machine's table first; None if there is none."""
    key = key_of(problem)
    path = tuned_file()
    if path is not None:
        entry = _tuned(path, _stamp(path)).get(device, {}).get(key)
        if entry is not None:
            return entry, "tuned on this machine"
    entry = _shipped().get(chip.name, {}).get(key)
    return None if entry is None else (entry, "shipped table")


def config_of(entry: dict[str, Any]) -> Config:
    """Give the configuration of an entry."""
    return from_entry(entry["config"])


def _stamp(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


@lru_cache(maxsize=8)
def _tuned(path: Path, stamp: float | None) -> dict[str, Entries]:
    if stamp is None:
        return {}
    try:
        return read(path)
    except ArgumentError as error:
        # A spoilt cache costs speed, which the user should know, but no run.
        warnings.warn(f"{error}. Until then the shipped table and estimates are used.", RuntimeWarning, stacklevel=2)
        return {}


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Entries]:
    return read(SHIPPED) if SHIPPED.exists() else {}
