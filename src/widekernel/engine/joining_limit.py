"""A limit on the time that a process takes to join others, while it may wait for an answer in a call without one."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from widekernel.engine.signs import LostProcessError


@contextmanager
def joining_within(seconds: float, where: str, report: Callable[[str], None] | None) -> Iterator[None]:
    """End this process unless the block ends in time.

    Whoever is stopped (SIGSTOP) while others join keeps its connections, so they would wait for it forever.

    Args:
        seconds: the time.
        where: who is being asked, in words.
        report: is given the error before; by default, standard error is.
    """
    joined = threading.Event()

    def watch() -> None:
        if joined.wait(seconds):
            return
        text = (
            f"error: The processes did not join within {seconds:.0f} s: {where} does not answer. It may be stopped "
            "(SIGSTOP), or cut off. The same command may succeed later.\n"
        )
        if report is None:
            os.write(sys.stderr.fileno() if sys.stderr else 2, text.encode(errors="replace"))
        else:
            report(text)
        os._exit(LostProcessError.exit_code)

    threading.Thread(target=watch, name="limit on joining", daemon=True).start()
    try:
        yield
    finally:
        joined.set()
