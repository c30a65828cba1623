"""What `widekernel tune` does: measure on a CUDA device, problem after problem, write the winners and print all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from widekernel.cli.console import for_tables, progress, results
from widekernel.errors import ConfigError, WidekernelError
from widekernel.ops.gpu import tables
from widekernel.ops.gpu.plan import SLOWER
from widekernel.ops.problem import DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES
from widekernel.settings import require

if TYPE_CHECKING:
    from widekernel.bench.devices import Accelerator
    from widekernel.bench.time_budget import Course
    from widekernel.bench.timing import Stopwatch
    from widekernel.ops.gpu.tuning import Rig, Trial, Tuning
    from widekernel.ops.problem import Problem


def rig_on(device: str, seconds: float) -> Rig:
    """Give what measures on a CUDA device."""
    from widekernel.bench import devices
    from widekernel.ops.gpu import machine
    from widekernel.ops.gpu.tuning import Rig

    require(device.split(":")[0] == "cuda", "device", device, "cuda or cuda:N, because only kernels for GPUs are tuned")
    accelerator = _accelerator(device, devices.accelerator)
    with accelerator.current():
        obstacles = machine.obstacles("cuda")
        if obstacles:
            raise ConfigError(f"device is {device!r}, but {'; '.join(obstacles)}.")
        chip, name = machine.chip(), machine.device_name()
    measure = partial(in_turns, stopwatch=accelerator.stopwatch, seconds=seconds)
    return Rig(accelerator.device, name, chip, measure, accelerator.stopwatch.recover, partial(_conditions, accelerator))


def _accelerator(device: str, give: Callable[[str], Accelerator | None]) -> Accelerator:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device!r}, but PyTorch {torch.__version__} finds no CUDA device: tune where `nvidia-smi` lists one "
            "and with a build of PyTorch for CUDA. Without a GPU there is nothing to tune."
        )
    accelerator = give(device)
    assert accelerator is not None
    return accelerator


@contextmanager
def _conditions(accelerator: Accelerator, problem: Problem) -> Iterator[None]:
    """Compute a problem on the device, with PyTorch's settings for its type and cuDNN looking for its fastest way."""
    from widekernel.bench.precision import PRECISIONS, TF32, in_force

    precision = TF32 if problem.tf32 else PRECISIONS[str(problem.dtype).removeprefix("torch.")]
    with accelerator.current(), in_force(precision):
        yield


def in_turns(calls: Mapping[str, Callable[[], Any]], stopwatch: Stopwatch, seconds: float) -> dict[str, float]:
    """Give the median seconds of each call."""
    from widekernel.bench.device_operators import PATIENCE
    from widekernel.bench.timing import first_calls, interleave

    # One by one, so that what each returns is freed before the next.
    first = {name: first_calls({name: call}, stopwatch)[1][name] for name, call in calls.items()}
    timings = interleave(calls, first, seconds, None, PATIENCE, stopwatch)
    return {name: timing.median for name, timing in timings.items()}


