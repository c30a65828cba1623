"""The machine that is measured on: what it is, and the two speeds that limit any convolution on it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from widekernel.errors import ArgumentError
from widekernel.ops.cpu import library

_PEAK_SECONDS = 0.3
_MATRIX, _COPIED = 2048, 2**26  # rows of a square matrix; numbers of a tensor that no usual cache holds


@dataclass(frozen=True)
class Machine:
    """What a table of times must say about where they were measured.

    Attributes:
        cpu: model of the processor.
        cores: that this process may use.
        threads: that it does use.
        capability: vector instructions that PyTorch uses.
        native: those that the native library uses, or `none`.
        versions: of Python and of every package that takes part.
        peak: fused multiply-adds of all threads, in GFLOP/s.
        peak_source: how that was measured.
        bandwidth: bytes read and written by copies of tensors that no usual cache holds, in GB/s.
        waiting: how threads wait for work, as far as the environment says.
    """

    cpu: str
    cores: int
    threads: int
    capability: str
    native: str
    versions: dict[str, str]
    peak: float
    peak_source: str
    bandwidth: float
    waiting: str

    def lines(self) -> list[str]:
        """Describe it, a line a fact."""
        return [
            f"CPU: {self.cpu}, {self.cores} cores, {self.threads} threads used, PyTorch uses {self.capability}",
            f"native library: {self.native}",
            f"FMA peak: {self.peak:.0f} GFLOP/s ({self.peak_source}); copying large tensors: {self.bandwidth:.1f} GB/s",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"OMP_WAIT_POLICY: {self.waiting}",
        ]


def measure_machine() -> Machine:
    """Describe this machine and measure its limits with the current number of threads; takes about a second."""
    threads = torch.get_num_threads()
    peak, source = fma_peak(threads)
    return Machine(
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        capability=torch.backends.cpu.get_cpu_capability(),
        native=_native(),
        versions=_versions(),
        peak=peak,
        peak_source=source,
        bandwidth=copy_bandwidth(_COPIED, _PEAK_SECONDS),
        waiting=os.environ.get("OMP_WAIT_POLICY", "not set"),
    )


def fma_peak(threads: int) -> tuple[float, str]:
    """Measure fused multiply-adds in GFLOP/s, and say how: by the native library or, without it, by a matrix product.

    A matrix product stays below the peak, in some builds of PyTorch far below it.
    """
    loaded = library.load()
    if loaded.reason is None:
        # The best of several, because whatever else the machine does only slows it down.
        tries = [loaded.calls.wk_fma_peak(threads, _PEAK_SECONDS / 5) for _ in range(5)]
        return max(tries) / 1e9, "measured in registers by the native library"
    a, b = torch.randn(_MATRIX, _MATRIX), torch.randn(_MATRIX, _MATRIX)
    out = torch.empty_like(a)
    seconds = _best(lambda: torch.mm(a, b, out=out), _PEAK_SECONDS)
    return 2 * _MATRIX**3 / seconds / 1e9, f"estimated by a matrix product of {_MATRIX} rows"


def copy_bandwidth(numbers: int, seconds: float) -> float:
    """Measure the bytes that `Tensor.copy_` reads and writes between tensors of that size, in GB/s."""
    source, target = torch.ones(numbers), torch.empty(numbers)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), seconds) / 1e9


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Compute with that many threads inside the block; None leaves their number as it is.

    Raises:
        ArgumentError: if the number is not positive.
    """
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads}, but must be at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_model() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """Give the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _native() -> str:
    loaded = library.load()
    if loaded.reason is not None:
        # Not the reason, which names folders: tables are published.
        return "none"
    return f"{loaded.isa}, {'threads of PyTorch' if loaded.threads_available else 'one thread only'}"


def _versions() -> dict[str, str]:
    packages = {"widekernel": "widekernel", "PyTorch": "torch", "timm": "timm"}
    versions = {"Python": platform.python_version()}
    versions |= {name: installed(package) or "unknown" for name, package in packages.items()}
    for rival in ("onnxruntime", "openvino"):
        versions[rival] = installed(rival) or "not installed"
    return versions


def _best(call: Callable[[], object], seconds: float) -> float:
    """Give the shortest time of calls made for so many seconds, after one that does not count."""
    call()
    shortest, until = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        shortest = min(shortest, end - start)
        if end > until:
            return shortest
