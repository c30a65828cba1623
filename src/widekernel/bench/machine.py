"""The machine under test: its description, and the two speeds that limit every convolution on its CPU."""

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
from torch import Tensor

from widekernel import __version__
from widekernel.bench.memory import freed_memory
from widekernel.data.config import processors
from widekernel.errors import ArgumentError
from widekernel.ops.cpu import library
from widekernel.ops.cpu.pointwise import PRECISIONS, reason_against

_PEAK_SECONDS = 0.3
_MATRIX, _COPIED = 2048, 2**26  # rows of a square matrix; numbers of a tensor that is larger than usual caches


@dataclass(frozen=True)
class Machine:
    """The facts about a CPU that accompany a table of times.

    Attributes:
        cpu: model of the processor.
        cores: number of cores that this process may use.
        threads: number of threads that it uses.
        capability: vector instructions that PyTorch uses.
        native: vector instructions that the native library uses, or `none`.
        versions: versions of Python and of every package that is timed.
        peak: fused multiply-adds of all threads together, in GFLOP/s.
        peak_source: how the peak was measured.
        bandwidth: bytes read and written by copies of tensors that are larger than usual caches, in GB/s.
        waiting: how threads wait for work, according to the environment.
        freed: what the allocator does with freed memory.
        bfloat16_peak: multiply-adds of bfloat16 of all threads together, in GFLOP/s; None if there are no such products.
        int8_peak: the same of int8.
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
    freed: str
    bfloat16_peak: float | None = None
    int8_peak: float | None = None

    def lines(self) -> list[str]:
        """Describe the machine, one line per fact."""
        peaks = {"bfloat16": self.bfloat16_peak, "int8": self.int8_peak}
        lower = "".join(f"; in {name}: {peak:.0f}" for name, peak in peaks.items() if peak is not None)
        return [
            f"CPU: {self.cpu}, {self.cores} cores, {self.threads} threads used, PyTorch uses {self.capability}",
            f"native library: {self.native}",
            f"FMA peak: {self.peak:.0f} GFLOP/s ({self.peak_source}){lower}; "
            f"copying large tensors: {self.bandwidth:.1f} GB/s",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"OMP_WAIT_POLICY: {self.waiting}; freed memory: {self.freed}",
        ]


def measure_machine() -> Machine:
    """Describe this machine and measure its limits with the current number of threads. Takes about a second."""
    threads = torch.get_num_threads()
    peak, source = fma_peak(threads)
    return Machine(
        cpu=cpu_model(),
        cores=processors(),
        threads=threads,
        capability=torch.backends.cpu.get_cpu_capability(),
        native=_native(),
        versions=_versions(),
        peak=peak,
        peak_source=source,
        bandwidth=copy_bandwidth(_COPIED, _PEAK_SECONDS),
        waiting=os.environ.get("OMP_WAIT_POLICY", "not set"),
        freed=freed_memory(),
        bfloat16_peak=_product_peak("bfloat16", threads),
        int8_peak=_product_peak("int8", threads),
    )


def fma_peak(threads: int) -> tuple[float, str]:
    """Measure fused multiply-adds; return the GFLOP/s and how they were measured.

    Without the native library, the speed of a matrix product is used instead. It is below the peak, and far below it in some
    builds of PyTorch.
    """
    loaded = library.load()
    if loaded.reason is None:
        return _native_peak(library.FLOAT32, threads), "measured in registers by the native library"
    a, b = torch.randn(_MATRIX, _MATRIX), torch.randn(_MATRIX, _MATRIX)
    out = torch.empty_like(a)
    seconds = _shortest(lambda: torch.mm(a, b, out=out), _PEAK_SECONDS)
    return 2 * _MATRIX**3 / seconds / 1e9, f"estimated by a matrix product of {_MATRIX} rows"


def _product_peak(precision: str, threads: int) -> float | None:
    """Measure the products of a precision, in GFLOP/s; None if there are none."""
    return None if reason_against(precision) else _native_peak(PRECISIONS[precision], threads)


def _native_peak(kind: int, threads: int) -> float:
    # The best of several measurements, because other work on the machine can only slow one down.
    measure = library.load().calls.wk_product_peak
    return float(max(measure(kind, threads, _PEAK_SECONDS / 5) for _ in range(5)) / 1e9)


def copy_bandwidth(numbers: int, seconds: float) -> float:
    """Measure the GB/s that are read and written by copies between tensors of `numbers` float32 numbers."""
    return copy_speed(torch.ones(numbers), lambda call: _shortest(call, seconds))


def copy_speed(source: Tensor, shortest: Callable[[Callable[[], object]], float]) -> float:
    """Return the GB/s that copies of `source` read and write; `shortest` measures the time of a call in seconds."""
    target = torch.empty_like(source)
    return 2 * source.nbytes / shortest(lambda: target.copy_(source)) / 1e9


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Compute with `threads` threads inside the block; None leaves the number unchanged.

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
    """Return the model of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def installed_version(package: str, otherwise: str = "unknown") -> str:
    """Return the version of an installed package, or `otherwise` if it is not installed."""
    if package == "widekernel":
        return __version__  # that of the running code: metadata of an editable installation may be old
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return otherwise


def _native() -> str:
    loaded = library.load()
    if loaded.reason is not None:
        # Without the reason, which contains paths: tables are published.
        return "none"
    return f"{loaded.isa}, {'threads of PyTorch' if loaded.threads_available else 'one thread only'}"


def _versions() -> dict[str, str]:
    packages = {"widekernel": "widekernel", "PyTorch": "torch", "timm": "timm"}
    return {
        "Python": platform.python_version(),
        **{name: installed_version(package) for name, package in packages.items()},
        **{engine: installed_version(engine, "not installed") for engine in ("onnxruntime", "openvino", "zentorch")},
    }


def _shortest(call: Callable[[], object], seconds: float) -> float:
    """Repeat a call for `seconds` seconds, after one warm-up call, and return its shortest time."""
    call()
    shortest, deadline = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        shortest = min(shortest, end - start)
        if end > deadline:
            return shortest