@dataclass
class Session:
    """A run, from the problems to the printed table."""

    rig: Rig
    target: Path
    gpu: str
    most: int
    again: bool
    in_full: bool
    course: Course
    used: dict[str, str]
    done: list[Tuning] = field(default_factory=list)
    skipped: int = 0

    @classmethod
    def begun(cls, values: dict[str, Any], rig: Rig, target: Path) -> Session:
        """Begin to count the minutes."""
        from widekernel.bench.time_budget import Course
        from widekernel.ops.gpu.tuning import versions

        gpu = rig.name if values["table"] is None else rig.chip.name
        options = values["candidates"], values["again"], values["report"]
        return cls(rig, target, gpu, *options, Course(values["minutes"]), versions())

    def tune(self, problems: Sequence[Problem]) -> None:
        """Tune problem after problem and write every winner, as long as there is time."""
        from widekernel.ops.gpu.tuning import is_left_to_pytorch, is_tuned

        there = tables.read(self.target).get(self.gpu, {}) if self.target.exists() else {}
        waiting, known = list(problems), {tables.key_of(problem) for problem in problems}
        with progress(len(waiting)) as advance:
            while waiting:
                problem = waiting.pop(0)
                key = tables.key_of(problem)
                if not self.again and is_tuned(there.get(key), problem, self.rig.chip, self.most, self.used):
                    self.skipped += 1
                elif not self.course.has_time():
                    self.course.leave_out("this run", "problems", key)
                    continue
                else:
                    advance(key, 0)
                    there |= self._tune(problem)
                if problem.op in (DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES) and is_left_to_pytorch(there.get(key)):
                    # It will be computed branch by branch, for which our kernels may be the better ones.
                    alone = {tables.key_of(branch): branch for branch in problem.branches()}
                    waiting += [branch for name, branch in alone.items() if name not in known]
                    known |= set(alone)
                advance("", 1)

    def _tune(self, problem: Problem) -> tables.Entries:
        """Tune a problem and give what was written: one entry, or none if nothing works."""
        from widekernel.bench.errors import DeviceLostError
        from widekernel.ops.gpu.tuning import Tuning

        tuning = Tuning(problem, self.rig, self.most)
        self.done.append(tuning)
        try:
            tuning.run()
        except DeviceLostError as error:
            self.course.lose_device(f"{tuning.key}: {error}")
        if tuning.best is None:
            return {}
        entries = {tuning.key: tuning.entry(self.used)}
        try:
            tables.merge(self.target, self.gpu, entries)
        except OSError as error:
            what = f"{self.target} cannot be written any more ({error.strerror})"
            raise ConfigError(f"{what}: make room for it, and go on with the same command.") from error
        return entries

    def report(self) -> None:
        """Print what was found.

        Raises:
            WidekernelError: if something computes wrongly, or has no configuration.
        """
        if self.done:
            print_table(f"Tuned for {self.rig.name}", _HEADERS, [_row(tuning) for tuning in self.done])
        if self.in_full:
            for tuning in self.done:
                print_table(
                    tuning.key, ("way", "µs", "error", "remark"), [_trial(t) for t in (*tuning.trials, *tuning.rivals)]
                )
        lines = self.course.lines()
        if self.skipped:
            lines.append(f"{self.skipped} problems were tuned before with these versions: --again tunes them anew.")
        written = sum(tuning.best is not None for tuning in self.done)
        lines.append(f"{written} entries for {self.gpu} written to {self.target}.")
        say(lines)
        wrong = [line for tuning in self.done for line in tuning.wrong()]
        if wrong:
            raise WidekernelError(
                f"{len(wrong)} configurations compute wrongly, and were not chosen: {'; '.join(wrong)}. Please report this."
            )
        without = [tuning.key for tuning in self.done if tuning.best is None]
        if without:
            raise WidekernelError(f"{len(without)} problems have no configuration that works: {'; '.join(without)}.")


_HEADERS = ("problem", "configuration", "µs", "PyTorch µs", "its best µs", "times faster", "remark")


def _row(tuning: Tuning) -> tuple[str, ...]:
    best, theirs = tuning.best, tuning.best_of_pytorch
    if best is None:
        return (tuning.key, *[""] * 5, tuning.failure or "no configuration works: --report says why")
    failed = sum(bool(trial.failure) for trial in tuning.trials)
    remarks = ["left to PyTorch"] if best.seconds > SLOWER * tuning.instead else []
    remarks += [f"{failed} of {len(tuning.trials)} failed"] if failed else []
    gain = tuning.instead / best.seconds
    times = (_us(best.seconds), _us(tuning.instead), _us(theirs.seconds) if theirs else "")
    return tuning.key, best.name, *times, f"{gain:.2f}" if gain > 0 else "", "; ".join(remarks)


def _trial(trial: Trial) -> tuple[str, ...]:
    return trial.name, _us(trial.seconds), f"{trial.error:.1e}" if trial.error >= 0 else "", trial.failure


def _us(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{1e6 * seconds:.1f}"


def print_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on standard output."""
    console = for_tables()
    table = Table(title=title)
    for header in headers:
        table.add_column(header, justify="right" if "µs" in header or header in ("error", "times faster") else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # messages of compilers are no markup
    console.print(table)


def say(lines: Iterable[str]) -> None:
    """Print lines on standard output."""
    for line in lines:
        results().print(line, soft_wrap=True)
