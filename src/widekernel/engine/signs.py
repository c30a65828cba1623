"""Signs of life of one process among several, and what is said about a lost one."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from widekernel.errors import WidekernelError

RUNNING, FINISHING, LEFT = "running", "finishing", "left"


class ProcessError(WidekernelError, RuntimeError):
    """Error for processes that cannot join, are lost, or disagree."""


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

    @property
    def name(self) -> str:
        """The process in words."""
        return f"process {self.rank} (rank {self.rank}, host {self.host}, pid {self.pid})"

    @property
    def activity(self) -> str:
        """What the process did last, in words."""
        return f"last seen at step {self.step}, {self.phase}"


def lost(sign: Sign, what: str) -> str:
    """Say that the process of `sign` is lost; `what` tells how."""
    return (
        f"{sign.name[0].upper()}{sign.name[1:]} {what}; {sign.activity}. The run cannot go on without it; "
        "the same command resumes it from the last training state."
    )


def left(sign: Sign) -> str:
    """Say that the process of `sign` has left with an error."""
    return f"{sign.name[0].upper()}{sign.name[1:]} ended with an error; {sign.activity}: {sign.reason}"


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
