"""Our network for every official configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.parity.downstream.reference import pyramid, segmenter
from tests.parity.downstream.two_stage import create
from widekernel.dense.detection.fcos import Fcos, FcosOptions


def network(config: dict[str, Any]) -> nn.Module:
    """Build our network for an official configuration."""
    kind = config["type"]
    if kind == "EncoderDecoder":
        return segmenter(config)
    if kind == "FCOS":
        head = config["bbox_head"]
        return Fcos(pyramid(config["backbone"]), FcosOptions(head["num_classes"], head["feat_channels"]))
    return create(config)
