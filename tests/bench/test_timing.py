"""Order and number of calls, with a clock that only the calls advance."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial

import pytest

from widekernel.bench.timing import (
    BURST,
    FEWEST,
    MOST,
    SETTLING,
    WAKING,
    Timing,
    WallClock,
    balanced_orders,
    first_calls,
    interleave,
    planned_calls,
)


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


@pytest.mark.parametrize("count", range(1, 9))
def test_orders_are_balanced(count: int) -> None:
    names = [str(number) for number in range(count)]
    orders = balanced_orders(names)
    squares = len(orders) // count
    places = Counter((place, name) for order in orders for place, name in enumerate(order))
    followers = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert places == {(place, name): squares for place in range(count) for name in names}
    assert followers == dict.fromkeys(itertools.permutations(names, 2), squares)
    assert balanced_orders([]) == []


class Machinery:
    """Calls on a machine with a cache for the data of one call, and with freed memory that the next call gets back.

    A call takes `seconds`, and `missed` more if the call before it was another one.
    """

    def __init__(self, missed: float, **seconds: float) -> None:
        self.now, self.last, self.made = 0.0, "", []
        self.stopwatch = WallClock(lambda: self.now)
        self.calls = {name: partial(self.run, name, s, missed) for name, s in seconds.items()}

    def run(self, name: str, seconds: float, missed: float) -> None:
        self.now += seconds + (missed if name != self.last else 0.0)
        self.made.append(name)
        self.last = name


def test_pauses_let_the_threads_of_other_programs_go_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(a=0.25, b=0.5)
    monkeypatch.setattr("widekernel.bench.timing.time.sleep", lambda seconds: scene.made.append(f"{seconds} s"))
    first = {"a": 0.25, "b": 0.5}
    timings = interleave(scene.calls, first, 1.0, rounds=2, stopwatch=scene.stopwatch, pause=SETTLING)
    assert scene.made == ["0.02 s", "a", "0.02 s", "b", "0.02 s", "b", "0.02 s", "a"]
    assert timings == {"a": Timing((0.25,) * 2), "b": Timing((0.5,) * 2)}


def test_untimed_calls_wake_the_processor_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machinery(0.0, quick=2**-10, long=2**-7)
    monkeypatch.setattr("widekernel.bench.timing.time.sleep", lambda seconds: machine.made.append("pause"))
    first = {"quick": 2**-10, "long": 2**-7}
    timings = interleave(machine.calls, first, 1.0, rounds=4, stopwatch=machine.stopwatch, pause=SETTLING)
    after = [len(list(calls)) for name, calls in itertools.groupby(machine.made) if name == "quick"]
    assert timings["quick"].calls == timings["long"].calls == 4
    assert len(after) == 4 and min(after) > WAKING * 2**10
    assert machine.made.count("long") == 4 * 2


def test_the_call_before_a_short_one_does_not_change_its_time() -> None:
    machine = Machinery(0.004, ours=0.002, theirs=0.002, slow=0.012)
    _, first = first_calls(machine.calls, machine.stopwatch)
    timings = interleave(machine.calls, first, 0.2, stopwatch=machine.stopwatch)
    for name, seconds in (("ours", 0.002), ("theirs", 0.002), ("slow", 0.012)):
        assert list(timings[name].seconds) == pytest.approx([seconds] * timings[name].calls)


def test_bursts_are_short_and_begin_with_an_untimed_call() -> None:
    machine = Machinery(0.0, a=2**-8, b=2**-9)
    timings = interleave(machine.calls, {"a": 2**-8, "b": 2**-9}, 1.0, rounds=30, stopwatch=machine.stopwatch)
    assert {timing.calls for timing in timings.values()} == {30}
    bursts = [len(list(group)) for _, group in itertools.groupby(machine.made)]
    # Adjacent bursts of one call, at the end of a round and the beginning of the next one, count as one here.
    assert max(bursts) <= 2 * (1 + BURST) and machine.made.count("a") == 30 + math.ceil(30 / 3)


def test_a_stopwatch_that_resets_caches_needs_no_bursts() -> None:
    machine = Machinery(0.0, a=2**-8, b=2**-9)
    machine.stopwatch.resets = True
    interleave(machine.calls, {"a": 2**-8, "b": 2**-9}, 1.0, rounds=3, stopwatch=machine.stopwatch)
    assert machine.made == ["a", "b", "b", "a", "a", "b"]


def test_calls_too_long_for_bursts_follow_each_other_equally_often() -> None:
    names = "abcd"
    machine = Machinery(0.5, **dict.fromkeys(names, 0.25))
    timings = interleave(machine.calls, dict.fromkeys(names, 0.25), 1.0, rounds=8, stopwatch=machine.stopwatch)
    rounds = [machine.made[start : start + 4] for start in range(0, 32, 4)]
    followers = Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert followers == dict.fromkeys(itertools.permutations(names, 2), 2)
    assert len({timing.median for timing in timings.values()}) == 1


def test_fewer_calls_are_spread_over_all_rounds() -> None:
    scene = Scene(fast=0.125, slow=1.5)
    timings = interleave(scene.calls, {"fast": 0.125, "slow": 1.5}, 1.25, stopwatch=scene.stopwatch)
    assert timings["fast"].calls == 10 and timings["slow"].calls == 1
    scene = Scene(fastest=1.25, near=2.5, slow=2.625)
    timings = interleave(scene.calls, {"fastest": 1.25, "near": 2.5, "slow": 2.625}, 1.25, stopwatch=scene.stopwatch)
    assert {name: timing.calls for name, timing in timings.items()} == {"fastest": 3, "near": 3, "slow": 1}
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
