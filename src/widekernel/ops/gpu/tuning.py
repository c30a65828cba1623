"""The search for the fastest configuration of a problem: candidates are checked against float64 and timed in turn.

The caller provides the device and the function that times calls; nothing here reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from widekernel.errors import in_short
from widekernel.ops.gpu.baselines import (
    Call,
    Inputs,
    compared_outputs,
    exact_outputs,
    fallback_name,
    fill_free_memory_with_nan,
    kernel_call,
    pytorch_calls,
)
from widekernel.ops.gpu.candidates import candidates
from widekernel.ops.gpu.config_choice import TOLERATED_SLOWDOWN, choose_config, ranked_configs
from widekernel.ops.gpu.cost_model import estimated_cycles
from widekernel.ops.gpu.kernel_configs import Chip, KernelConfig
from widekernel.ops.gpu.tuning_tables import Entry, entry_config, table_key
from widekernel.ops.problem import Problem
from widekernel.ops.reference import relative_error

TOLERANCE = {torch.float32: 8e-6, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
"""Largest error allowed, relative to the largest exact number."""
TF32_TOLERANCE = 2e-3


def _unchanged(problem: Problem) -> AbstractContextManager[Any]:
    return nullcontext()


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class MeasurementSetup:
    """The device and the functions with which candidates are measured.

    Attributes:
        device: the device that computes.
        name: full name of the device, which is its key in this machine's table.
        chip: properties of the device.
        measure: warms up several calls, times them in turn, and returns the seconds of each.
        recover: frees what a failed call has left behind, and raises if no further call can succeed.
        conditions: creates a context with the PyTorch settings under which a problem is computed; it restores the old ones.
    """

    device: torch.device
    name: str
    chip: Chip
    measure: Callable[[Mapping[str, Call]], Mapping[str, float]]
    recover: Callable[[], None] = _nothing
    conditions: Callable[[Problem], AbstractContextManager[Any]] = _unchanged


@dataclass
class Trial:
    """The result of one way to compute a problem.

    Attributes:
        name: name of the configuration, or of the PyTorch call.
        config: the configuration; None for PyTorch.
        seconds: time of a call; NaN if it was not timed.
        error: error of the output, relative to the largest number; NaN if nothing was compared.
        failure: why it was not timed; '' if it was.
        wrong: whether it was not timed because its output is wrong.
    """

    name: str
    config: KernelConfig | None = None
    seconds: float = math.nan
    error: float = math.nan
    failure: str = ""
    wrong: bool = False


@dataclass
class Tuning:
    """The tuning of one problem. The trials stay readable if it is interrupted.

    Attributes:
        problem: the problem to compute.
        setup: where and how candidates are measured.
        max_candidates: number of configurations to try.
        trials: the trials of our kernels, the most promising first.
        pytorch_trials: the trials of the PyTorch calls.
        failure: why nothing could be tried; '' otherwise.
    """

    problem: Problem
    setup: MeasurementSetup
    max_candidates: int
    trials: list[Trial] = field(default_factory=list)
    pytorch_trials: list[Trial] = field(default_factory=list)
    failure: str = ""

    @property
    def key(self) -> str:
        """Key of the problem in tables."""
        return table_key(self.problem)

    @property
    def best(self) -> Trial | None:
        """The fastest trial of our kernels with correct output; None if there is none."""
        return _fastest(self.trials)

    @property
    def fallback_seconds(self) -> float:
        """Seconds that PyTorch takes for the problem when our kernels do not run; NaN if not measured."""
        return next((trial.seconds for trial in self.pytorch_trials if trial.name == fallback_name(self.problem)), math.nan)

    @property
    def best_pytorch_trial(self) -> Trial | None:
        """The fastest trial of the PyTorch calls, whether or not that call would ever be used."""
        return _fastest(self.pytorch_trials)

    def wrong_results(self) -> list[str]:
        """Return a line for each configuration that computes wrong results."""
        return [f"{self.key}: {trial.name} {trial.failure}" for trial in self.trials if trial.wrong]

    def run(self) -> None:
        """Try the configurations and the PyTorch calls, and record failures.

        Raises:
            Exception: any error that `MeasurementSetup.recover` raises.
        """
        configs = ranked_configs(self.problem, self.setup.chip)
        if not configs:
            self.failure = "no configuration can compute it"
            return
        configs = list(dict.fromkeys([self._current_config(), *configs]))[: self.max_candidates]
        self.trials = [Trial(str(config), config) for config in configs]
        with self.setup.conditions(self.problem), torch.no_grad():
            self._attempt(self, self._measure)

    def entry(self, versions: Mapping[str, str]) -> Entry:
        """Return the table entry of the best configuration, including the versions in use."""
        best, theirs = self.best, self.best_pytorch_trial
        assert best is not None
        assert best.config is not None
        return {
            "config": best.config.to_entry(),
            "us": _microseconds(best.seconds),
            "pytorch_us": _microseconds(self.fallback_seconds),
            "best_pytorch_us": _microseconds(theirs.seconds if theirs else math.nan),
            "error": best.error if math.isfinite(best.error) else None,
            "candidates": len(self.trials),
            "device": self.setup.name,
            **versions,
        }

    def _current_config(self) -> KernelConfig:
        """Return the configuration in use; it may come from a table and need not be among the promising ones."""
        return choose_config(self.problem, self.setup.chip, self.setup.name).config

    def _measure(self) -> None:
        inputs = Inputs.random(self.problem, self.setup.device)
        calls = dict(self._checked_calls(inputs))
        for name, call in pytorch_calls(self.problem, inputs).items():
            trial = Trial(name)
            self.pytorch_trials.append(trial)
            self._attempt(trial, call)
            if not trial.failure:
                calls[name] = call
        seconds = self.setup.measure(calls)
        for trial in (*self.trials, *self.pytorch_trials):
            trial.seconds = seconds.get(trial.name, math.nan)

    def _checked_calls(self, inputs: Inputs) -> Iterator[tuple[str, Call]]:
        few, wanted = inputs.with_compared_gradients(), exact_outputs(self.problem, inputs)
        limit = TF32_TOLERANCE if self.problem.tf32 else TOLERANCE[self.problem.dtype]
        for trial in self.trials:

            def compare(trial: Trial = trial) -> None:
                assert trial.config is not None
                call = kernel_call(self.problem, trial.config, self.setup.chip, few)
                fill_free_memory_with_nan(self.problem, self.setup.device)
                outputs = compared_outputs(self.problem, call())
                trial.error = max((relative_error(y, e) for y, e in zip(outputs, wanted)), key=_nan_as_infinity)

            self._attempt(trial, compare)
            # Written so that NaN is an error as well.
            if not trial.failure and not trial.error <= limit:
                trial.wrong = True
                trial.failure = f"differs from float64 by {trial.error:.2g} of the largest number, more than {limit:g}"
            if not trial.failure:
                assert trial.config is not None
                yield trial.name, kernel_call(self.problem, trial.config, self.setup.chip, inputs)

    def _attempt(self, what: Trial | Tuning, call: Call) -> None:
        """Make a call; if it fails, record the error in `what`."""
        try:
            call()
            return
        except Exception as error:
            what.failure = in_short(error)
        # Outside the handler: the error keeps the tensors of its traceback's frames alive.
        self.setup.recover()


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that times depend on."""
    found = {"torch": str(torch.__version__)}
    for package in ("triton", "widekernel"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def is_tuned(entry: Entry | None, problem: Problem, chip: Chip, max_candidates: int, versions: Mapping[str, str]) -> bool:
    """Return whether an entry is current: tuned with these versions, among at least as many candidates, and able to run."""
    if entry is None or any(entry.get(name) != version for name, version in versions.items()):
        return False
    possible, tried = candidates(problem, chip), entry.get("candidates")
    return isinstance(tried, int) and tried >= min(max_candidates, len(possible)) and entry_config(entry) in possible


def is_left_to_pytorch(entry: Entry | None) -> bool:
    """Return whether PyTorch computes the problem, according to an entry."""
    return entry is not None and (entry["us"] or 0) > TOLERATED_SLOWDOWN * (entry["pytorch_us"] or math.inf)


def longest_first(counts: Mapping[Problem, int], chip: Chip) -> list[Problem]:
    """Return problems, one for each key of a table, ordered by their estimated total time, the longest first.

    Args:
        counts: number of occurrences of each problem.
        chip: the GPU that computes them.
    """
    estimated = {}
    for problem, count in counts.items():
        best = next(iter(ranked_configs(problem, chip)), None)
        estimated[problem] = 0 if best is None else count * estimated_cycles(problem, best, chip)
    chosen: dict[str, Problem] = {}
    for problem in sorted(estimated, key=lambda problem: (-estimated[problem], str(problem))):
        chosen.setdefault(table_key(problem), problem)
    return list(chosen.values())


def _nan_as_infinity(error: float) -> float:
    """Return the error, or infinity for NaN, so that NaN sorts as the largest error."""
    return math.inf if math.isnan(error) else error


def _fastest(trials: Iterable[Trial]) -> Trial | None:
    timed = [trial for trial in trials if trial.seconds > 0]
    return min(timed, key=lambda trial: trial.seconds, default=None)


def _microseconds(seconds: float) -> float | None:
    return round(1e6 * seconds, 3) if math.isfinite(seconds) else None
