"""The GPU of this machine: its properties, and obstacles to running kernels on it."""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache

import torch

from widekernel.ops.gpu.config_choice import INTERPRETED_CHIP
from widekernel.ops.gpu.interpreter import is_interpreted
from widekernel.ops.gpu.kernel_configs import OLDEST_CAPABILITY, Chip

_NO_TRITON = "Triton is not installed: pip install triton"
_warned = False


def obstacles(device: str) -> list[str]:
    """List what prevents any kernel from running on this machine, on `cuda` or, interpreted, on `cpu`."""
    if not _has_triton():
        return [_NO_TRITON]
    if device == "cpu":
        return []
    obstacle = _unsupported_gpu() or _failure_of_triton()
    return [obstacle] if obstacle else []


def warn_once_if_software_is_missing() -> None:
    """Warn once per process if kernels could run on the GPU of this machine but software is missing."""
    global _warned
    if _warned or _unsupported_gpu():
        return
    missing = _failure_of_triton() if _has_triton() else _NO_TRITON
    if not missing:
        return
    _warned = True
    warnings.warn(
        f"widekernel computes large kernels on this GPU with PyTorch's convolutions, many times slower: {missing}",
        RuntimeWarning,
        stacklevel=2,
    )


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _unsupported_gpu() -> str:
    """Return why kernels cannot run on a GPU of this machine whatever software is installed; "" if they can."""
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs and has never been tested on AMD GPUs"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        wanted, has = (".".join(map(str, version)) for version in (OLDEST_CAPABILITY, capability))
        return f"it needs compute capability {wanted} or newer, and {torch.cuda.get_device_name()} has {has}"
    return ""


def _failure_of_triton() -> str:
    """Return why Triton, which is installed, cannot launch kernels on the GPU; "" if it can."""
    if is_interpreted():
        return ""
    from widekernel.ops.gpu import launch

    return launch.obstacle()


def chip() -> Chip:
    """Return the properties of the current GPU, or of the stand-in that the interpreter uses."""
    return _chip_of(torch.cuda.current_device()) if torch.cuda.is_available() else INTERPRETED_CHIP


@lru_cache(maxsize=64)
def _chip_of(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 99 * 1024
    return Chip((properties.major, properties.minor), properties.multi_processor_count, shared)


def device_name() -> str:
    """Return the full name of the current GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
