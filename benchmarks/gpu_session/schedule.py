"""A schedule that runs stages one after another, each with its own deadline, whether or not the others succeed."""

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
"""Seconds between asking a stage to end and killing its group of processes."""
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Stage:
    """A command and its share of the time.

    Attributes:
        name: short name for the summary.
        command: returns the program and its arguments, given the seconds that the stage has.
        share: share of the time that is left when the stage begins, relative to the shares of later stages.
        least: minimum number of seconds; with less, it is not started.
        most: maximum number of seconds.
        needs: stages that must have succeeded.
        environment: variables for this stage only.
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
    """The outcome of a stage; times in seconds, `start` counted from the start of the session."""

    stage: str
    state: str = NOT_RUN
    start: float = 0.0
    budget: float = 0.0
    seconds: float = 0.0
    exit: int | None = None
    reason: str = ""


class Recorder(Protocol):
    """The interface of a recorder of output and states."""

    def output(self, data: bytes) -> None:
        """Record the output of a stage."""

    def update(self, results: Sequence[Result]) -> None:
        """Record the state of all stages; called after every change."""


def budget(stages: Sequence[Stage], left: float) -> float:
    """Return the seconds for the first stage; time left over by earlier stages is shared among all that follow."""
    total = sum(stage.share for stage in stages)
    return min(stages[0].most, max(0.0, left) * stages[0].share / total)


class Schedule:
    """A schedule of stages.

    Args:
        stages: the stages in order.
        seconds: time for all of them together.
        recorder: receives all output and states.
        environment: environment of the commands.
        clock: returns the time in seconds.
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
        self._clock, self._started = clock, clock()
        self._deadline = self._started + seconds
        self.results = [Result(stage.name) for stage in self.stages]

    def run(self) -> list[Result]:
        """Run all stages; a failure does not prevent later stages from running.

        Raises:
            KeyboardInterrupt: if the session is interrupted, after the stage has been ended and everything recorded.
        """
        for number, stage in enumerate(self.stages):
            result = self.results[number]
            result.start = self._clock() - self._started
            result.budget = budget(self.stages[number:], self._deadline - self._clock())
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
            return f"{seconds:.0f} s are left for it, and it needs at least {stage.least:.0f}"
        return ""

    def _run(self, stage: Stage, result: Result) -> None:
        result.state = RUNNING
        self.recorder.update(self.results)
        started = self._clock()
        tail: deque[bytes] = deque(maxlen=40)
        process = None
        try:
            process = self._start(stage, result.budget)
            pump = threading.Thread(target=self._pump, args=(process, tail), daemon=True)
            pump.start()
            result.exit = process.wait(max(0.1, result.budget))
            # Processes that the stage left running would keep the output open, and the GPU busy.
            end_group(process, 0.0)
            pump.join(GRACE)
            result.state = DONE if result.exit == 0 else FAILED
            result.reason = "" if result.exit == 0 else last_words(tail, result.exit)
        except subprocess.TimeoutExpired:
            end_group(process, GRACE)
            result.state, result.exit = OUT_OF_TIME, process.poll()
            result.reason = f"its {result.budget:.0f} s were over; its results up to then are kept"
        except KeyboardInterrupt:
            if process is not None:
                end_group(process, 1.0)
            result.state, result.reason = INTERRUPTED, "the session was interrupted"
            raise
        except Exception as error:
            result.state, result.reason = FAILED, f"it could not be run ({type(error).__name__}: {error})"
        finally:
            result.seconds = self._clock() - started
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
            # A full disk or a closed terminal must not block the stage.
            with suppress(OSError, ValueError):
                self.recorder.output(line)


def last_words(tail: Sequence[bytes], code: int) -> str:
    """Return a line that says why a command failed: its last error, or otherwise its last output."""
    lines = [line.decode(errors="replace") for line in tail]
    errors = [line for line in lines if line.startswith("error:")]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    said = (errors or lines or [""])[-1]
    return f"{how}: {said}"[:_LONGEST_REASON] if said else how


def end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process and all processes that it has started: ask first if there is time, then kill."""
    if grace and process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that hangs in the driver survives even SIGKILL; other stages must not wait for it.
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
