"""Removing the dead parts of a masked network: a smaller network with equal outputs, and a report on the savings."""

from widekernel.transforms.compaction.cost import CostModel
from widekernel.transforms.compaction.network import compact, compact_report
from widekernel.transforms.compaction.report import CompactReport, LayerReport

__all__ = ["CompactReport", "CostModel", "LayerReport", "compact", "compact_report"]
