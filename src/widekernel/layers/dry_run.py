"""Runs of a network on images without data, in which hooks see the shapes of everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def run_without_data(model: nn.Module, input_size: Sequence[int]) -> None:
    """Run a network on images (N, C, H, W) on the meta device, so that nothing is computed and nothing changes.

    Args:
        model: the network, on any device; it runs in the mode that it is in.
        input_size: (N, C, H, W).
    """
    meta = {key: value.to("meta") for key, value in (*model.named_parameters(), *model.named_buffers())}
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    with torch.no_grad():
        torch.func.functional_call(model, meta, (torch.empty(*input_size, device="meta", dtype=dtype),))
