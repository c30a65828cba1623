"""Data-parallel processes, which compute the same masks without sending masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from widekernel.collectives import are_several, gather, lowest
from widekernel.errors import WidekernelError
from widekernel.sparsity.packing import digest


class MaskMismatchError(WidekernelError, RuntimeError):
    """Error for processes that train together but have different masks."""


def check_equal(masks: Mapping[str, Tensor]) -> None:
    """Compare the masks of all processes by one 64-bit digest.

    Raises:
        MaskMismatchError: the masks differ; the message names the layers.
    """
    if not are_several():
        return
    device = next(iter(masks.values())).device
    each = torch.tensor([digest(name, mask) for name, mask in masks.items()], dtype=torch.int64)
    total = _combine(each)
    bounds = lowest(torch.stack([total, ~total]).to(device))  # the complement turns a minimum into a maximum
    if bounds[0] == ~bounds[1]:
        return
    gathered = gather(each.to(device))
    differ = [name for place, name in enumerate(masks) if len({int(others[place]) for others in gathered}) > 1]
    raise MaskMismatchError(
        f"the masks of {', '.join(differ[:5])} differ between processes: all must start from the same weights and settings, "
        "and gradients must be averaged before the optimizer steps"
    )


def _combine(digests: Tensor) -> Tensor:
    """Combine digests so that a change of any one changes the result."""
    odd = 2 * torch.arange(len(digests), dtype=torch.int64) + 1
    return (digests * odd).sum()
