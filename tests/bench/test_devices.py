"""Devices, their stopwatch and limits, and time budgets, without any device."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from widekernel.bench import BenchmarkError, depthwise_share, devices, gpu
from widekernel.bench.devices import EventStopwatch, accelerator
from widekernel.bench.errors import DeviceLostError
from widekernel.bench.gpu import device_copy_speed, product_speed
from widekernel.bench.precision import BFLOAT16, FLOAT32, PRECISIONS, TF32
from widekernel.bench.time_budget import TimeBudget
from widekernel.bench.timing import FEWEST, Timing, WallClock, first_calls, interleave
from widekernel.errors import ArgumentError


class Queue:
    """A device on which only flushes and calls take time, and a record of what it was asked to do."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []
        self.stopwatch = EventStopwatch(self.flush, lambda: Mark(self), self.synchronize, lambda: self.log.append("release"))
        self.broken = False

    def flush(self) -> None:
        self.log.append("flush")
        self.now += 7.0

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    def call(self, name: str = "call", seconds: float = 0.002) -> str:
        self.log.append(name)
        self.now += seconds
        return f"of {name}"


class Mark:
    def __init__(self, queue: Queue) -> None:
        self.queue, self.at = queue, None

    def record(self) -> None:
        self.queue.log.append("mark")
        self.at = self.queue.now

    def synchronize(self) -> None:
        self.queue.log.append("wait")

    def elapsed_time(self, end: Mark) -> float:
        return 1e3 * (end.at - self.at)


def test_caches_are_flushed_before_each_call_and_not_timed() -> None:
    queue = Queue()
    result, seconds = queue.stopwatch.time(queue.call)
    assert result == "of call" and seconds == pytest.approx(0.002)
    assert queue.log == ["flush", "mark", "call", "mark", "wait"]
    queue.log.clear()
    calls = {name: lambda name=name: queue.call(name) for name in "ab"}
    timings = interleave(calls, {"a": 0.002, "b": 0.002}, 1.0, rounds=3, stopwatch=queue.stopwatch)
    assert timings["a"].seconds == pytest.approx((0.002,) * 3) and queue.log.count("flush") == 6
    places = [place for place, what in enumerate(queue.log) if what in "ab"]
    assert [queue.log[place] for place in places] == list("abbaab")
    assert all(queue.log[place - 2 : place] == ["flush", "mark"] for place in places)


def test_the_first_call_on_a_device_is_not_timed() -> None:
    queue = Queue()
    slow = iter([60.0, 0.003])
    outputs, seconds = first_calls({"a": lambda: queue.call("a", next(slow))}, queue.stopwatch)
    assert outputs == {"a": "of a"} and seconds == {"a": pytest.approx(0.003)}
    assert queue.log == ["a", "flush", "mark", "a", "mark", "wait"]


def test_a_failing_call_is_left_out() -> None:
    queue, failures = Queue(), {}

    def fail() -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB\nand so on")

    outputs, seconds = first_calls({"a": fail, "b": queue.call}, queue.stopwatch, failures)
    assert list(outputs) == list(seconds) == ["b"]
    assert failures == {"a": "RuntimeError: CUDA out of memory. Tried to allocate 9 GiB"} and "release" in queue.log
    with pytest.raises(RuntimeError, match="out of memory"):
        first_calls({"a": fail}, queue.stopwatch)
    queue.broken = True
    with pytest.raises(DeviceLostError, match=r"accepts no more calls.*illegal memory access was encountered\)"):
        first_calls({"a": fail}, queue.stopwatch, failures)


def test_a_timing_without_calls() -> None:
    assert Timing(()).calls == 0 and Timing(()).spread == 0 and Timing(()).median != Timing(()).median


def test_slow_calls_on_a_device() -> None:
    from widekernel.bench.platforms import DEVICE_PATIENCE
    from widekernel.bench.timing import planned_calls

    assert [planned_calls(seconds, 0.1, None, DEVICE_PATIENCE) for seconds in (0.3, 0.15, 0.09)] == [0, 1, FEWEST]


def test_the_device_is_kept_busy_until_the_host_is_ahead() -> None:
    queue = Queue()

    def work() -> None:
        queue.now += 6e-5

    assert devices._repetitions(2.5e-4, work, lambda: Mark(queue)) == 5


@pytest.mark.parametrize("text", ["mps", "cuda:x", "gpu", "cuda:-1", ""])
def test_unknown_devices_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match=f"device is '{text}', but benchmarks run on cpu, cuda or cuda:N only"):
        accelerator(text)


