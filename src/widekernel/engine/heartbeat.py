"""Signs of life of processes that train together, and the diagnosis when one is lost.

A thread of every process publishes a sign each interval and reads those of the others, over a connection of its own, so
that neither long computations nor slow saves look like a loss. A second thread watches the first, which may itself wait
for a stopped process. A process counts as lost if

* it ran on this machine, and has ended without leaving (after one interval);
* it serves the store, and the connection to it is closed (at once);
* its signs have stopped for `timeout_s`, or it left with an error that long ago.

The main thread then raises `LostProcessError` when it next calls a method of `Processes`. If it has not done so `GRACE_S`
seconds later, because it waits in an exchange or computes, the watching thread reports the error and ends the process
with the exit code of the error.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from widekernel.engine.signs import (
    FINISHING,
    LEFT,
    RUNNING,
    LostProcessError,
    ProcessError,
    Sign,
    departure,
    left,
    local_state,
    lost,
    machine_identity,
)
from widekernel.errors import in_short

GRACE_S = 3.0
"""Seconds that the main thread has to raise the error."""

_SAVING = "saving"
_CLOSED = (
    "closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "connection refused", "gloo", "nccl",
    "socket", "connection was likely closed",
)  # fmt: skip


class Store(Protocol):
    """Keys and values that all processes share."""

    def set(self, key: str, value: str) -> None: ...  # noqa: D102 - that of torch.distributed.Store

    def multi_get(self, keys: list[str]) -> list[bytes]: ...  # noqa: D102

    def check(self, keys: list[str]) -> bool: ...  # noqa: D102


def is_connection_error(error: BaseException) -> bool:
    """Return whether `error`, or one that caused it, tells of a lost or late process."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return False
        if isinstance(seen, RuntimeError) and any(sign in str(seen).lower() for sign in _CLOSED):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class Heartbeat:
    """Gives signs of life of this process, and watches those of the others.

    Args:
        store: connection that nothing else uses.
        rank: number of this process.
        world_size: number of processes.
        timeout_s: seconds without a sign after which a process is lost.
        report: is given the error before the watching thread ends the process; by default, standard error is.
        store_rank: process that serves the store, or `None` if another program does.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        report: Callable[[str], None] | None = None,
        store_rank: int | None = 0,
    ) -> None:
        if not timeout_s > 0:
            raise ProcessError(f"The timeout is {timeout_s} s, but must be positive.")
        self.timeout_s, self.interval_s = timeout_s, min(1.0, max(0.05, timeout_s / 20))
        self._store, self._rank, self._store_rank = store, rank, store_rank
        self._report = report or _write_to_standard_error
        self._others = [other for other in range(world_size) if other != rank]
        self._sign = Sign(rank, socket.gethostname(), os.getpid(), machine_identity())
        self._now: tuple[int, str, str, str, bool] = (0, "starting", RUNNING, "", True)
        self._signs: dict[int, Sign] = {}
        self._silence = dict.fromkeys(self._others, 0.0)
        self._exchange_age = 0.0
        self._connection_error: Exception | None = None
        self._exchanges = 0
        self._exchanged = threading.Condition()
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._verdict: ProcessError | None = None
        self._raised = False
        self._threads: list[threading.Thread] = []

    # -- called by the main thread -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Publish the first sign, and prepare the threads."""
        atexit.register(self._end_at_exit)
        self._publish()
        for work in (self._talk, self._watch):
            thread = threading.Thread(target=work, name=f"heartbeat {work.__name__}", daemon=True)
            self._threads.append(thread)

    def await_all(self, limit_s: float) -> None:
        """Wait until every process has given a sign.

        Raises:
            ProcessError: some have not within `limit_s`; the message lists them.
        """
        deadline = time.monotonic() + limit_s
        missing = self._others
        while missing := [other for other in missing if not self._store.check([_key(other)])]:
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"{len(missing)} of {len(self._others) + 1} processes did not join within {limit_s:.0f} s, with "
                    f"the ranks {', '.join(map(str, missing))}. Check that they started, and what they wrote."
                )
            time.sleep(0.02)
        self._read()
        for thread in self._threads:
            thread.start()

    def note(self, step: int, phase: str) -> None:
        """Note what this process does; raise if another one is lost."""
        self._now = (step, phase, RUNNING, "", True)
        if self._verdict is not None:
            self._raise(self._verdict)

    def check(self, what: str) -> None:
        """Raise if an exchange cannot succeed, because a process is lost or has left.

        Args:
            what: the exchange, in words.

        Raises:
            ProcessError: it cannot.
        """
        if self._verdict is not None:
            self._raise(self._verdict)
        gone = next((sign for sign in list(self._signs.values()) if sign.state == LEFT), None)
        if gone is not None:
            self._raise(left(gone))

    def explain(self, error: BaseException, what: str) -> ProcessError:
        """Return the error that names the process because of which an exchange failed.

        The cause is known when the store or the machine tells of a process that has ended, or else when one gives no
        sign for four intervals.

        Args:
            error: error of the exchange.
            what: the exchange, in words.
        """
        self._verdict = self._find_cause(error, what)
        return self._verdict

    def _find_cause(self, error: BaseException, what: str) -> ProcessError:
        started = time.monotonic()
        limit = min(self.timeout_s, 6 * self.interval_s + 2)
        read = self._exchanges + 2  # by then, the last sign of a process that has ended now is known
        self._raised = True
        while time.monotonic() < started + limit:
            self._wake.set()
            gone = [sign for sign in self._signs.values() if sign.state == LEFT]
            is_known = self._exchanges >= read or self._connection_error is not None
            found = self._verdict or (left(gone[0]) if gone else self._find_dead() if is_known else None)
            if found is not None:
                return found
            silent = max(self._others, key=self._silence.__getitem__)
            if self._silence[silent] > 4 * self.interval_s:
                return lost(self._signs[silent], f"has given no sign for {self._silence[silent]:.1f} s")
            time.sleep(0.02)
        return LostProcessError(
            f"An exchange with the other processes failed ({what}: {in_short(error)}). {self.describe()}"
        )

    def _find_dead(self) -> ProcessError | None:
        """Return the error for a process that has ended, whatever this one and that one were doing."""
        for other in self._others:
            if self._has_ended(other):
                return lost(self._signs[other], "has ended: it was killed, or ran out of memory")
        if self._connection_error is not None and self._store_rank is not None:
            return lost(self._signs[self._store_rank], "has ended or is out of reach: it closed its connection")
        return None

    def describe(self) -> str:
        """Describe what the other processes do, those first that are furthest behind."""
        signs = sorted(self._signs.values(), key=lambda sign: (sign.step, sign.rank))
        shown = "; ".join(f"{sign.name} is alive, {sign.activity}" for sign in signs[:8])
        step, phase = self._now[:2]
        return f"This is process {self._rank}, at step {step}, {phase}; {shown}{'; …' if len(signs) > 8 else ''}."

    def finish(self) -> None:
        """Tell the others that this process has finished its work, so that its end is no loss."""
        self._now = (self._now[0], "finishing", FINISHING, "", True)
        self._await_exchange()

    def leave(self, error: BaseException) -> None:
        """Tell the others that this process ends with an error; the one that serves the store gives them time to read it."""
        self._raised = True
        self._now = (*self._now[:2], LEFT, *departure(error))
        if not self._threads or not self._threads[0].is_alive():
            return
        self._await_exchange()
        if self._rank == self._store_rank:
            deadline = time.monotonic() + 3 * self.interval_s
            while time.monotonic() < deadline and any(sign.state == RUNNING for sign in self._signs.values()):
                time.sleep(self.interval_s / 5)

    def stop(self) -> None:
        """Stop the threads."""
        if self._verdict is None:
            atexit.unregister(self._end_at_exit)
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(2 * self.interval_s)

    def _raise(self, error: ProcessError) -> None:
        self._raised = True
        self._verdict = error
        raise error

    def _end_at_exit(self) -> None:
        """End the process before PyTorch is taken apart, which waits for exchanges with the lost process."""
        if self._verdict is not None and self._raised:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(self._verdict.exit_code)

    def _await_exchange(self) -> None:
        """Wait until the signs have been exchanged once more, but not longer than two seconds."""
        target = self._exchanges + 2  # the exchange that is under way may have sent the former sign
        deadline = time.monotonic() + 2
        while self._exchanges < target and self._connection_error is None and time.monotonic() < deadline:
            self._wake.set()
            with self._exchanged:
                self._exchanged.wait(0.05)

    # -- the talking thread ------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        last = time.monotonic()
        while not self._stopped.is_set():
            self._wake.wait(self.interval_s)
            self._wake.clear()
            ended = [other for other in self._others if self._has_ended(other)]
            try:
                self._publish()
                before = {other: self._signs[other].beat for other in self._others}
                self._read()
            except Exception as error:  # whatever the store raises, it is out of reach
                self._connection_error = error
                self._judge_connection(error)
                return
            now = time.monotonic()
            # After this process itself was stopped, nobody is blamed for the time.
            passed, last = min(now - last, 2 * self.interval_s), now
            for other in self._others:
                self._silence[other] = 0.0 if self._signs[other].beat != before[other] else self._silence[other] + passed
            self._exchange_age = 0.0
            self._exchanges += 1
            with self._exchanged:
                self._exchanged.notify_all()
            self._judge(ended)

    def _publish(self) -> None:
        step, phase, state, reason, may_succeed = self._now
        beat = self._sign.beat + (state != LEFT)  # the silence of a process that has left counts from then on
        self._sign = Sign(
            self._rank, self._sign.host, self._sign.pid, self._sign.machine, beat, step, phase, state, reason, may_succeed
        )
        self._store.set(_key(self._rank), json.dumps(asdict(self._sign)))

    def _read(self) -> None:
        values = self._store.multi_get([_key(other) for other in self._others])
        for other, value in zip(self._others, values):
            self._signs[other] = Sign(**json.loads(value))

    def _has_ended(self, other: int) -> bool:
        """Return whether a process of this machine exists no more."""
        sign = self._signs[other]
        return sign.machine == self._sign.machine and local_state(sign.pid) in ("", "Z", "X")

    def _judge(self, ended: list[int]) -> None:
        state = self._now[2]
        for other in self._others:
            sign = self._signs[other]
            if other in ended and sign.state == RUNNING and state != FINISHING:
                self._lose(lost(sign, "has ended without a message: it was killed, or ran out of memory"))
            elif self._silence[other] > self.timeout_s:
                if sign.state == LEFT:
                    if not self._now[1].startswith(_SAVING):
                        self._lose(left(sign))
                elif sign.state == RUNNING or other not in ended:
                    stopped = sign.machine == self._sign.machine and local_state(sign.pid) in ("T", "t")
                    what = "has been stopped (SIGSTOP)" if stopped else "has given no sign of life"
                    self._lose(lost(sign, f"{what} for {self._silence[other]:.0f} s"))

    def _judge_connection(self, error: Exception) -> None:
        if self._now[2] == FINISHING or self._stopped.is_set():
            return
        sign = self._signs.get(-1 if self._store_rank is None else self._store_rank)
        if sign is None:
            self._lose(LostProcessError(f"The program that started the processes has ended ({in_short(error)})."))
        elif sign.state == LEFT:
            self._lose(left(sign))
        else:
            self._lose(lost(sign, "has ended or is out of reach: it closed its connection"))

    # -- the watching thread -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self.interval_s):
            now = time.monotonic()
            passed, last = min(now - last, 2 * self.interval_s), now
            if self._connection_error is None:
                self._exchange_age += passed
            if self._exchange_age > self.timeout_s:
                self._judge_unanswered()
            if self._verdict is not None:
                self._end_process()
                return

    def _judge_unanswered(self) -> None:
        """Name who serves the store, because it no longer answers."""
        sign = self._signs.get(-1 if self._store_rank is None else self._store_rank)
        if sign is None:
            self._lose(
                LostProcessError("The program that started the processes does not answer: it is stopped, or cut off.")
            )
        else:
            stopped = sign.machine == self._sign.machine and local_state(sign.pid) in ("T", "t")
            what = "has been stopped (SIGSTOP)" if stopped else "has not answered"
            self._lose(lost(sign, f"{what} for {self._exchange_age:.0f} s"))

    def _lose(self, error: ProcessError) -> None:
        self._verdict = self._verdict or error

    def _end_process(self) -> None:
        if self._stopped.wait(GRACE_S) or self._raised:
            return
        self._report(f"error: {self._verdict}\n")
        os._exit(self._verdict.exit_code if self._verdict else LostProcessError.exit_code)


def _key(rank: int) -> str:
    return f"sign/{rank}"


def _write_to_standard_error(text: str) -> None:
    os.write(sys.stderr.fileno() if sys.stderr else 2, text.encode(errors="replace"))
