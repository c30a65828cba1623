"""Count of a job's starts, which bounds its restarts without progress."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from widekernel.files import write_file

_STATE = re.compile(r"step-(\d{8,})\.pt$")


@dataclass(frozen=True)
class Starts:
    """Starts of one job, as `slurm/restarts.json` in the run folder records them.

    Args:
        job: identifier of the job
        starts: number of starts so far
        step: optimizer steps of the newest training state at the last start; -1 if there was none
        without_progress: starts in a row, up to the last one, that found no newer training state than the start before
    """

    job: str
    starts: int
    step: int
    without_progress: int


def newest_step(run_folder: Path) -> int:
    """Return the number of optimizer steps of the newest training state in a run folder; -1 if there is none."""
    try:
        names = [path.name for path in (run_folder / "checkpoints").iterdir()]
    except OSError:
        return -1
    return max((int(match.group(1)) for match in map(_STATE.match, names) if match), default=-1)


def read_starts(run_folder: Path, job: str) -> Starts | None:
    """Return the record of the job `job`; `None` if there is none, if it is damaged, or if it belongs to another job."""
    try:
        record = Starts(**json.loads(_path(run_folder).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return record if record.job == job else None


def note_start(run_folder: Path, job: str) -> Starts:
    """Record that the job starts, and return the record.

    Raises:
        WidekernelError: the record cannot be written.
    """
    before, step = read_starts(run_folder, job), newest_step(run_folder)
    if before is None:
        record = Starts(job, 1, step, 0)
    else:
        idle = before.without_progress + 1 if step <= before.step else 0
        record = Starts(job, before.starts + 1, step, idle)
    _path(run_folder).parent.mkdir(parents=True, exist_ok=True)
    write_file(_path(run_folder), (json.dumps(asdict(record)) + "\n").encode())
    for claim in _path(run_folder).parent.glob("restart-*.claim"):
        with suppress(OSError):
            claim.unlink()
    return record


def may_restart(run_folder: Path, record: Starts, max_restarts: int) -> bool:
    """Return whether the job made progress since its last start, or has restarts without progress left."""
    return newest_step(run_folder) > record.step or record.without_progress < max_restarts


def claim_restart(run_folder: Path, record: Starts) -> bool:
    """Return whether this process is the first of the job to ask for its restart; any process may ask."""
    path = _path(run_folder).with_name(f"restart-{record.job}-{record.starts}.claim")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _path(run_folder: Path) -> Path:
    return run_folder / "slurm" / "restarts.json"
