"""Platforms of benchmarks: all differences between measuring on a CPU and on a CUDA device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from widekernel.bench.cases import Case
from widekernel.bench.devices import Accelerator
from widekernel.bench.gpu import Gpu
from widekernel.bench.machine import Machine, copy_bandwidth
from widekernel.bench.precision import BFLOAT16, FLOAT32, INT8, Precision
from widekernel.bench.timing import PATIENCE, Stopwatch, WallClock
from widekernel.errors import ArgumentError

DEVICE_PATIENCE = 0.1, 0.2
"""Seconds beyond which an operator call on a device is slow, and very slow: some gradients of PyTorch take very long."""
_SMALLEST_COPY, _COPY_SECONDS = 2**16, 0.03  # numbers; below, the time is mostly that of calling an operator


class Limits(NamedTuple):
    """The speeds that no call can exceed (GFLOP/s and GB/s), and the bytes that it has to read and write."""

    peak: float
    copying: float
    bytes_moved: int

    def seconds(self, macs: int) -> tuple[float, float]:
        """Return the time of `macs` multiply-accumulates, and the time of moving the data, in seconds."""
        return 2 * macs / (self.peak * 1e9), self.bytes_moved / (self.copying * 1e9)


@dataclass(frozen=True)
class Platform:
    """A device to measure on; made by `cpu_platform` or `cuda_platform`.

    Attributes:
        device: the device that computes.
        stopwatch: times the calls.
        title: short description for plots.
        facts: lines that describe the machine.
        peak: returns the highest speed of computations in a precision, in GFLOP/s.
        peak_name: what computes at that speed, for plots.
        copying: returns the speed of copies that limits a case, in GB/s.
        operator_patience: seconds beyond which a call of an operator is slow, and very slow.
        network_patience: the same for a call of a network.
        is_device: whether it is an accelerator. Time on accelerators is scarce and calls fail for more reasons, so an
            implementation that fails or computes wrong results only loses its own times and gets a remark. Our operator is
            compared with float64 on the timed calls themselves, networks are compared on few images, and compiled variants
            come last. On a CPU, the first error ends the run, and inference engines are timed as well.
    """

    device: torch.device
    stopwatch: Stopwatch
    title: str
    facts: Sequence[str]
    peak: Callable[[Precision], float]
    peak_name: str
    copying: Callable[[Case], float]
    operator_patience: tuple[float, float]
    network_patience: tuple[float, float]
    is_device: bool

    def operator_peak(self, precision: Precision) -> float:
        """Return the peak of depthwise operators, which CPUs compute in float32 whatever the precision of tensors is."""
        return self.peak(precision if self.is_device else FLOAT32)

    def limits(self, case: Case, precision: Precision) -> Limits:
        """Return the limits of a case in a precision."""
        return Limits(self.operator_peak(precision), self.copying(case), case.bytes_moved_in(precision.bytes))


def cpu_platform(machine: Machine) -> Platform:
    """Return the CPU of this machine."""

    def peak(precision: Precision) -> float:
        if precision not in (BFLOAT16, INT8):
            return machine.peak
        found = machine.bfloat16_peak if precision is BFLOAT16 else machine.int8_peak
        if found is None:
            raise ArgumentError(f"precision is {precision.name!r}, but this machine has no such products: time float32")
        return found

    return Platform(
        device=torch.device("cpu"),
        stopwatch=WallClock(),
        title=f"{machine.cpu}, {machine.threads} threads",
        facts=machine.lines(),
        peak=peak,
        peak_name="FMA",
        # Copies of tensors with the size of the case: small ones stay in caches.
        copying=lambda case: copy_bandwidth(max(math.prod(case.shape), _SMALLEST_COPY), _COPY_SECONDS),
        operator_patience=PATIENCE,
        network_patience=(10.0, 60.0),
        is_device=False,
    )


def cuda_platform(accelerator: Accelerator, gpu: Gpu) -> Platform:
    """Return a CUDA device, with its stopwatch and its limits."""
    return Platform(
        device=accelerator.device,
        stopwatch=accelerator.stopwatch,
        title=gpu.name,
        facts=gpu.lines(),
        peak=gpu.peak,
        peak_name="matrix products",
        copying=lambda case: gpu.bandwidth,
        operator_patience=DEVICE_PATIENCE,
        network_patience=(2.0, 10.0),
        is_device=True,
    )
