"""Order and number of calls, with a clock that only the calls advance."""

from __future__ import annotations

import itertools

import pytest

from widekernel.bench.timing import FEWEST, MOST, Timing, WallClock, first_calls, interleave, planned_calls


class Scene:
    """Calls that take a given number of seconds, and a record of them."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.made = 0.0, []
        self.stopwatch = WallClock(lambda: self.now)
        self.calls = {name: lambda name=name, s=s: self.run(name, s) for name, s in seconds.items()}

    def run(self, name: str, seconds: float) -> str:
        self.now += seconds
        self.made.append(name)
        return f"of {name}"


def test_calls_take_turns_in_alternating_order() -> None:
    scene = Scene(a=0.25, b=0.5)
    outputs, first = first_calls(scene.calls, scene.stopwatch)
    assert outputs == {"a": "of a", "b": "of b"} and first == {"a": 0.25, "b": 0.5}
    scene.made.clear()
    timings = interleave(scene.calls, first, 1.0, rounds=4, stopwatch=scene.stopwatch)
    assert scene.made == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert timings == {"a": Timing((0.25,) * 4), "b": Timing((0.5,) * 4)}


def test_fewer_calls_are_spread_over_all_rounds() -> None:
    scene = Scene(fast=0.125, slow=1.5)
    timings = interleave(scene.calls, {"fast": 0.125, "slow": 1.5}, 1.25, stopwatch=scene.stopwatch)
    assert timings["fast"].calls == 10 and timings["slow"].calls == 1
    scene = Scene(fast=0.125, slower=0.25)
    interleave(scene.calls, {"fast": 0.125, "slower": 0.25}, 2.0, stopwatch=scene.stopwatch)
    places = [place for place, name in enumerate(scene.made) if name == "slower"]
    assert len(places) == 8 and max(b - a for a, b in itertools.pairwise(places)) <= 4


def test_a_very_slow_call_is_made_once_in_all() -> None:
    scene = Scene(fast=0.5, slow=11.0)
    _, first = first_calls(scene.calls, scene.stopwatch)
    timings = interleave(scene.calls, first, 1.0, stopwatch=scene.stopwatch)
    assert scene.made.count("slow") == 1 and timings["slow"] == Timing((11.0,))


def test_a_slow_first_call_does_not_determine_the_number_of_calls() -> None:
    scene = Scene(a=0.001)
    timings = interleave(scene.calls, {"a": 0.09}, 0.1, stopwatch=scene.stopwatch)
    assert timings["a"].calls == 100


@pytest.mark.parametrize(
    ("estimate", "rounds", "calls"),
    [(0.1, None, 10), (0.5, None, FEWEST), (0.0, None, MOST), (0.1, 2, 2), (1.5, None, 1), (1.5, 7, 1), (20.0, 7, 0)],
)
def test_number_of_calls(estimate: float, rounds: int | None, calls: int) -> None:
    assert planned_calls(estimate, 1.0, rounds) == calls


def test_patience_can_be_set() -> None:
    assert planned_calls(5.0, 1.0, None, (10.0, 60.0)) == FEWEST
    assert planned_calls(20.0, 1.0, None, (10.0, 60.0)) == 1


def test_median_and_spread() -> None:
    assert Timing((3.0, 1.0, 2.0, 4.0, 5.0)).median == 3.0
    assert Timing((3.0, 1.0, 2.0, 4.0, 5.0)).spread == pytest.approx(1 / 3)
    assert Timing((3.0,)).spread == 0.0
