"""Mixed precision of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from widekernel.errors import ConfigError


def make_autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a function that creates the context of a forward pass in `precision`.

    Raises:
        ConfigError: the precision is not available on the device.
    """
    if precision == "fp32":
        return nullcontext
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"loop.precision is 'fp16', which needs a CUDA device, but the device is {device}. Use bf16 or fp32."
        )
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype=dtype)
