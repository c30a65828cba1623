"""The door to `torch.distributed`, which no other module imports.

The engine's processes (`engine/distributed.py`) and dynamic sparsity, which users also combine with training loops of their
own, get it here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["are_several", "average", "dist", "gather", "lowest"]


def are_several() -> bool:
    """Return whether this process has joined others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average(value: Tensor) -> Tensor:
    """Average a tensor over all processes, in place."""
    if are_several():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def lowest(value: Tensor) -> Tensor:
    """Replace each element of a tensor by the lowest of all processes, in place."""
    if are_several():
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return value


def gather(value: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, by rank."""
    if not are_several():
        return [value]
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, value)
    return gathered
