"""Work in the background, one piece at a time, whose error surfaces in the foreground."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """One piece of work in a thread of its own.

    An interpreter that exits waits for the work. A process that is forked meanwhile has no such thread, and so does not
    take part in the work.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def pending(self) -> bool:
        """Whether there is work whose outcome has not been awaited."""
        return self._thread is not None

    def start(self, work: Callable[[], object]) -> None:
        """Start `work`, whose predecessor has been awaited."""
        assert self._thread is None

        def run() -> None:
            try:
                work()
            except BaseException as error:  # whatever it is, it is raised by `wait`
                self._error = error

        self._thread = threading.Thread(target=run, name=self._name, daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the end of the work, if there is any, and raise its error."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
