"""Work in a forked process with a session of its own, whose process group may be sent signals."""

from __future__ import annotations

import os
import select
import signal
import time
import traceback
from collections.abc import Callable


def in_new_session(work: Callable[[], str], limit_s: float = 60) -> tuple[str, int]:
    """Return what `work` returned in a forked process that leads a session, or its traceback, and the exit code.

    A new interpreter would take several seconds to import what this one has imported. Nothing in `work` may compute with
    several threads, because OpenMP's threads do not survive a fork.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(reading)
            os.setsid()
            text = work()
            code = 0
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(writing, text.encode())
            os._exit(code)
    os.close(writing)
    found, deadline = b"", time.monotonic() + limit_s
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(reading, 2**16)
        if not part:
            break
        found += part
    else:
        os.killpg(process, signal.SIGKILL)
        found += f"it took more than {limit_s} s".encode()
    os.close(reading)
    return found.decode(), os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