def test_missing_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator("cpu") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ArgumentError, match=r"device is 'cuda', but PyTorch .* finds no CUDA device: run where .* --device cpu"
    ):
        accelerator("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ArgumentError, match=r"device is 'cuda:2', but there are 2 .* from cuda:0 to cuda:1"):
        accelerator("cuda:2")
    monkeypatch.setattr(devices, "cuda_stopwatch", lambda device: WallClock())
    assert accelerator("cuda").device == torch.device("cuda:0")
    assert accelerator("cuda:1").device == torch.device("cuda:1")


def test_limits_of_a_device(device_gpu) -> None:
    assert device_gpu.peak(BFLOAT16) == 800e3 and device_gpu.peak(TF32) == 390e3
    assert device_gpu.peak(FLOAT32) == 130e3, "a third of tf32, because strict products are slower"
    lines = device_gpu.lines()
    assert "GPU: Some GPU, compute capability 9.0, 132 multiprocessors, 140 GiB, 50 MiB of L2 cache" in lines
    assert "copying 4.00 TB/s; matrix products in TFLOP/s: bfloat16 800, tf32 390, float16 780, float32 50" in lines[1]
    assert "driver 1, PyTorch 2" in lines


def test_speeds_are_the_best_of_several() -> None:
    ticks = iter(range(1000))
    watch = WallClock(lambda: float(next(ticks)))
    assert device_copy_speed(torch.device("cpu"), watch, 1000) == pytest.approx(2 * 2000 / 1e9)
    assert product_speed(torch.device("cpu"), watch, BFLOAT16, 8) == pytest.approx(2 * 512 / 1e9)


def test_version_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(tool))
    assert gpu._driver() == "580.1"
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert gpu._driver() == "unknown"
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu._driver() == "unknown" and gpu._versions()["PyTorch"] == torch.__version__


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make PyTorch describe the CPU as a CUDA device, with events that read the clock of the host."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object = None) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    about = {"name": "Some GPU", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 2**37}
    pretenses = {
        "get_device_properties": lambda device: SimpleNamespace(**about, L2_cache_size=2**10),
        "device": lambda device: nullcontext(),
        "Event": Event,
        "synchronize": lambda device: None,
        "current_stream": lambda device: None,
        "mem_get_info": lambda device: (2**20, 2**37),
    }
    for name, pretense in pretenses.items():
        monkeypatch.setattr(torch.cuda, name, pretense)
    monkeypatch.setattr(devices, "_MIN_FLUSHED", 2**12)
    monkeypatch.setattr(gpu, "_MATRIX", 16)


def test_stopwatch_and_limits_of_a_pretended_device(pretended: None) -> None:
    where = devices.Accelerator(torch.device("cpu"), devices.cuda_stopwatch(torch.device("cpu")))
    with where.current():
        result, seconds = where.stopwatch.time(lambda: "result")
        where.stopwatch.recover()
        found = gpu.measure_gpu(where)
    assert result == "result" and 0 < seconds < 1
    assert found.name == "Some GPU" and found.memory == 128 and found.capability == "9.0" and found.bandwidth > 0
    assert set(found.products) == set(PRECISIONS) and min(found.products.values()) > 0 and len(found.lines()) == 4


def test_marks_by_events(pretended: None) -> None:
    marks = depthwise_share._DeviceMarks(torch.device("cuda"))
    start, end = marks.now(), marks.now()
    assert 0 < marks.seconds([(start, end)]) < 1 and marks.seconds([]) == 0


def test_time_budget() -> None:
    now = 100.0
    budget = TimeBudget(2, lambda: now)
    assert budget.has_time() and not budget.lines()
    budget.finish()
    now = 221.0
    assert not budget.has_time()
    budget.leave_out("tf32", "slak-1", "forward")
    budget.leave_out("tf32", "slak-1", "weight gradient")
    budget.leave_out("tf32", "slak-2", "forward")
    budget.leave_out("float32", "slak-1", "forward")
    why = "because the 2 minutes were over; --minutes gives more"
    assert budget.lines() == [
        f"Left out in tf32: slak-1 (forward, weight gradient), slak-2 (forward), {why}.",
        f"Left out in float32: slak-1 (forward), {why}.",
    ]
    budget.wrong.append("forward of it")
    assert budget.lines()[-1] == "No times: forward of it"
    with pytest.raises(BenchmarkError, match=r"no times for 1 of the benchmarks.*the first: forward of it"):
        budget.finish()


def test_a_lost_device_ends_the_budget() -> None:
    budget = TimeBudget(2, lambda: 0.0)
    budget.lose_device("the device takes no more calls")
    assert not budget.has_time() and budget.lines() == ["At the end the device takes no more calls."]
    budget.leave_out("tf32", "slak-1", "forward")
    assert budget.lines() == ["Left out in tf32: slak-1 (forward), because the device takes no more calls."]
