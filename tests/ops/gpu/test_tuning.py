"""Tuning: only what is right and runs can win, by the times that a pretended clock gives."""

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
from widekernel.ops.gpu import baselines, machine, tables, tuning
from widekernel.ops.gpu.configs import Channels, Config, Flat, Planes, ToeplitzGrad
from widekernel.ops.gpu.plan import ranked
from widekernel.ops.gpu.tuning import Rig, Tuning
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Problem,
)

pytestmark = pytest.mark.interpreted

SQUARE, CROSS = ((5, 5),), ((7, 3), (3, 8))
USED = {"torch": "2", "triton": "3", "widekernel": "0"}


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
    """Measures nothing: the calls take the seconds that are given by name, and the others 1."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.measured: list[str] = []

    def __call__(self, calls: Mapping[str, object]) -> dict[str, float]:
        self.measured += calls
        return {name: self.seconds.get(name, 1.0) for name in calls}


@pytest.fixture(autouse=True)
def _no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped.json")


def rig(clock: Clock, **more) -> Rig:
    return Rig(torch.device(DEVICE), machine.device_name(), machine.chip(), clock, **more)


def ours(of: Problem, count: int) -> list[str]:
    return [str(config) for config in ranked(of, machine.chip())[:count]]


@pytest.mark.parametrize("of", PROBLEMS, ids=tables.key_of)
def test_the_fastest_wins_and_is_used(of: Problem) -> None:
    names = ours(of, 2)
    clock = Clock(
        **{names[0]: 3e-5, names[1]: 2e-5, baselines.in_place(of): 5e-5, "PyTorch NCHW": 4e-5, "PyTorch NHWC": 6e-5}
    )
    done = Tuning(of, rig(clock), 2)
    done.run()
    assert not done.failure and not done.wrong()
    assert clock.measured[:2] == names and baselines.in_place(of) in clock.measured[2:]
    assert all(0 <= trial.error < 1e-2 for trial in done.trials)
    entry = done.entry(USED)
    best = 4e-5 if "PyTorch NCHW" in clock.measured else 5e-5
    in_place = clock.seconds[baselines.in_place(of)]
    assert entry["us"] == 20 and entry["pytorch_us"] == pytest.approx(1e6 * in_place)
    assert entry["best_pytorch_us"] == pytest.approx(1e6 * best)
    assert entry["candidates"] == 2 and {name: entry[name] for name in USED} == USED
    path = tables.tuned_file()
    assert path is not None
    tables.merge(path, machine.device_name(), {done.key: entry})
    planned = triton.planned(of)
    assert str(planned) == f"{names[1]}; tuned on this machine" and not planned.better_in_pytorch


@pytest.mark.parametrize("of", PROBLEMS, ids=tables.key_of)
def test_what_results_are_compared_with(of: Problem) -> None:
    """PyTorch's ways and the exact results are those of the definition."""
    numbers = baselines.Numbers.drawn(of, torch.device(DEVICE))
    xs, kernels, grad = (numbers.xs, numbers.kernels, numbers.grad)
    if grad is not None:
        wanted = [reference.depthwise_weight_grad(xs[0].double(), grad.double(), of.kernels[0], of.anchors[0])]
    else:
        sources = xs if len(xs) > 1 else xs * len(kernels)
        wanted = [definition(x.double(), [kernel.double()], [at]) for x, kernel, at in zip(sources, kernels, of.anchors)]
        wanted = wanted if of.op == DEPTHWISE_BRANCHES else [sum(wanted)]  # type: ignore[list-item]
    for call in baselines.pytorchs_calls(of, numbers).values():
        result = call()
        for y, exact in zip([result] if isinstance(result, torch.Tensor) else result, wanted):
            assert relative_error(y, exact) < 2e-2
    if grad is None:
        for y, exact in zip(baselines.exact(of, numbers), wanted):
            assert relative_error(y, exact[[0, 2]]) < 1e-12
    else:
        few = numbers.with_few_gradients()
        exact = reference.depthwise_weight_grad(xs[0].double(), few.grad.double(), of.kernels[0], of.anchors[0])
        assert relative_error(baselines.exact(of, numbers)[0], exact) < 1e-12


def spoiling(monkeypatch: pytest.MonkeyPatch, spoilt: str, how) -> None:
    """Have one configuration answer with what `how` makes of the right result."""

    def spoil(of: Problem, config: Config, *others: Any) -> Callable[[], torch.Tensor]:
        call = baselines.our_call(of, config, *others)
        return (lambda: how(call())) if str(config) == spoilt else call

    monkeypatch.setattr(tuning, "our_call", spoil)


def one_off(y: torch.Tensor) -> torch.Tensor:
    y[-1, -1, 0, -1] += 1
    return y


def unwritten(y: torch.Tensor) -> torch.Tensor:
    return torch.full_like(y, math.nan)


@pytest.mark.parametrize("how", [one_off, unwritten, lambda y: y[:, :1]])
def test_what_is_wrong_never_wins(how, monkeypatch: pytest.MonkeyPatch) -> None:
    of = problem()
    first, second = ours(of, 2)
    spoiling(monkeypatch, first, how)
    clock = Clock(**{first: 1e-9, second: 1e-3})
    done = Tuning(of, rig(clock), 2)
    done.run()
    assert done.best is not None and done.best.name == second and first not in clock.measured
    (line,) = done.wrong()
    assert line.startswith(f"{done.key}: {first} differs from float64 by") and "more than 8e-06" in line


