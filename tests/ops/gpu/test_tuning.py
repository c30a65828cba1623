"""Tuning: only a configuration that runs and is right can win, by the times of a pretended clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.cases import definition, relative_error
from tests.ops.gpu.helpers import DEVICE
from widekernel.ops import reference
from widekernel.ops.backends import triton
from widekernel.ops.gpu import baselines, machine, tuning, tuning_tables
from widekernel.ops.gpu.config_choice import ranked_configs
from widekernel.ops.gpu.kernel_configs import DirectNchw, DirectNhwc, Flat, KernelConfig, ToeplitzGrad
from widekernel.ops.gpu.tuning import MeasurementSetup, Tuning
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Problem,
)

pytestmark = pytest.mark.interpreted

SQUARE, CROSS = ((5, 5),), ((7, 3), (3, 8))
VERSIONS = {"torch": "2", "triton": "3", "widekernel": "0"}


def problem(op: str = DEPTHWISE_SUM, kernels: tuple = SQUARE, dtype: torch.dtype = torch.float32, **more) -> Problem:
    anchors = tuple((kh // 2, kw // 2) for kh, kw in kernels)
    return Problem(op, DEVICE, dtype, (3, 2, 8, 8), kernels, anchors, **more)


PROBLEMS = [
    problem(),
    problem(channels_last=True),
    problem(dtype=torch.bfloat16),
    problem(DEPTHWISE_SUM, CROSS, torch.float16),
    problem(DEPTHWISE_WEIGHT_GRAD),
    problem(DEPTHWISE_WEIGHT_GRAD, ((3, 8),), torch.bfloat16),
    problem(DEPTHWISE_BRANCHES, CROSS),
    problem(DEPTHWISE_SUM_OF_BRANCHES, CROSS),
]


class Clock:
    """Measures nothing: calls take the seconds that are given by name, and 1 second otherwise."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.measured: list[str] = []

    def __call__(self, calls: Mapping[str, object]) -> dict[str, float]:
        self.measured += calls
        return {name: self.seconds.get(name, 1.0) for name in calls}


@pytest.fixture(autouse=True)
def _no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning_tables.VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(tuning_tables, "SHIPPED", tmp_path / "shipped.json")


def setup(clock: Clock, **more) -> MeasurementSetup:
    return MeasurementSetup(torch.device(DEVICE), machine.device_name(), machine.chip(), clock, **more)


def ours(of: Problem, count: int) -> list[str]:
    return [str(config) for config in ranked_configs(of, machine.chip())[:count]]


@pytest.mark.parametrize("of", PROBLEMS, ids=tuning_tables.table_key)
def test_the_fastest_wins_and_is_used(of: Problem) -> None:
    names = ours(of, 2)
    clock = Clock(
        **{names[0]: 3e-5, names[1]: 2e-5, baselines.fallback_name(of): 5e-5, "PyTorch NCHW": 4e-5, "PyTorch NHWC": 6e-5}
    )
    done = Tuning(of, setup(clock), 2)
    done.run()
    assert not done.failure and not done.wrong_results()
    assert clock.measured[:2] == names and baselines.fallback_name(of) in clock.measured[2:]
    assert all(0 <= trial.error < 1e-2 for trial in done.trials)
    entry = done.entry(VERSIONS)
    best = 4e-5 if "PyTorch NCHW" in clock.measured else 5e-5
    fallback = clock.seconds[baselines.fallback_name(of)]
    assert entry["us"] == 20 and entry["pytorch_us"] == pytest.approx(1e6 * fallback)
    assert entry["best_pytorch_us"] == pytest.approx(1e6 * best)
    assert entry["candidates"] == 2 and {name: entry[name] for name in VERSIONS} == VERSIONS
    path = tuning_tables.tuned_file()
    assert path is not None
    tuning_tables.merge(path, machine.device_name(), {done.key: entry})
    planned = triton.planned(of)
    assert str(planned) == f"{names[1]}; tuned on this machine" and not planned.better_in_pytorch


