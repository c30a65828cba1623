"""Program that runs another program of a GPU session on a simulated GPU: kernels are interpreted, on CPU tensors.

python -m tests.gpu_session.pretense MODULE [ARGUMENTS]        # widekernel, ready or correctness
"""

from __future__ import annotations

import os

# Before Triton is imported, by timm for instance.
os.environ["TRITON_INTERPRET"] = "1"

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from tests.interpreting import let_scalars_be_integers

NAME = "a pretended GPU"
CPU = torch.device("cpu")


def pretend() -> None:
    """Make benchmarks and tuning take the CPU for a GPU, and use the clock of the host."""
    from widekernel.bench import devices, gpu
    from widekernel.bench.timing import WallClock
    from widekernel.cli import tune_session
    from widekernel.ops.gpu.config_choice import INTERPRETED_CHIP
    from widekernel.ops.gpu.tuning import MeasurementSetup

    products = dict.fromkeys(("bfloat16", "tf32", "float16", "float32"), 1e3)
    found = gpu.Gpu(NAME, "9.0", 1, 1.0, 1.0, "the host", {"PyTorch": torch.__version__}, 100.0, products)
    devices.accelerator = lambda text: devices.Accelerator(CPU, WallClock())
    gpu.measure_gpu = lambda accelerator: found

    def measured(calls: Any) -> dict[str, float]:
        return tune_session.median_seconds(calls, WallClock(), 0.0)

    tune_session.setup_on = lambda device, seconds: MeasurementSetup(CPU, NAME, INTERPRETED_CHIP, measured)


def pretend_properties() -> None:
    """Make PyTorch report a GPU, for a program that only asks for its properties."""
    about = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=2**37, multi_processor_count=1)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda *device: about
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.device = lambda *device: nullcontext()


def main(arguments: Sequence[str]) -> int:
    """Run the program that the first argument names."""
    module, rest = arguments[0], list(arguments[1:])
    let_scalars_be_integers()
    if module == "ready":
        from benchmarks.gpu_session import ready

        pretend_properties()
        return ready.main(rest)
    if module == "correctness":
        from benchmarks.gpu_session import correctness

        return correctness.main(rest, (sys.executable, "-m", "tests.gpu_session.pretense", "correctness"))
    from widekernel.cli.main import main as command_line

    pretend()
    return command_line(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