class OutOfResourcesError(Exception):
    pass


def failing(monkeypatch: pytest.MonkeyPatch, *failing: str) -> None:
    def fail(of: Problem, config: Config, *others: Any) -> Callable[[], torch.Tensor]:
        if str(config) in failing:
            raise OutOfResourcesError("out of resource: shared memory\nand more")
        return baselines.our_call(of, config, *others)

    monkeypatch.setattr(tuning, "our_call", fail)


def test_what_fails_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    of, recovered = problem(), []
    first, second, third = ours(of, 3)
    failing(monkeypatch, first, third)
    clock = Clock()
    done = Tuning(of, rig(clock, recover=lambda: recovered.append(1)), 3)
    done.run()
    assert done.best is not None and done.best.name == second and not done.wrong()
    assert [trial.failure for trial in done.trials][::2] == ["OutOfResourcesError: out of resource: shared memory"] * 2
    assert len(recovered) == 2


def test_nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    of = problem()
    failing(monkeypatch, *ours(of, 2))
    done = Tuning(of, rig(Clock()), 2)
    done.run()
    assert done.best is None and done.best_of_pytorch is not None
    monkeypatch.setattr(tuning, "ranked", lambda *_: [])
    done = Tuning(of, rig(Clock()), 2)
    done.run()
    assert done.failure == "there is no configuration for it" and tuning.by_weight({of: 1}, machine.chip()) == [of]


def test_a_lost_device_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    of = problem()
    failing(monkeypatch, ours(of, 1)[0])

    def lost() -> None:
        raise ConnectionError("lost")

    done = Tuning(of, rig(Clock(), recover=lost), 2)
    with pytest.raises(ConnectionError):
        done.run()
    assert "OutOfResources" in done.trials[0].failure and done.failure == "ConnectionError: lost" and done.best is None


def test_no_memory_for_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(baselines.Numbers, "drawn", drawn)
    done = Tuning(problem(), rig(Clock()), 2)
    done.run()
    assert done.failure.startswith("OutOfMemoryError: CUDA out of memory") and done.best is None


def test_conditions_hold_throughout() -> None:
    events = []

    @contextmanager
    def conditions(of: Problem):
        events.append("in")
        yield
        events.append("out")

    class Noting(Clock):
        def __call__(self, calls):
            events.append("measured")
            assert not torch.is_grad_enabled()
            return super().__call__(calls)

    Tuning(problem(), rig(Noting(), conditions=conditions), 1).run()
    assert events == ["in", "measured", "out"] and torch.is_grad_enabled()


def test_the_configuration_in_use_takes_part() -> None:
    of = problem()
    unpromising = ranked(of, machine.chip())[-1]
    path = tables.tuned_file()
    assert path is not None
    tables.merge(path, machine.device_name(), {tables.key_of(of): {"config": unpromising.entry()}})
    done = Tuning(of, rig(Clock()), 2)
    done.run()
    assert [trial.name for trial in done.trials] == [str(unpromising), *ours(of, 1)]


def test_what_need_not_be_tuned_again() -> None:
    of, chip = problem(), machine.chip()
    possible = ranked(of, chip)
    entry = {"config": possible[0].entry(), "us": 1.0, "pytorch_us": 1.0, "candidates": 5, **USED}

    def is_tuned(most: int = 5, used: Mapping[str, str] = USED, **change: object) -> bool:
        return tuning.is_tuned(entry | change, of, chip, most, used)

    assert is_tuned() and is_tuned(3)
    assert not is_tuned(6) and is_tuned(10_000, candidates=len(possible))
    assert not is_tuned(used=USED | {"torch": "3"}) and not is_tuned(triton=None) and not is_tuned(candidates=None)
    assert not is_tuned(config=Flat(4, 1, 16, 16).entry()) and not tuning.is_tuned(None, of, chip, 1, USED)
    assert set(tuning.versions()) == set(USED)


def test_what_is_left_to_pytorch() -> None:
    for us, theirs, is_left in ((10, 20, False), (21, 20, False), (21.1, 20, True), (None, 20, False), (9, None, False)):
        assert tuning.is_left_to_pytorch({"us": us, "pytorch_us": theirs}) == is_left
    assert not tuning.is_left_to_pytorch(None)


def test_the_heaviest_come_first_and_one_for_each_key() -> None:
    chip = machine.chip()
    small, large = problem(), Problem(DEPTHWISE_SUM, DEVICE, torch.float32, (64, 256, 64, 64), ((31, 31),), ((15, 15),))
    same = Problem(DEPTHWISE_SUM, DEVICE, torch.float32, (63, 250, 64, 64), ((31, 31),), ((15, 15),))
    assert tuning.by_weight({small: 1, same: 1, large: 1}, chip) == [large, small]
    assert tuning.by_weight({small: 1_000_000_000, large: 1}, chip) == [small, large]


@pytest.mark.parametrize(
    "config", [Planes(4, 1, 2, 32), Channels(4, 1, 2, 4, 32), ToeplitzGrad(4, 3, 2, 16, 16, 32)], ids=str
)
def test_entries_survive_a_file(config: Config, tmp_path: Path) -> None:
    tables.merge(tmp_path / "t.json", "A", {"k": {"config": config.entry()}})
    assert tables.config_of(tables.read(tmp_path / "t.json")["A"]["k"]) == config
