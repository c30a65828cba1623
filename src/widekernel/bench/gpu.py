"""The CUDA device that is measured on: its description, and the speeds that limit every convolution on it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from widekernel.bench.devices import Accelerator
from widekernel.bench.machine import copy_speed, cpu_model, installed_version
from widekernel.bench.precision import FLOAT32, PRECISIONS, TF32, Precision, in_force
from widekernel.bench.timing import Stopwatch
from widekernel.data.config import processors

_COPIED, _MATRIX = 2**29, 8192  # numbers of a bfloat16 tensor (1 GiB); rows of a square matrix
_CALLS = 10


@dataclass(frozen=True)
class Gpu:
    """The facts about a device that belong beside a table of times.

    Attributes:
        name: of the device.
        capability: compute capability, such as `9.0`.
        multiprocessors: number of streaming multiprocessors.
        memory: in GiB.
        cache: L2 cache in MiB.
        host: the processor and its cores.
        versions: of the driver and of every package that is timed.
        bandwidth: bytes read and written by copies of large tensors, in GB/s.
        products: GFLOP/s of the product of large matrices, by the name of the precision.
    """

    name: str
    capability: str
    multiprocessors: int
    memory: float
    cache: float
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    bandwidth: float = 0.0
    products: dict[str, float] = field(default_factory=dict)

    def peak(self, precision: Precision) -> float:
        """Return the highest speed of computations in a precision, in GFLOP/s.

        Strict float32 can use three TF32 products as well as the float32 units: the faster way counts.
        """
        peak = self.products[precision.name]
        return max(peak, self.products[TF32.name] / 3) if precision is FLOAT32 else peak

    def lines(self) -> list[str]:
        """Describe the device, one line per fact."""
        products = ", ".join(f"{name} {speed / 1e3:.3g}" for name, speed in self.products.items())
        return [
            f"GPU: {self.name}, compute capability {self.capability}, {self.multiprocessors} multiprocessors, "
            f"{self.memory:.0f} GiB, {self.cache:.0f} MiB of L2 cache",
            f"limits, measured: copying {self.bandwidth / 1e3:.2f} TB/s; matrix products in TFLOP/s: {products}",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"host: {self.host}",
        ]


def measure_gpu(accelerator: Accelerator) -> Gpu:
    """Describe a CUDA device and measure its limits. Takes some seconds and up to 2 GiB of device memory."""
    device, stopwatch = accelerator.device, accelerator.stopwatch
    properties = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    return Gpu(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory=properties.total_memory / 2**30,
        cache=getattr(properties, "L2_cache_size", 0) / 2**20,
        host=f"{cpu_model()}, {processors()} cores",
        versions=_versions(),
        bandwidth=device_copy_speed(device, stopwatch, min(_COPIED, free // 16)),
        products={name: product_speed(device, stopwatch, p, _MATRIX) for name, p in PRECISIONS.items()},
    )


def device_copy_speed(device: torch.device, stopwatch: Stopwatch, numbers: int) -> float:
    """Measure the GB/s that are read and written by copies between tensors of `numbers` bfloat16 numbers."""
    source = torch.ones(numbers, dtype=torch.bfloat16, device=device)
    return copy_speed(source, lambda call: _shortest(call, stopwatch))


def product_speed(device: torch.device, stopwatch: Stopwatch, precision: Precision, rows: int) -> float:
    """Measure the product of two square matrices in GFLOP/s. The numbers are random, because zeros need less power."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(rows, rows, device=device, generator=generator).to(precision.dtype) for _ in range(2))
    out = torch.empty_like(a)
    with in_force(precision):
        return 2 * rows**3 / _shortest(lambda: torch.mm(a, b, out=out), stopwatch) / 1e9


def _shortest(call: Callable[[], object], stopwatch: Stopwatch) -> float:
    """Return the shortest time of several calls, after two warm-up calls: a limit is the best that was seen."""
    for _ in range(2):
        call()
    return min(stopwatch.time(call)[1] for _ in range(_CALLS))


def _versions() -> dict[str, str]:
    return {
        "driver": _driver(),
        "CUDA": torch.version.cuda or "none",
        "cuDNN": str(torch.backends.cudnn.version() or "none"),
        "PyTorch": torch.__version__,
        "Triton": installed_version("triton", "not installed"),
        "Python": platform.python_version(),
        "widekernel": installed_version("widekernel"),
        "timm": installed_version("timm"),
    }


def _driver() -> str:
    """Return the version of the driver as `nvidia-smi` reports it, because PyTorch does not know it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")
