"""Fixtures: machines with known limits, and a backend that computes wrong results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from widekernel import ops
from widekernel.bench import Machine, Platform, cpu_platform, cuda_platform
from widekernel.bench import machine as measuring
from widekernel.bench.devices import Accelerator
from widekernel.bench.gpu import Gpu
from widekernel.bench.timing import WallClock
from widekernel.ops.backends.torch_conv import TorchConvBackend
from widekernel.transforms.acceleration import timing


class Wrong(ops.Backend):
    """Backend that takes the problems for which `spoils` returns true, and computes one number of each wrong."""

    name = "wrong"
    computes_dilated = True

    def __init__(self, spoils: Callable) -> None:
        self.spoils = spoils

    def reasons_against(self, problem) -> list[str]:
        return [] if self.spoils(problem) else ["it takes only others"]

    def prepare(self, problem):
        right = TorchConvBackend().prepare(problem)

        def compute(*arguments):
            result = right(*arguments)
            result[-1, 0, -1, -1] += 0.1 * result.abs().max()
            return result

        return compute


@pytest.fixture
def spoil() -> Iterator[Callable]:
    """Return a function that registers a wrong backend, first in line, for the problems that its argument selects."""
    yield lambda spoils: ops.register(Wrong(spoils))
    ops.unregister("wrong")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the limits of the machine quickly and roughly.

    What happens to freed memory is given. In a process in which other tests let allocations fail, it may change at any time.
    """
    monkeypatch.setattr(measuring, "_PEAK_SECONDS", 0.005)
    monkeypatch.setattr(measuring, "_COPIED", 2**16)
    monkeypatch.setattr(measuring, "freed_memory", lambda: "kept by the process")


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `accelerate` take our layers and blocks without timing them.

    Which of them are faster in networks this small depends on the machine, and timing them takes longer than all else.
    """
    monkeypatch.setattr(timing, "measure", lambda *_: (2.0, 1.0))


@pytest.fixture
def machine() -> Machine:
    versions = {"Python": "3", "PyTorch": "2"}
    return Machine("A processor", 2, 1, "none", "none", versions, 100.0, "made up", 10.0, "passive", "kept by the process")


@pytest.fixture
def device_gpu() -> Gpu:
    """Return a device limited to 4 TB/s and, in TFLOP/s, 800 in bfloat16, 390 in tf32, 780 in float16, 50 in float32."""
    products = {"bfloat16": 800e3, "tf32": 390e3, "float16": 780e3, "float32": 50e3}
    return Gpu("Some GPU", "9.0", 132, 140.0, 50.0, "A processor", {"driver": "1", "PyTorch": "2"}, 4000.0, products)


@pytest.fixture
def on_cpu() -> Accelerator:
    """Pretend that the CPU, with the clock of the host, is an accelerator."""
    return Accelerator(torch.device("cpu"), WallClock())


@pytest.fixture
def device(on_cpu: Accelerator, device_gpu: Gpu) -> Platform:
    """Return a platform that measures as on a CUDA device, but on the CPU."""
    return cuda_platform(on_cpu, device_gpu)


@pytest.fixture
def cpu(machine: Machine) -> Platform:
    return cpu_platform(machine)
