"""Adaptation of the first convolution to images with another number of channels, as timm does it."""

from __future__ import annotations

from typing import Any

from timm.models import adapt_input_conv
from torch import nn

from widekernel.models.layouts.layout import State


def adapt_channels(network: nn.Module, state: State) -> None:
    """Adapt the first convolution in a state dict in our layout to the network's number of channels, in place."""
    described: Any = getattr(network, "pretrained_cfg", {})
    key = f"{described.get('first_conv')}.weight"
    ours = network.state_dict().get(key)
    theirs = state.get(key)
    if ours is None or theirs is None or theirs.dim() != 4 or theirs.shape[1] == ours.shape[1]:
        return
    state[key] = adapt_input_conv(ours.shape[1], theirs, base_chans=theirs.shape[1])