@pytest.mark.parametrize("of", PROBLEMS, ids=tuning_tables.table_key)
def test_pytorch_calls_and_exact_outputs_equal_the_definition(of: Problem) -> None:
    inputs = baselines.Inputs.random(of, torch.device(DEVICE))
    xs, kernels, grad = (inputs.xs, inputs.kernels, inputs.grad)
    if grad is not None:
        wanted = [reference.depthwise_weight_grad(xs[0].double(), grad.double(), of.kernels[0], of.anchors[0])]
    else:
        sources = xs if len(xs) > 1 else xs * len(kernels)
        wanted = [definition(x.double(), [kernel.double()], [at]) for x, kernel, at in zip(sources, kernels, of.anchors)]
        wanted = wanted if of.op == DEPTHWISE_BRANCHES else [sum(wanted)]  # type: ignore[list-item]
    for call in baselines.pytorch_calls(of, inputs).values():
        result = call()
        for y, exact in zip([result] if isinstance(result, torch.Tensor) else result, wanted):
            assert relative_error(y, exact) < 2e-2
    if grad is None:
        for y, exact in zip(baselines.exact_outputs(of, inputs), wanted):
            assert relative_error(y, exact[[0, 2]]) < 1e-12
    else:
        few = inputs.with_compared_gradients()
        exact = reference.depthwise_weight_grad(xs[0].double(), few.grad.double(), of.kernels[0], of.anchors[0])
        assert relative_error(baselines.exact_outputs(of, inputs)[0], exact) < 1e-12


def corrupting(monkeypatch: pytest.MonkeyPatch, corrupted: str, how) -> None:
    """Make one configuration return what `how` makes of the right result."""

    def spoil(of: Problem, config: KernelConfig, *others: Any) -> Callable[[], torch.Tensor]:
        call = baselines.kernel_call(of, config, *others)
        return (lambda: how(call())) if str(config) == corrupted else call

    monkeypatch.setattr(tuning, "kernel_call", spoil)


def one_off(y: torch.Tensor) -> torch.Tensor:
    y[-1, -1, 0, -1] += 1
    return y


def unwritten(y: torch.Tensor) -> torch.Tensor:
    return torch.full_like(y, math.nan)


@pytest.mark.parametrize("how", [one_off, unwritten, lambda y: y[:, :1]])
def test_a_wrong_configuration_never_wins(how, monkeypatch: pytest.MonkeyPatch) -> None:
    of = problem()
    first, second = ours(of, 2)
    corrupting(monkeypatch, first, how)
    clock = Clock(**{first: 1e-9, second: 1e-3})
    done = Tuning(of, setup(clock), 2)
    done.run()
    assert done.best is not None and done.best.name == second and first not in clock.measured
    (line,) = done.wrong_results()
    assert line.startswith(f"{done.key}: {first} differs from float64 by") and "more than 8e-06" in line


class OutOfResourcesError(Exception):
    pass


def failing(monkeypatch: pytest.MonkeyPatch, *failing: str) -> None:
    def fail(of: Problem, config: KernelConfig, *others: Any) -> Callable[[], torch.Tensor]:
        if str(config) in failing:
            raise OutOfResourcesError("out of resource: shared memory\nand more")
        return baselines.kernel_call(of, config, *others)

    monkeypatch.setattr(tuning, "kernel_call", fail)


def test_a_failing_configuration_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    of, recovered = problem(), []
    first, second, third = ours(of, 3)
    failing(monkeypatch, first, third)
    clock = Clock()
    done = Tuning(of, setup(clock, recover=lambda: recovered.append(1)), 3)
    done.run()
    assert done.best is not None and done.best.name == second and not done.wrong_results()
    assert [trial.failure for trial in done.trials][::2] == ["OutOfResourcesError: out of resource: shared memory"] * 2
    assert len(recovered) == 2


def test_no_configuration_works(monkeypatch: pytest.MonkeyPatch) -> None:
    of = problem()
    failing(monkeypatch, *ours(of, 2))
    done = Tuning(of, setup(Clock()), 2)
    done.run()
    assert done.best is None and done.best_pytorch_trial is not None
    monkeypatch.setattr(tuning, "ranked_configs", lambda *_: [])
    done = Tuning(of, setup(Clock()), 2)
    done.run()
    assert done.failure == "no configuration can compute it" and tuning.longest_first({of: 1}, machine.chip()) == [of]


