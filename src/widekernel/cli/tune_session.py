"""A run of `widekernel tune`: measures problems on a CUDA device one by one, writes the winners and prints a report."""

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

from widekernel.cli.console import progress, result_console, table_console
from widekernel.errors import ConfigError, WidekernelError
from widekernel.ops.gpu import tuning_tables
from widekernel.ops.gpu.config_choice import TOLERATED_SLOWDOWN
from widekernel.ops.problem import DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES
from widekernel.settings import require

if TYPE_CHECKING:
    from widekernel.bench.devices import Accelerator
    from widekernel.bench.time_budget import TimeBudget
    from widekernel.bench.timing import Stopwatch
    from widekernel.ops.gpu.tuning import MeasurementSetup, Trial, Tuning
    from widekernel.ops.problem import Problem


def setup_on(device: str, seconds: float) -> MeasurementSetup:
    """Return the setup that measures on a CUDA device."""
    from widekernel.bench import devices
    from widekernel.ops.gpu import machine
    from widekernel.ops.gpu.tuning import MeasurementSetup

    require(device.split(":")[0] == "cuda", "device", device, "cuda or cuda:N, because only GPU kernels are tuned")
    accelerator = _accelerator(device, devices.accelerator)
    with accelerator.current():
        obstacles = machine.obstacles("cuda")
        if obstacles:
            raise ConfigError(f"device is {device!r}, but {'; '.join(obstacles)}.")
        chip, name = machine.chip(), machine.device_name()
    measure = partial(median_seconds, stopwatch=accelerator.stopwatch, seconds=seconds)
    return MeasurementSetup(
        accelerator.device, name, chip, measure, accelerator.stopwatch.recover, partial(_conditions, accelerator)
    )


def _accelerator(device: str, find: Callable[[str], Accelerator | None]) -> Accelerator:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device!r}, but PyTorch {torch.__version__} finds no CUDA device: tune where `nvidia-smi` lists one "
            "and with a build of PyTorch for CUDA. Without a GPU there is nothing to tune."
        )
    accelerator = find(device)
    assert accelerator is not None
    return accelerator


@contextmanager
def _conditions(accelerator: Accelerator, problem: Problem) -> Iterator[None]:
    """Return a context with the device current, PyTorch's settings for a problem's precision, and cuDNN's search enabled."""
    from widekernel.bench.precision import PRECISIONS, TF32, in_force

    precision = TF32 if problem.tf32 else PRECISIONS[str(problem.dtype).removeprefix("torch.")]
    with accelerator.current(), in_force(precision):
        yield


def median_seconds(calls: Mapping[str, Callable[[], Any]], stopwatch: Stopwatch, seconds: float) -> dict[str, float]:
    """Time calls in turn; return the median seconds of each."""
    from widekernel.bench.platforms import DEVICE_PATIENCE
    from widekernel.bench.timing import first_calls, interleave

    # One by one, so that the result of each call is freed before the next one.
    first = {name: first_calls({name: call}, stopwatch)[1][name] for name, call in calls.items()}
    timings = interleave(calls, first, seconds, None, DEVICE_PATIENCE, stopwatch)
    return {name: timing.median for name, timing in timings.items()}


