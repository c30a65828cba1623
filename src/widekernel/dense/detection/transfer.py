"""Small tensors from the host to a device, without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def send(value: Tensor, device: torch.device | None) -> Tensor:
    """Return a tensor of the host on a device; a CUDA device copies it in its own time, from pinned memory.

    Args:
        value: tensor on the CPU
        device: where it is wanted; `None` leaves it on the host
    """
    if device is not None and device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
