"""Loader whose worker processes ignore signals to the process group: the training process decides when to stop."""

import atexit
import multiprocessing
import os
import signal
from multiprocessing import resource_tracker
from multiprocessing.sharedctypes import RawValue
from typing import Any

from torch.utils.data import DataLoader

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_GROUP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Signals that terminals and batch schedulers send to the whole process group, or to all processes of a job."""


class SignalSafeLoader(DataLoader):
    """Loader whose workers start with signals to the process group blocked, until they can ignore them.

    This holds for workers that are forked or spawned; those of a fork server start with the mask of that server.
    """

    def __iter__(self) -> Any:
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        if multiprocessing.get_context().get_start_method() == "spawn":
            # Spawned processes need the resource tracker, which unblocks signals when it starts, so start it first.
            resource_tracker.ensure_running()
        # A process inherits the mask of the thread that starts it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class IgnoreGroupSignals:
    """Function that a worker calls when it starts, to ignore signals to the process group until its parent exits."""

    def __init__(self) -> None:
        self.leaving = RawValue("b", False)
        atexit.register(_announce_exit, self.leaving)

    def __call__(self, _worker: int) -> None:
        """Ignore the signals in this process."""
        # Ctrl-C, `timeout` and batch schedulers signal the whole process group, but the training process decides when to
        # stop. When it exits, it terminates the workers that still wait; only then do they react to the signal.
        leaving = self.leaving
        for number in _GROUP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)


def _announce_exit(leaving: Any) -> None:
    leaving.value = True
