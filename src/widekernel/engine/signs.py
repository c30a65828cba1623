"""Signs of life of one process among several, and what is said about a lost one."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from widekernel.errors import WidekernelError, in_short

RUNNING, FINISHING, LEFT = "running", "finishing", "left"


class ProcessError(WidekernelError, RuntimeError):
    """Error for processes that cannot join, or disagree."""


class LostProcessError(ProcessError):
    """Error for a process that is lost, so that the run ends, but can be resumed."""

    exit_code: ClassVar[int] = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed now


@dataclass(frozen=True)
class Sign:
    """One sign of life.

    Args:
        rank: process that gives it
        host: its machine
        pid: its process number
        machine: identity of the machine and of its process numbers
        beat: number of the sign
        step: optimizer steps done
        phase: what the process does
        state: running, finishing or left
        reason: error with which the process left
        may_succeed: whether a restart may succeed, as the error does not come from the settings or the data
    """

    rank: int
    host: str
    pid: int
    machine: str
    beat: int = 0
    step: int = 0
    phase: str = "starting"
    state: str = RUNNING
    reason: str = ""
    may_succeed: bool = True

    @property
    def name(self) -> str:
        """The process in words."""
        return f"process {self.rank} (rank {self.rank}, host {self.host}, pid {self.pid})"

    @property
    def activity(self) -> str:
        """What the process did last, in words."""
        return f"last seen at step {self.step}, {self.phase}"


def lost(sign: Sign, what: str) -> LostProcessError:
    """Return the error for the lost process of `sign`; `what` tells how it was lost."""
    return LostProcessError(
        f"{sign.name[0].upper()}{sign.name[1:]} {what}; {sign.activity}. The run cannot go on without it; "
        "the same command resumes it from the last training state."
    )


def departure(error: BaseException) -> tuple[str, bool]:
    """Return what the sign of a process that leaves with `error` says: `reason` and `may_succeed`."""
    if isinstance(error, LostProcessError):
        return str(error), True
    return f"Error: {in_short(error)}", not isinstance(error, WidekernelError)


def left(sign: Sign) -> ProcessError:
    """Return the error for the process of `sign`, which has left with an error; that for the first cause, if it knows."""
    if not sign.reason.startswith("Error: "):
        return LostProcessError(sign.reason)
    kind = LostProcessError if sign.may_succeed else ProcessError
    return kind(
        f"{sign.name[0].upper()}{sign.name[1:]} ended with an error; {sign.activity}: {sign.reason.removeprefix('Error: ')}"
    )


def machine_identity() -> str:
    """Return a text that is equal in two processes only if they share a machine and its process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # unknown: no process is looked up


def local_state(pid: int) -> str:
    """Return the state of a process of this machine as one letter, or "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
