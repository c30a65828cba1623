"""Small tensors of known numbers, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from widekernel.dense.detection.transfer import send


def constant(values: Sequence[float], device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers as a tensor on a device.

    A tensor that is created there at once would make the host wait until the device has done all its work.
    """
    return send(torch.tensor(values, dtype=dtype), device)
