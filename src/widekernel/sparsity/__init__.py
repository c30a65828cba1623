"""Sparsity that is part of the checkpoint: dynamic sparse training, coarse pruning, learned 2:4 masks."""

from widekernel.sparsity import semi_structured
from widekernel.sparsity.compaction import CostModel, compact, compact_report
from widekernel.sparsity.config import DynamicSparsityConfig, published_shiftwise, published_slak
from widekernel.sparsity.dynamic import DynamicSparsity
from widekernel.sparsity.merging import check_merged_support, merged_support, shared_mask
from widekernel.sparsity.processes import MaskMismatchError
from widekernel.sparsity.report import SparsityReport
from widekernel.sparsity.saving import load_masks, save_masks

__all__ = [
    "CostModel",
    "DynamicSparsity",
    "DynamicSparsityConfig",
    "MaskMismatchError",
    "SparsityReport",
    "check_merged_support",
    "compact",
    "compact_report",
    "load_masks",
    "merged_support",
    "published_shiftwise",
    "published_slak",
    "save_masks",
    "semi_structured",
    "shared_mask",
]
