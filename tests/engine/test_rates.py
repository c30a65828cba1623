"""Data time and step time, on a CPU and on a pretended device that computes while the host goes on."""

from contextlib import suppress

import pytest
import torch

from widekernel.engine.rates import TIMING_KEYS, Rates


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_time(self, seconds):
        self.now += seconds


class Device:
    """Queue of a device: work starts when the host has given it and the device has done what came before."""

    def __init__(self, clock):
        self.clock, self.free_at, self.waits = clock, clock.now, 0

    def compute(self, seconds):
        self.free_at = max(self.free_at, self.clock.now) + seconds

    def event(self):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self):
        self.at = max(self.device.free_at, self.device.clock.now)

    def query(self):
        return self.device.clock.now >= self.at

    def synchronize(self):
        self.device.waits += 1
        self.device.clock.now = max(self.device.clock.now, self.at)

    def elapsed_time(self, other):
        assert other.query(), "not reached yet"
        return (other.at - self.at) * 1e3


def test_data_time_and_step_time_without_evaluations():
    clock = Clock()
    rates = Rates(torch.device("cpu"), clock)
    assert rates.figures() == {}
    for _ in range(2):
        for _ in range(2):  # two batches make one step
            with rates.loading():
                clock.pass_time(1)
            clock.pass_time(2)
        rates.stepped(64)
        with suppress(KeyError), rates.excluded():
            clock.pass_time(500)
            raise KeyError
    assert rates.figures() == {"data_seconds": 2, "step_seconds": 4, "images_per_second": 128 / 12}
    assert rates.figures() == {}
    clock.pass_time(3)  # belongs to the next step
    rates.stepped(5)
    assert rates.figures() == {"data_seconds": 0, "step_seconds": 3, "images_per_second": 5 / 3}
    with rates.loading():
        clock.pass_time(7)
    rates.reset()
    clock.pass_time(1)
    rates.stepped(2)
    figures = rates.figures()
    assert figures == {"data_seconds": 0, "step_seconds": 1, "images_per_second": 2}
    assert figures.keys() == TIMING_KEYS


def test_a_row_that_is_written_during_an_evaluation():
    clock = Clock()
    rates = Rates(clock=clock)
    for _ in range(2):
        clock.pass_time(4)
        rates.stepped(8)
        with rates.excluded():
            clock.pass_time(100)
            assert rates.figures()["step_seconds"] == 4
            with rates.excluded():  # saving
                clock.pass_time(100)
            clock.pass_time(100)


@pytest.mark.parametrize(("loads", "idle"), [(0.8, 0), (1.5, 0.5)])
def test_data_time_on_a_device_is_that_for_which_it_has_nothing_to_do(loads, idle):
    """The host waits for the loader in every step, but a device that still computes lacks nothing."""
    clock = Clock()
    device = Device(clock)
    rates = Rates(clock=clock, new_event=device.event)
    for rows in range(2):
        for _ in range(10):
            with rates.loading():
                clock.pass_time(loads)
            device.compute(1)
            rates.stepped(8)
        assert device.waits == rows
        clock.now = max(clock.now, device.free_at)  # reading the loss
        figures = rates.figures()
        first = loads - idle  # in the first step of a row, the device waits for the whole time
        assert figures["data_seconds"] == pytest.approx(idle + first / 10)
        assert figures["step_seconds"] == pytest.approx(1)
        device.compute(3)
        with rates.excluded():
            assert clock.now == device.free_at
            clock.pass_time(500)
        rates.reset()


def test_marks_that_the_device_has_not_reached_count_later():
    clock = Clock()
    device = Device(clock)
    rates = Rates(clock=clock, new_event=device.event)
    for _ in range(2):
        with rates.loading():
            clock.pass_time(1)
        device.compute(10)
        rates.stepped(1)
    assert rates.figures()["data_seconds"] == 0.5  # of the second step's marks, the device has reached none
    clock.pass_time(100)
    rates.stepped(1)
    assert rates.figures()["data_seconds"] == 0
    assert rates._gaps == []


@pytest.mark.gpu
def test_data_time_on_a_gpu():
    import time

    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    for sleep in (0.0, 0.2):
        rates = Rates(device)
        for _ in range(5):
            with rates.loading():
                time.sleep(sleep)
            for _ in range(2):
                a @ a
            rates.stepped(1)
        torch.cuda.synchronize()
        figures = rates.figures()
        assert (figures["data_seconds"] > 0.01) == (sleep > 0)
