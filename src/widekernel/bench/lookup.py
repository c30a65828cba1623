"""Networks by the names under which widekernel and timm register them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import widekernel.models  # noqa: F401 - registers the models
from widekernel.tasks.assembly import build_model, pretrained_cfg


def build_network(name: str) -> tuple[nn.Module, int]:
    """Build a network; return it and the side of its default images, in pixels."""
    model = build_model(name, None, {})
    return model, int(pretrained_cfg(model)["input_size"][-1])


def check_names(names: Sequence[str]) -> None:
    """Raise if a name is unknown, before anything is timed. The networks are built on the meta device.

    Raises:
        ConfigError: if a name is unknown.
    """
    with torch.device("meta"):
        for name in names:
            build_model(name, None, {})
