"""Stopping between two steps when the user or the cluster requests it."""

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


def _stop_signals() -> list[int]:
    """Return SIGINT, SIGTERM and SIGHUP (sent by a closing terminal), unless SIGHUP is ignored, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, hangup]


class InterruptGuard:
    """Context manager that remembers the first SIGINT, SIGTERM or SIGHUP; a second SIGINT raises immediately.

    The former handlers are restored at the end of the block. Outside the main thread, signals cannot be caught, and the
    guard does nothing.

    Attributes:
        received: the signal, or `None`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> "InterruptGuard":
        if threading.current_thread() is threading.main_thread():
            for number in _stop_signals():
                self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