@dataclass
class Session:
    """A run, from the problems to the printed report.

    Attributes:
        setup: where and how candidates are measured.
        target: file of the table that is written.
        gpu: key of the GPU in that table.
        max_candidates: number of configurations to try for each problem.
        again: whether to tune problems that were tuned before with the same versions.
        full_report: whether to print every configuration that was tried.
        budget: the time budget.
        versions: versions of the packages that times depend on.
        done: the problems that were tuned.
        skipped: number of problems that had been tuned before.
    """

    setup: MeasurementSetup
    target: Path
    gpu: str
    max_candidates: int
    again: bool
    full_report: bool
    budget: TimeBudget
    versions: dict[str, str]
    done: list[Tuning] = field(default_factory=list)
    skipped: int = 0

    @classmethod
    def start(cls, values: dict[str, Any], setup: MeasurementSetup, target: Path) -> Session:
        """Return a new session whose time budget starts now."""
        from widekernel.bench.time_budget import TimeBudget
        from widekernel.ops.gpu.tuning import installed_versions

        gpu = setup.name if values["table"] is None else setup.chip.name
        options = values["candidates"], values["again"], values["report"]
        return cls(setup, target, gpu, *options, TimeBudget(values["minutes"]), installed_versions())

    def tune(self, problems: Sequence[Problem]) -> None:
        """Tune one problem after another and write every winner, as long as there is time."""
        from widekernel.ops.gpu.tuning import is_left_to_pytorch, is_tuned

        there = tuning_tables.read(self.target).get(self.gpu, {}) if self.target.exists() else {}
        waiting, known = list(problems), {tuning_tables.table_key(problem) for problem in problems}
        with progress(len(waiting)) as advance:
            while waiting:
                problem = waiting.pop(0)
                key = tuning_tables.table_key(problem)
                if not self.again and is_tuned(there.get(key), problem, self.setup.chip, self.max_candidates, self.versions):
                    self.skipped += 1
                elif not self.budget.has_time():
                    self.budget.leave_out("this run", "problems", key)
                    continue
                else:
                    advance(key, 0)
                    there |= self._tune(problem)
                if problem.op in (DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES) and is_left_to_pytorch(there.get(key)):
                    # It will be computed branch by branch, where our kernels may be faster.
                    alone = {tuning_tables.table_key(branch): branch for branch in problem.branches()}
                    waiting += [branch for name, branch in alone.items() if name not in known]
                    known |= set(alone)
                advance("", 1)

    def _tune(self, problem: Problem) -> tuning_tables.Entries:
        """Tune a problem and return the written entries: one, or none if no configuration works."""
        from widekernel.bench.errors import DeviceLostError
        from widekernel.ops.gpu.tuning import Tuning

        tuning = Tuning(problem, self.setup, self.max_candidates)
        self.done.append(tuning)
        try:
            tuning.run()
        except DeviceLostError as error:
            self.budget.lose_device(f"{tuning.key}: {error}")
        if tuning.best is None:
            return {}
        entries = {tuning.key: tuning.entry(self.versions)}
        try:
            tuning_tables.merge(self.target, self.gpu, entries)
        except OSError as error:
            what = f"{self.target} can no longer be written ({error.strerror})"
            raise ConfigError(f"{what}: make room for it, and continue with the same command.") from error
        return entries

    def report(self) -> None:
        """Print the results.

        Raises:
            WidekernelError: if a configuration computes wrong results, or a problem has no configuration that works.
        """
        if self.done:
            print_table(f"Tuned for {self.setup.name}", _HEADERS, [_row(tuning) for tuning in self.done])
        if self.full_report:
            for tuning in self.done:
                print_table(
                    tuning.key,
                    ("computed by", "µs", "error", "remark"),
                    [_trial(t) for t in (*tuning.trials, *tuning.pytorch_trials)],
                )
        lines = self.budget.lines()
        if self.skipped:
            lines.append(f"{self.skipped} problems were tuned before with these versions: --again tunes them again.")
        written = sum(tuning.best is not None for tuning in self.done)
        lines.append(f"{written} entries for {self.gpu} written to {self.target}.")
        say(lines)
        wrong = [line for tuning in self.done for line in tuning.wrong_results()]
        if wrong:
            raise WidekernelError(
                f"{len(wrong)} configurations compute wrong results and were not chosen: {'; '.join(wrong)}. "
                "Please report this."
            )
        without = [tuning.key for tuning in self.done if tuning.best is None]
        if without:
            raise WidekernelError(f"{len(without)} problems have no configuration that works: {'; '.join(without)}.")


_HEADERS = ("problem", "configuration", "µs", "PyTorch µs", "its best µs", "times faster", "remark")


def _row(tuning: Tuning) -> tuple[str, ...]:
    best, theirs = tuning.best, tuning.best_pytorch_trial
    if best is None:
        return (tuning.key, *[""] * 5, tuning.failure or "no configuration works: --report says why")
    failed = sum(bool(trial.failure) for trial in tuning.trials)
    remarks = ["left to PyTorch"] if best.seconds > TOLERATED_SLOWDOWN * tuning.fallback_seconds else []
    remarks += [f"{failed} of {len(tuning.trials)} failed"] if failed else []
    gain = tuning.fallback_seconds / best.seconds
    times = (_us(best.seconds), _us(tuning.fallback_seconds), _us(theirs.seconds) if theirs else "")
    return tuning.key, best.name, *times, f"{gain:.2f}" if gain > 0 else "", "; ".join(remarks)


def _trial(trial: Trial) -> tuple[str, ...]:
    return trial.name, _us(trial.seconds), f"{trial.error:.1e}" if trial.error >= 0 else "", trial.failure


def _us(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{1e6 * seconds:.1f}"


def print_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on standard output."""
    console = table_console()
    table = Table(title=title)
    for header in headers:
        table.add_column(header, justify="right" if "µs" in header or header in ("error", "times faster") else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # as plain text, because compiler messages are not markup
    console.print(table)


def say(lines: Iterable[str]) -> None:
    """Print lines on standard output."""
    for line in lines:
        result_console().print(line, soft_wrap=True)
