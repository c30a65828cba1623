"""Stopping at a step boundary when the user or the cluster asks for it."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(Exception):  # noqa: N818 - a request that was honoured, not an error
    """Training stopped on request after saving; `signal_number` says which signal asked."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


def _asking_to_stop() -> list[int]:
    """SIGINT and SIGTERM, and SIGHUP of a terminal that closes unless it is ignored, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, hangup]


class InterruptGuard:
    """Within the block, the first SIGINT, SIGTERM or SIGHUP is remembered instead of raised; a second SIGINT raises at once.

    The former handlers return at the end of the block. Outside the main thread signals cannot be caught, and the
    guard does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> "InterruptGuard":
        if threading.current_thread() is threading.main_thread():
            for number in _asking_to_stop():
                self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
