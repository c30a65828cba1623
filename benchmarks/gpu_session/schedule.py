"""Stages one after the other, each with a deadline of its own, whatever becomes of the others."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

DONE, FAILED, OUT_OF_TIME, NOT_RUN, RUNNING, INTERRUPTED = (
    "done",
    "failed",
    "out of time",
    "not run",
    "running",
    "interrupted",
)
GRACE = 4.0
"""Seconds from the polite request to end to the end of the whole group of processes."""
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Stage:
    """A command and its part of the time.

    Attributes:
        name: short, for the summary.
        command: gives the arguments, the program first, when told the seconds that the stage has.
        share: of the time that is left when the stage begins, in proportion to those of the stages after it.
        least: seconds with less than which it is not begun.
        most: seconds that it may have however much is left.
        needs: stages without whose success this one is pointless.
        environment: variables for this stage alone.
    """

    name: str
    command: Callable[[float], Sequence[str]]
    share: float
    least: float = 0.0
    most: float = float("inf")
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """How a stage went; times in seconds, `start` since the session began."""

    stage: str
    state: str = NOT_RUN
    start: float = 0.0
    budget: float = 0.0
    seconds: float = 0.0
    exit: int | None = None
    reason: str = ""


class Recorder(Protocol):
    """Takes down what happens."""

    def output(self, data: bytes) -> None:
        """Keep what a stage has printed."""

    def update(self, results: Sequence[Result]) -> None:
        """Keep how things stand, after every change."""


def budget(stages: Sequence[Stage], left: float) -> float:
    """Give the seconds of the first stage: what the earlier ones have left over is shared among all that follow."""
    total = sum(stage.share for stage in stages)
    return min(stages[0].most, max(0.0, left) * stages[0].share / total)


class Schedule:
    """Runs stages.

    Args:
        stages: in their order.
        seconds: for all of them.
        recorder: is told everything.
        environment: of the commands.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        seconds: float,
        recorder: Recorder,
        environment: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stages, self.recorder, self.environment = list(stages), recorder, dict(environment)
        self._clock, self._begun = clock, clock()
        self._until = self._begun + seconds
        self.results = [Result(stage.name) for stage in self.stages]

    def run(self) -> list[Result]:
        """Run them all; what goes wrong in one leaves the next its turn.

        Raises:
            KeyboardInterrupt: if that is what came; the stage has been ended and everything recorded.
        """
        for number, stage in enumerate(self.stages):
            result = self.results[number]
            result.start = self._clock() - self._begun
            result.budget = budget(self.stages[number:], self._until - self._clock())
            result.reason = self._obstacle(stage, result.budget)
            if not result.reason:
                self._run(stage, result)
            self.recorder.update(self.results)
        return self.results

    def _obstacle(self, stage: Stage, seconds: float) -> str:
        states = {result.stage: result for result in self.results}
        missing = [name for name in stage.needs if states[name].state != DONE]
        if missing:
            return f"{missing[0]} did not succeed: {states[missing[0]].reason}"
        if seconds < stage.least:
            return f"{seconds:.0f} s are left for it, and it is of no use with less than {stage.least:.0f}"
        return ""

    def _run(self, stage: Stage, result: Result) -> None:
        result.state = RUNNING
        self.recorder.update(self.results)
        begun = self._clock()
        tail: deque[bytes] = deque(maxlen=40)
        process = None
        try:
            process = self._start(stage, result.budget)
            pump = threading.Thread(target=self._pump, args=(process, tail), daemon=True)
            pump.start()
            result.exit = process.wait(max(0.1, result.budget))
            # What a stage has left running would hold the output open, and the GPU.
            end_group(process, 0.0)
            pump.join(GRACE)
            result.state = DONE if result.exit == 0 else FAILED
            result.reason = "" if result.exit == 0 else last_words(tail, result.exit)
        except subprocess.TimeoutExpired:
            end_group(process, GRACE)
            result.state, result.exit = OUT_OF_TIME, process.poll()
            result.reason = f"its {result.budget:.0f} s were over; what it had written by then counts"
        except KeyboardInterrupt:
            if process is not None:
                end_group(process, 1.0)
            result.state, result.reason = INTERRUPTED, "the session was ended from outside"
            raise
        except Exception as error:
            result.state, result.reason = FAILED, f"it could not be run ({type(error).__name__}: {error})"
        finally:
            result.seconds = self._clock() - begun
            self.recorder.update(self.results)

    def _start(self, stage: Stage, seconds: float) -> subprocess.Popen[bytes]:
        command = [str(part) for part in stage.command(seconds)]
        self.recorder.output(f"\n=== {stage.name}, {seconds:.0f} s: {' '.join(command)}\n".encode())
        environment = {**self.environment, **stage.environment}
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def _pump(self, process: subprocess.Popen[bytes], tail: deque[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                tail.append(line.strip())
            # A full disk or a closed terminal must not keep the stage waiting for somebody who reads.
            with suppress(OSError, ValueError):
                self.recorder.output(line)


def last_words(tail: Sequence[bytes], code: int) -> str:
    """Give in a line why a command failed: the last that it said, an error before all else."""
    lines = [line.decode(errors="replace") for line in tail]
    errors = [line for line in lines if line.startswith("error:")]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    said = (errors or lines or [""])[-1]
    return f"{how}: {said}"[:_LONGEST_REASON] if said else how


def end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process and all that it has started: politely if there is time, in any case for good."""
    if grace and process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that hangs in the driver does not end even so; the others must not wait for it.
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