def test_a_lost_device_ends_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    of = problem()
    failing(monkeypatch, ours(of, 1)[0])

    def lost() -> None:
        raise ConnectionError("lost")

    done = Tuning(of, setup(Clock(), recover=lost), 2)
    with pytest.raises(ConnectionError):
        done.run()
    assert "OutOfResources" in done.trials[0].failure and done.failure == "ConnectionError: lost" and done.best is None


def test_no_memory_for_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(baselines.Inputs, "random", no_memory)
    done = Tuning(problem(), setup(Clock()), 2)
    done.run()
    assert done.failure.startswith("OutOfMemoryError: CUDA out of memory") and done.best is None


def test_conditions_hold_throughout() -> None:
    events = []

    @contextmanager
    def conditions(of: Problem):
        events.append("in")
        yield
        events.append("out")

    class NotingClock(Clock):
        def __call__(self, calls):
            events.append("measured")
            assert not torch.is_grad_enabled()
            return super().__call__(calls)

    Tuning(problem(), setup(NotingClock(), conditions=conditions), 1).run()
    assert events == ["in", "measured", "out"] and torch.is_grad_enabled()


def test_the_configuration_in_use_takes_part() -> None:
    of = problem()
    unpromising = ranked_configs(of, machine.chip())[-1]
    path = tuning_tables.tuned_file()
    assert path is not None
    tuning_tables.merge(path, machine.device_name(), {tuning_tables.table_key(of): {"config": unpromising.to_entry()}})
    done = Tuning(of, setup(Clock()), 2)
    done.run()
    assert [trial.name for trial in done.trials] == [str(unpromising), *ours(of, 1)]


def test_what_counts_as_tuned() -> None:
    of, chip = problem(), machine.chip()
    possible = ranked_configs(of, chip)
    entry = {"config": possible[0].to_entry(), "us": 1.0, "pytorch_us": 1.0, "candidates": 5, **VERSIONS}

    def is_tuned(most: int = 5, used: Mapping[str, str] = VERSIONS, **change: object) -> bool:
        return tuning.is_tuned(entry | change, of, chip, most, used)

    assert is_tuned() and is_tuned(3)
    assert not is_tuned(6) and is_tuned(10_000, candidates=len(possible))
    assert not is_tuned(used=VERSIONS | {"torch": "3"}) and not is_tuned(triton=None) and not is_tuned(candidates=None)
    assert not is_tuned(config=Flat(4, 1, 16, 16).to_entry()) and not tuning.is_tuned(None, of, chip, 1, VERSIONS)
    assert set(tuning.installed_versions()) == set(VERSIONS)


def test_what_counts_as_left_to_pytorch() -> None:
    for us, theirs, is_left in ((10, 20, False), (21, 20, False), (21.1, 20, True), (None, 20, False), (9, None, False)):
        assert tuning.is_left_to_pytorch({"us": us, "pytorch_us": theirs}) == is_left
    assert not tuning.is_left_to_pytorch(None)


def test_longest_problems_come_first_and_one_for_each_key() -> None:
    chip = machine.chip()
    small, large = problem(), Problem(DEPTHWISE_SUM, DEVICE, torch.float32, (64, 256, 64, 64), ((31, 31),), ((15, 15),))
    same = Problem(DEPTHWISE_SUM, DEVICE, torch.float32, (63, 250, 64, 64), ((31, 31),), ((15, 15),))
    assert tuning.longest_first({small: 1, same: 1, large: 1}, chip) == [large, small]
    assert tuning.longest_first({small: 1_000_000_000, large: 1}, chip) == [small, large]


@pytest.mark.parametrize(
    "config", [DirectNchw(4, 1, 2, 32), DirectNhwc(4, 1, 2, 4, 32), ToeplitzGrad(4, 3, 2, 16, 16, 32)], ids=str
)
def test_entries_survive_a_file(config: KernelConfig, tmp_path: Path) -> None:
    tuning_tables.merge(tmp_path / "t.json", "A", {"k": {"config": config.to_entry()}})
    assert tuning_tables.entry_config(tuning_tables.read(tmp_path / "t.json")["A"]["k"]) == config
