"""The order and the number of calls, by a clock that only the rivals move."""

from __future__ import annotations

import itertools

import pytest

from widekernel.bench.timing import FEWEST, MOST, Timing, WallClock, first_calls, interleave, planned_calls


class Stage:
    """Rivals that take the seconds they are said to take, and a record of their calls."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.calls = 0.0, []
        self.stopwatch = WallClock(lambda: self.now)
        self.rivals = {name: lambda name=name, s=s: self.run(name, s) for name, s in seconds.items()}

    def run(self, name: str, seconds: float) -> str:
        self.now += seconds
        self.calls.append(name)
        return f"of {name}"


def test_rivals_take_turns_in_alternating_order() -> None:
    stage = Stage(a=0.25, b=0.5)
    outputs, first = first_calls(stage.rivals, stage.stopwatch)
    assert outputs == {"a": "of a", "b": "of b"} and first == {"a": 0.25, "b": 0.5}
    stage.calls.clear()
    timings = interleave(stage.rivals, first, 1.0, rounds=4, stopwatch=stage.stopwatch)
    assert stage.calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert timings == {"a": Timing((0.25,) * 4), "b": Timing((0.5,) * 4)}


def test_rivals_with_fewer_calls_are_spread_over_all_rounds() -> None:
    stage = Stage(fast=0.125, slow=1.5)
    timings = interleave(stage.rivals, {"fast": 0.125, "slow": 1.5}, 1.25, stopwatch=stage.stopwatch)
    assert timings["fast"].calls == 10 and timings["slow"].calls == 1
    stage = Stage(fast=0.125, slower=0.25)
    interleave(stage.rivals, {"fast": 0.125, "slower": 0.25}, 2.0, stopwatch=stage.stopwatch)
    places = [place for place, name in enumerate(stage.calls) if name == "slower"]
    assert len(places) == 8 and max(b - a for a, b in itertools.pairwise(places)) <= 4


def test_a_very_slow_rival_is_called_once_in_all() -> None:
    stage = Stage(fast=0.5, slow=11.0)
    _, first = first_calls(stage.rivals, stage.stopwatch)
    timings = interleave(stage.rivals, first, 1.0, stopwatch=stage.stopwatch)
    assert stage.calls.count("slow") == 1 and timings["slow"] == Timing((11.0,))


def test_a_slow_first_call_of_a_quick_rival_is_not_believed() -> None:
    stage = Stage(a=0.001)
    timings = interleave(stage.rivals, {"a": 0.09}, 0.1, stopwatch=stage.stopwatch)
    assert timings["a"].calls == 100


@pytest.mark.parametrize(
    ("estimate", "rounds", "calls"),
    [(0.1, None, 10), (0.5, None, FEWEST), (0.0, None, MOST), (0.1, 2, 2), (1.5, None, 1), (1.5, 7, 1), (20.0, 7, 0)],
)
def test_number_of_calls(estimate: float, rounds: int | None, calls: int) -> None:
    assert planned_calls(estimate, 1.0, rounds) == calls


def test_patience_can_be_chosen() -> None:
    assert planned_calls(5.0, 1.0, None, (10.0, 60.0)) == FEWEST
    assert planned_calls(20.0, 1.0, None, (10.0, 60.0)) == 1


def test_median_and_spread() -> None:
    assert Timing((3.0, 1.0, 2.0, 4.0, 5.0)).median == 3.0
    assert Timing((3.0, 1.0, 2.0, 4.0, 5.0)).spread == pytest.approx(1 / 3)
    assert Timing((3.0,)).spread == 0.0
