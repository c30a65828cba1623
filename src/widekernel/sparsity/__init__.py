"""Sparsity that is part of the checkpoint: dynamic sparse training, coarse pruning, learned 2:4 masks."""

from typing import TYPE_CHECKING

from widekernel.lazy import attach

if TYPE_CHECKING:
    from widekernel.sparsity import semi_structured
    from widekernel.sparsity.config import DynamicSparsityConfig, published_shiftwise, published_slak
    from widekernel.sparsity.dynamic import DynamicSparsity
    from widekernel.sparsity.merging import check_merged_support, merged_support, shared_mask
    from widekernel.sparsity.processes import MaskMismatchError
    from widekernel.sparsity.report import SparsityReport
    from widekernel.sparsity.serialization import load_masks, save_masks
    from widekernel.transforms.compaction import CostModel, compact, compact_report

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

_WHERE = {
    "CostModel": "widekernel.transforms.compaction",
    "DynamicSparsity": "widekernel.sparsity.dynamic",
    "DynamicSparsityConfig": "widekernel.sparsity.config",
    "MaskMismatchError": "widekernel.sparsity.processes",
    "SparsityReport": "widekernel.sparsity.report",
    "check_merged_support": "widekernel.sparsity.merging",
    "compact": "widekernel.transforms.compaction",
    "compact_report": "widekernel.transforms.compaction",
    "load_masks": "widekernel.sparsity.serialization",
    "merged_support": "widekernel.sparsity.merging",
    "published_shiftwise": "widekernel.sparsity.config",
    "published_slak": "widekernel.sparsity.config",
    "save_masks": "widekernel.sparsity.serialization",
    "semi_structured": "widekernel.sparsity.semi_structured",
    "shared_mask": "widekernel.sparsity.merging",
}
__getattr__, __dir__ = attach(__name__, _WHERE)
