"""Stopping between two steps when the user or the cluster requests it."""

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupted(Exception):  # noqa: N818 - a request that was granted, not an error
    """Exception that reports that training has stopped on request, after saving.

    Attributes:
        signal_number: the signal that requested it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


_IN_A_JOB = ("SLURM_JOB_ID", "SUBMITIT_EXECUTOR")
"""Variables of the environment that SLURM and submitit set in the processes of a job."""


def stop_signals() -> list[int]:
    """Return the signals that ask a run to stop, as far as the system has them.

    They are SIGINT, SIGTERM, SIGHUP (sent by a closing terminal; not if it is ignored, as under nohup), SIGUSR1 (sent by
    batch schedulers before the time limit) and, inside a job of SLURM or submitit, SIGUSR2, which submitit asks SLURM for.
    """
    names = ["SIGINT", "SIGTERM", "SIGUSR1"]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        names.append("SIGHUP")
    if any(name in os.environ for name in _IN_A_JOB):
        names.append("SIGUSR2")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


class InterruptGuard:
    """Context manager that remembers the first signal that asks to stop; a second SIGINT raises immediately.

    `stop_signals` lists the signals. The former handlers are restored at the end of the block. Outside the main thread,
    signals cannot be caught, and the guard does nothing.

    Attributes:
        received: the signal, or `None`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> "InterruptGuard":
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
