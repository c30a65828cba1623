"""Agreement of all processes to stop, after any of them has received a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import NoReturn

from widekernel.engine.interrupts import Interrupted, InterruptGuard
from widekernel.engine.processes import Processes


class Stopping:
    """Decision of all processes whether to stop.

    Args:
        guard: remembers the signal that this process has received
        processes: the processes that train together
    """

    def __init__(self, guard: InterruptGuard, processes: Processes) -> None:
        self._guard, self._processes = guard, processes
        self._vote: Callable[[], bool] = lambda: False

    def after_step(self) -> bool:
        """Return whether any process was asked to stop; several processes learn it one step later, without waiting."""
        vote = self._processes.vote(self._guard.received is not None)
        if self._processes.world_size == 1:
            return vote()
        former, self._vote = self._vote, vote
        return former()

    def now(self) -> bool:
        """Return whether any process was asked to stop, after waiting for all."""
        return self._processes.any(self._guard.received is not None)

    def stop(self) -> NoReturn:
        """Raise `Interrupted` in all processes.

        All of them report the signal of the first that received one, since a cluster job restarts on some only.
        """
        received = self._processes.gather(self._guard.received)
        raise Interrupted(next((number for number in received if number is not None), signal.SIGTERM))
