"""Whole runs of the command line under fire: what its processes are sent, and where it strikes them.

The command and its processes are forked from one process that has imported everything, instead of started, and the
processes wait for a moment at the place that is to be struck. All else is the command `widekernel train --processes N`.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tests import pictures

from widekernel.cli import main as command_line
from widekernel.engine import distributed, loop, state_file
from widekernel.engine.heartbeat import Heartbeat
from widekernel.engine.optimizer_step import OptimizerStep
from widekernel.launch import local
from widekernel.tasks.classification import run as classification

DWELL_S = 0.15
"""Seconds for which a process waits at the place that is to be struck."""

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


@dataclass(frozen=True)
class Place:
    """Where in the run a process is struck.

    Args:
        name: name of the place
        target: object that has the function, and the name of the function
        takes: whether a call counts, from its arguments
        joined: whether the processes know of each other by then
    """

    name: str
    target: tuple[Any, str]
    takes: Callable[..., bool] = lambda *_, **__: True
    joined: bool = True


def _phase(text: str, step: int) -> Callable[..., bool]:
    return lambda _, at, phase: phase.startswith(text) and at >= step


PLACES = (
    Place("start", (command_line, "_run"), joined=False),
    Place("meeting", (distributed, "_meet"), joined=False),
    Place("opening the data", (classification, "open_train_and_val")),
    Place("building the network", (classification, "build_model")),
    Place("resuming", (loop.Trainer, "_resume_or_start")),
    Place("loading images", (Heartbeat, "note"), _phase("loading the images", 3)),
    Place("step", (Heartbeat, "note"), _phase("training step", 2)),
    Place("backward pass", (OptimizerStep, "make")),
    Place("evaluation", (Heartbeat, "note"), _phase("evaluating", 4)),
    Place("saving", (Heartbeat, "note"), _phase("saving", 2)),
    Place("writing a state", (state_file, "replace_atomically")),
    Place("results", (classification, "write_results")),
    Place("end", (Heartbeat, "finish")),
)
ONLY_MAIN = ("writing a state", "results")
"""Places that only process 0 passes."""


@dataclass(frozen=True)
class Strike:
    """What happens to one of the processes.

    Args:
        victim: rank of a process, or -1 for the launcher
        signals: signals, in this order
        place: name of the place; of the launcher, that of process 0
        delay_s: seconds after the process arrived there
        worker: whether it strikes the newest child of the victim instead, such as a loading process
    """

    victim: int
    signals: tuple[int, ...]
    place: str
    delay_s: float
    worker: bool = False


@dataclass
class Outcome:
    """What was left of a command.

    Args:
        code: its exit code, negative for a signal; `None` if it had to be killed
        seconds: from the strike, or from the start, to its end
        text: what it wrote
        pids: process numbers by rank; -1 is the launcher
        traces: shared memory that its processes, and theirs, have left
        struck: whether the place was reached
        left: processes that had not ended some time after it
    """

    code: int | None
    seconds: float
    text: str
    pids: dict[int, int]
    traces: list[str]
    struck: bool
    left: list[str]


class ForkedChild:
    """Stand-in for `subprocess.Popen`, which forks a process instead of starting one."""

    strike: Strike | None = None
    folder = Path()
    prepare: Callable[[list[str], int], list[str]] = staticmethod(lambda arguments, rank: arguments)
    """Function that breaks something in process `rank`, and returns the arguments that it gets."""

    def __init__(
        self, command: list[str], *, env: dict[str, str], stdout: Any, stderr: Any, preexec_fn: Any, **_: Any
    ) -> None:
        read, write = os.pipe() if stderr else (None, None)
        self.returncode: int | None = None
        self.stderr = None if read is None else os.fdopen(read, "rb")
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            _reset_signals()
            if write is not None:
                os.dup2(write, 2)
            if stdout is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _open_streams()
            os.environ.clear()
            os.environ.update(env)
            preexec_fn()
            leave(lambda: serve(command[3:], int(env["RANK"])))
        if write is not None:
            os.close(write)

    def wait(self) -> int:
        """Wait for the end of the process, and return its exit code."""
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def leave(work: Callable[[], int]) -> None:
    """Run `work` in this forked process, and end it as the interpreter would."""
    code = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _reset_signals() -> None:
    """Handle signals as a new interpreter would."""
    for number in range(1, 32):
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _open_streams() -> None:
    """Write to the present descriptors 1 and 2, as a new interpreter would."""
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def serve(arguments: list[str], rank: int) -> int:
    """Be process `rank` of the command."""
    strike, folder = ForkedChild.strike, ForkedChild.folder
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    os.register_at_fork(after_in_child=lambda: (folder / f"child.{rank}.{os.getpid()}").touch())
    torch.set_num_threads(1)
    arguments = ForkedChild.prepare(arguments, rank)
    if strike is None or rank != max(strike.victim, 0):
        return command_line.main(arguments)
    place = next(place for place in PLACES if place.name == strike.place)
    owner, name = place.target
    original = getattr(owner, name)
    arrived = False

    def pause(*values: Any, **named: Any) -> Any:
        nonlocal arrived
        if not arrived and place.takes(*values, **named):
            arrived = True
            (folder / "arrived").touch()
            time.sleep(DWELL_S)
        return original(*values, **named)

    with mock.patch.object(owner, name, pause):
        return command_line.main(arguments)


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Make this process the parent of those whose parent has ended, so that none is overlooked."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    yield
    ctypes.CDLL(None).prctl(_SUBREAPER, 0)


def run_command(arguments: list[str], folder: Path, strike: Strike | None, limit_s: float) -> Outcome:
    """Run `widekernel train` with `arguments`, strike it, and return the outcome.

    Args:
        arguments: its arguments.
        folder: an empty folder for notes.
        strike: what happens; `None` leaves it alone.
        limit_s: seconds after the strike, or the start, after which everything is killed.
    """
    folder.mkdir()
    ForkedChild.strike, ForkedChild.folder = strike, folder
    sys.stdout.flush()
    launcher = os.fork()
    if launcher == 0:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _open_streams()
        _reset_signals()
        stand_in = SimpleNamespace(Popen=ForkedChild, PIPE=-1, DEVNULL=-3)
        with pictures.stand_ins(), mock.patch.object(local, "subprocess", stand_in):
            leave(lambda: command_line.main(["train", *arguments]))
    started = time.monotonic()
    struck = strike is not None and _strike(launcher, folder, strike, limit_s)
    since = time.monotonic() if struck else started
    code = _wait(launcher, since + limit_s)
    seconds = time.monotonic() - since
    if code is None:
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
    pids = {-1: launcher, **{int(path.suffix[1:]): int(path.read_text()) for path in folder.glob("pid.*")}}
    left = _orphans(6.0)
    ours = {str(pid) for pid in pids.values()} | {path.suffix[1:] for path in folder.glob("child.*")}
    traces = [path.name for path in Path("/dev/shm").iterdir() if ours & set(re.split(r"[-_.]", path.name))]
    return Outcome(code, seconds, (folder / "output").read_text(), pids, traces, struck, left)


def _strike(launcher: int, folder: Path, strike: Strike, limit_s: float) -> bool:
    """Send the signals; return whether the place was reached before the command ended."""
    deadline = time.monotonic() + limit_s
    while not (folder / "arrived").exists():
        ended = os.waitid(os.P_PID, launcher, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if ended or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    time.sleep(strike.delay_s)
    victim = launcher if strike.victim < 0 else int((folder / f"pid.{strike.victim}").read_text())
    if strike.worker:
        victim = max(int(path.suffix[1:]) for path in folder.glob(f"child.{strike.victim}.*"))
    for number in strike.signals:
        try:
            os.kill(victim, number)
        except ProcessLookupError:
            return False
        time.sleep(0.005)
    return True


def _wait(pid: int, deadline: float) -> int | None:
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


def _orphans(limit_s: float) -> list[str]:
    """Return the processes that are left `limit_s` seconds later, and kill them."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0 and time.monotonic() > deadline:
                break
        except ChildProcessError:
            return []
        time.sleep(0.005)
    left = []
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, path.read_text().split()):
            left.append(f"{pid} {Path(f'/proc/{pid}/stat').read_text().split()[1:4]}")
            os.kill(pid, signal.SIGKILL)
    _orphans(2.0)
    return left
