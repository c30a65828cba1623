"""Networks by the names that widekernel and timm know them by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import widekernel.models  # noqa: F401 - registers the models
from widekernel.tasks.assembly import build_model, pretrained_cfg


def built(name: str) -> tuple[nn.Module, int]:
    """Build a network, and give the height and width of the images that it is made for."""
    model = build_model(name, None, {})
    return model, int(pretrained_cfg(model)["input_size"][-1])


def check_names(names: Sequence[str]) -> None:
    """Refuse unknown names before the first network is timed, by building them without numbers.

    Raises:
        ConfigError: if one is unknown.
    """
    with torch.device("meta"):
        for name in names:
            build_model(name, None, {})
