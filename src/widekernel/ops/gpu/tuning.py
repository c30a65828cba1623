"""Which configuration is fastest for a problem: candidates are checked against float64, timed in turns, the best one kept.

How calls are timed is handed in, as is the device; nothing here reads a clock.
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
from widekernel.ops.gpu.baselines import Call, Numbers, compared, exact, in_place, our_call, poison, pytorchs_calls
from widekernel.ops.gpu.candidates import candidates
from widekernel.ops.gpu.configs import Chip, Config
from widekernel.ops.gpu.cost import cycles
from widekernel.ops.gpu.plan import SLOWER, plan, ranked
from widekernel.ops.gpu.tables import Entry, config_of, key_of
from widekernel.ops.problem import Problem
from widekernel.ops.reference import relative_error

TOLERANCE = {torch.float32: 8e-6, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
"""Largest error allowed, as a share of the largest exact number."""
TF32_TOLERANCE = 2e-3


def _as_they_are(problem: Problem) -> AbstractContextManager[Any]:
    return nullcontext()


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Rig:
    """Where is measured, and how.

    Attributes:
        device: that computes.
        name: its full name, under which this machine's table has it.
        chip: what it is.
        measure: gives the seconds of each of several calls; it warms them up and makes them in turns.
        recover: frees what a failed call has left behind, and raises if no further call can work.
        conditions: makes the context with the settings of PyTorch under which a problem is computed; it restores them.
    """

    device: torch.device
    name: str
    chip: Chip
    measure: Callable[[Mapping[str, Call]], Mapping[str, float]]
    recover: Callable[[], None] = _nothing
    conditions: Callable[[Problem], AbstractContextManager[Any]] = _as_they_are


@dataclass
class Trial:
    """How one way of computing a problem did.

    Attributes:
        name: of the configuration, or of PyTorch's way.
        config: None for PyTorch's.
        seconds: of a call; NaN if it has no time.
        error: of the result, relative to the largest number; NaN where nothing was compared.
        failure: why it has no time, '' if it has one.
        wrong: whether it has none because of its error.
    """

    name: str
    config: Config | None = None
    seconds: float = math.nan
    error: float = math.nan
    failure: str = ""
    wrong: bool = False


@dataclass
class Tuning:
    """The tuning of one problem, which fills in the trials; they stay readable if it breaks off.

    Attributes:
        problem: what is computed.
        rig: on what.
        most: configurations that are tried.
        trials: of ours, the most promising first.
        rivals: of PyTorch's ways.
        failure: why nothing could be tried, '' otherwise.
    """

    problem: Problem
    rig: Rig
    most: int
    trials: list[Trial] = field(default_factory=list)
    rivals: list[Trial] = field(default_factory=list)
    failure: str = ""

    @property
    def key(self) -> str:
        """The line of a table."""
        return key_of(self.problem)

    @property
    def best(self) -> Trial | None:
        """The fastest of ours that is right; None if none is."""
        return _fastest(self.trials)

    @property
    def instead(self) -> float:
        """Seconds of what computes the problem if we leave it to PyTorch; NaN if that has no time."""
        return next((rival.seconds for rival in self.rivals if rival.name == in_place(self.problem)), math.nan)

    @property
    def best_of_pytorch(self) -> Trial | None:
        """The fastest of PyTorch's ways, whether or not anything would take it."""
        return _fastest(self.rivals)

    def wrong(self) -> list[str]:
        """Say which configurations compute wrongly, a line each."""
        return [f"{self.key}: {trial.name} {trial.failure}" for trial in self.trials if trial.wrong]

    def run(self) -> None:
        """Try the configurations and PyTorch's ways; what fails is noted.

        Raises:
            Exception: what `Rig.recover` raises.
        """
        configs = ranked(self.problem, self.rig.chip)
        if not configs:
            self.failure = "there is no configuration for it"
            return
        configs = list(dict.fromkeys([self._present(), *configs]))[: self.most]
        self.trials = [Trial(str(config), config) for config in configs]
        with self.rig.conditions(self.problem), torch.no_grad():
            self._attempt(self, self._measure)

    def entry(self, used: Mapping[str, str]) -> Entry:
        """Give the entry of the best; the versions in use are noted in it."""
        best, theirs = self.best, self.best_of_pytorch
        assert best is not None
        assert best.config is not None
        return {
            "config": best.config.entry(),
            "us": _microseconds(best.seconds),
            "pytorch_us": _microseconds(self.instead),
            "best_pytorch_us": _microseconds(theirs.seconds if theirs else math.nan),
            "error": best.error if math.isfinite(best.error) else None,
            "candidates": len(self.trials),
            "device": self.rig.name,
            **used,
        }

    def _present(self) -> Config:
        """Give the configuration in use, which may come from a table and need not be promising."""
        return plan(self.problem, self.rig.chip, self.rig.name).config

    def _measure(self) -> None:
        numbers = Numbers.drawn(self.problem, self.rig.device)
        calls = dict(self._right_ones(numbers))
        for name, call in pytorchs_calls(self.problem, numbers).items():
            rival = Trial(name)
            self.rivals.append(rival)
            self._attempt(rival, call)
            if not rival.failure:
                calls[name] = call
        seconds = self.rig.measure(calls)
        for trial in (*self.trials, *self.rivals):
            trial.seconds = seconds.get(trial.name, math.nan)

    def _right_ones(self, numbers: Numbers) -> Iterator[tuple[str, Call]]:
        few, wanted = numbers.with_few_gradients(), exact(self.problem, numbers)
        limit = TF32_TOLERANCE if self.problem.tf32 else TOLERANCE[self.problem.dtype]
        for trial in self.trials:

            def compare(trial: Trial = trial) -> None:
                assert trial.config is not None
                call = our_call(self.problem, trial.config, self.rig.chip, few)
                poison(self.problem, self.rig.device)
                outputs = compared(self.problem, call())
                trial.error = max((relative_error(y, e) for y, e in zip(outputs, wanted)), key=_or_infinity)

            self._attempt(trial, compare)
            # Written so that NaN is an error as well.
            if not trial.failure and not trial.error <= limit:
                trial.wrong = True
                trial.failure = f"differs from float64 by {trial.error:.2g} of the largest number, more than {limit:g}"
            if not trial.failure:
                assert trial.config is not None
                yield trial.name, our_call(self.problem, trial.config, self.rig.chip, numbers)

    def _attempt(self, what: Trial | Tuning, call: Call) -> None:
        """Make a call, and note at `what` how it failed if it did."""
        try:
            call()
            return
        except Exception as error:
            what.failure = in_short(error)
        # Outside of the handler: while the error lives, so do the tensors of the frames that it came through.
        self.rig.recover()


