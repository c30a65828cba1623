"""Several processes of one command on this machine, with the environment that torchrun would give them.

Each process has a session of its own, so a signal from the terminal reaches only the launcher, which passes it on to each
process exactly once: a second interrupt, which would cut a save short, comes only from the user. The kernel kills the
processes if the launcher itself is killed (on Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import queue
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from widekernel.engine.process_environment import RUN_ID
from widekernel.engine.signs import local_state
from widekernel.errors import ConfigError

NOTICE_S = 5.0
"""Seconds in which the others may end by themselves after one has died; they then say what they know."""
GRACE_S = 30.0
"""Seconds between SIGTERM and SIGKILL: a state that is being written is completed."""
SAVING_S = 600.0
"""The same after one has stopped on request, when the others save."""
STOPPED_S = 1.0
"""Seconds for which processes may be stopped (SIGSTOP) after one has ended; they would not end by themselves."""

_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_POLL_S = 0.25
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_FIRST_PORT, _LAST_PORT = 15000, 31000  # below the ports that systems hand out on their own


def launch(command: Sequence[str], processes: int, say: Callable[[str], None]) -> int:
    """Run `command` in several processes until all have ended, and return their exit code.

    The output of process 0 is left as it is. Of the others, only standard error is shown, with the rank before each line;
    what several of them say is shown once.

    Args:
        command: program and arguments.
        processes: number of processes.
        say: receives each line that is to be shown, and messages about processes that died; called from several threads,
            but never by two of them at once.

    Returns:
        0 if all have succeeded; else the code of the process that failed first, or 128 + n if signal n killed it.

    Raises:
        ConfigError: `processes` is not positive.
    """
    if processes < 1:
        raise ConfigError(f"The number of processes is {processes}, but must be 1 or more.")
    group = _Group(say)
    with group.signals():
        try:
            for variables in environments(processes, os.environ):
                group.start(command, variables)
            return group.wait()
        finally:
            group.end(0.0)


def environments(processes: int, present: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the environment of each process.

    The cores are divided among them (OMP_NUM_THREADS), and PyTorch's warnings about closed connections, which come with
    a stack trace in C++, are left out; both only if the variables are not set.

    Args:
        processes: number of processes.
        present: environment of the launcher.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    common = {"OMP_NUM_THREADS": str(max(1, cores // processes)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if sys.platform == "linux":
        common["GLOO_SOCKET_IFNAME"] = "lo"  # works whatever the name of the machine resolves to
    place = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    place[RUN_ID] = secrets.token_hex(8)
    port = str(_free_port())
    return [
        {**common, **present, **place, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(processes)
    ]


def _free_port() -> int:
    # Another program may take it before process 0 does, which then ends with an error; RUN_ID keeps runs apart.
    for port in random.Random().sample(range(_FIRST_PORT, _LAST_PORT), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ConfigError(f"None of 100 ports from {_FIRST_PORT} to {_LAST_PORT} is free.")


class _Group:
    """The processes, which end together."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._receive = say
        self._children: list[subprocess.Popen] = []
        self._ended: queue.Queue[tuple[int, int]] = queue.Queue()
        self._readers: list[threading.Thread] = []
        self._shown: set[str] = set()
        self._showing, self._saying = threading.Lock(), threading.Lock()
        self._received: list[int] = []

    def signals(self) -> _SignalHandlers:
        """Return a block in which signals are passed on."""
        return _SignalHandlers(self._pass_on, self._suspend)

    def start(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Start the next process with its environment."""
        rank = len(self._children)
        child = subprocess.Popen(
            command,
            env=dict(variables),
            stdin=None if rank == 0 else subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_dying_with(os.getpid()),
        )
        self._children.append(child)
        for number in self._received:  # before there was this process to pass it on to
            self._kill(child, number)
        if rank:
            self._readers.append(threading.Thread(target=self._show, args=(rank, child.stderr), daemon=True))
            self._readers[-1].start()
        threading.Thread(target=lambda: self._ended.put((rank, child.wait())), daemon=True).start()

    def wait(self) -> int:
        """Wait for all processes, and end the others soon after one has failed; return the exit code."""
        code, left, deadline, running = 0, set(range(len(self._children))), math.inf, time.monotonic()
        grace_s = GRACE_S
        while left:
            try:
                rank, status = self._ended.get(timeout=_POLL_S if len(left) < len(self._children) else None)
            except queue.Empty:
                now = time.monotonic()
                running = running if self._are_stopped() else now
                if now > min(deadline, running + STOPPED_S):
                    self.end(grace_s)
                continue
            left.discard(rank)
            running = time.monotonic()
            if status == 0 or code:
                continue
            code = status if status > 0 else 128 - status
            stopped = status > 0 and status - 128 in {getattr(signal, name, None) for name in _PASSED_ON}
            if stopped or self._received:
                grace_s = SAVING_S  # whoever saves has caught the signal, and is not disturbed by another SIGTERM
            else:
                self._say(f"Process {rank} (rank {rank}, pid {self._children[rank].pid}) {_ending(status)}.")
            deadline = time.monotonic() + NOTICE_S
        for reader in self._readers:
            reader.join(2)  # not for longer: a grandchild may hold the pipe open
        return code

    def end(self, grace_s: float) -> None:
        """End all processes that are left, also those that are stopped: SIGTERM, `grace_s` seconds of time, and SIGKILL."""
        if grace_s:
            self._send(signal.SIGTERM)
            if hasattr(signal, "SIGCONT"):
                self._send(signal.SIGCONT)
            deadline = time.monotonic() + grace_s
            while self._left() and time.monotonic() < deadline:
                time.sleep(0.05)
        for rank, child in self._left():
            if grace_s:
                self._say(
                    f"Process {rank} (rank {rank}, pid {child.pid}) did not end within {grace_s:.0f} s, and was killed."
                )
            self._kill(child, signal.SIGKILL)

    def _say(self, line: str) -> None:
        with self._saying:
            self._receive(line)

    def _left(self) -> list[tuple[int, subprocess.Popen]]:
        return [(rank, child) for rank, child in enumerate(self._children) if child.returncode is None]

    def _are_stopped(self) -> bool:
        """Return whether the processes that are left are all stopped, as far as the system tells."""
        return all(local_state(child.pid) == "T" for _, child in self._left())

    def _send(self, number: int) -> None:
        for _, child in self._left():
            self._kill(child, number)

    @staticmethod
    def _kill(child: subprocess.Popen, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have just ended
            os.kill(child.pid, number)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)
        self._send(number)

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        """Stop and continue together, as one process would on Ctrl-Z."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _show(self, rank: int, stream: Any) -> None:
        for line in stream:
            text = line.decode(errors="replace").rstrip()
            with self._showing:
                if not text or text in self._shown:
                    continue
                self._shown.add(text)
            self._say(f"[rank {rank}] {text}")


class _SignalHandlers:
    """Block in which the launcher handles signals; the former handlers are restored at its end."""

    def __init__(self, pass_on: Any, suspend: Any) -> None:
        wanted = {getattr(signal, name): pass_on for name in _PASSED_ON if hasattr(signal, name)}
        # Under nohup, SIGHUP stays ignored, in the processes too.
        self._wanted = {number: handler for number, handler in wanted.items() if signal.getsignal(number) != signal.SIG_IGN}
        if hasattr(signal, "SIGTSTP"):
            self._wanted[signal.SIGTSTP] = suspend
        self._former: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, handler) for number, handler in self._wanted.items()}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _dying_with(parent: int) -> Callable[[], None] | None:
    """Return what a new process calls to be killed when its parent dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def prepare() -> None:
        prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(1)

    return prepare


def _ending(status: int) -> str:
    """Describe how a process ended, from its exit code, which is negative if a signal killed it."""
    if status > 0:
        return f"ended with exit code {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"was killed by {name}" + (" (perhaps because memory ran out)" if -status == signal.SIGKILL else "")
