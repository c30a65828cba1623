"""Removing what is dead from a masked network: a smaller network with equal outputs, and a report of what it saved."""

from widekernel.sparsity.compaction.cost import CostModel
from widekernel.sparsity.compaction.network import compact, compact_report
from widekernel.sparsity.compaction.report import CompactReport, LayerReport

__all__ = ["CompactReport", "CostModel", "LayerReport", "compact", "compact_report"]