def versions() -> dict[str, str]:
    """Give the versions that times depend on."""
    used = {"torch": str(torch.__version__)}
    for package in ("triton", "widekernel"):
        try:
            used[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            used[package] = "unknown"
    return used


def is_tuned(entry: Entry | None, problem: Problem, chip: Chip, most: int, used: Mapping[str, str]) -> bool:
    """Whether an entry was found with these versions, from at least as many configurations, and can be run still."""
    if entry is None or any(entry.get(name) != version for name, version in used.items()):
        return False
    possible, tried = candidates(problem, chip), entry.get("candidates")
    return isinstance(tried, int) and tried >= min(most, len(possible)) and config_of(entry) in possible


def is_left_to_pytorch(entry: Entry | None) -> bool:
    """Whether an entry has PyTorch compute the problem."""
    return entry is not None and (entry["us"] or 0) > SLOWER * (entry["pytorch_us"] or math.inf)


def by_weight(counts: Mapping[Problem, int], chip: Chip) -> list[Problem]:
    """Order problems by the time that they should take altogether, the longest first; one for each line of a table.

    Args:
        counts: how often each problem occurs.
        chip: what computes them.
    """
    estimated = {}
    for problem, count in counts.items():
        best = next(iter(ranked(problem, chip)), None)
        estimated[problem] = 0 if best is None else count * cycles(problem, best, chip)
    chosen: dict[str, Problem] = {}
    for problem in sorted(estimated, key=lambda problem: (-estimated[problem], str(problem))):
        chosen.setdefault(key_of(problem), problem)
    return list(chosen.values())


def _or_infinity(error: float) -> float:
    """Let NaN be the largest of errors."""
    return math.inf if math.isnan(error) else error


def _fastest(trials: Iterable[Trial]) -> Trial | None:
    timed = [trial for trial in trials if trial.seconds > 0]
    return min(timed, key=lambda trial: trial.seconds, default=None)


def _microseconds(seconds: float) -> float | None:
    return round(1e6 * seconds, 3) if math.isfinite(seconds) else None
