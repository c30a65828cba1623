"""Transformations of networks. They act on layers by type and contain no code for particular networks."""

from widekernel.transforms.acceleration import AccelerationReport, FusedBlock, LayerAcceleration, accelerate
from widekernel.transforms.compaction import CompactReport, CostModel, compact, compact_report
from widekernel.transforms.fold import fold
from widekernel.transforms.to_torch import to_torch

__all__ = [
    "AccelerationReport",
    "CompactReport",
    "CostModel",
    "FusedBlock",
    "LayerAcceleration",
    "accelerate",
    "compact",
    "compact_report",
    "fold",
    "to_torch",
]
