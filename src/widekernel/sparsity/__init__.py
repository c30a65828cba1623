"""Sparsity of the weights: dynamic sparse training, coarse pruning, and semi-structured (2:4) masks."""

from typing import TYPE_CHECKING

from widekernel.lazy import attach

if TYPE_CHECKING:
    from widekernel.sparsity import semi_structured
    from widekernel.sparsity.dynamic.config import DynamicSparsityConfig, published_shiftwise, published_slak
    from widekernel.sparsity.dynamic.controller import DynamicSparsity
    from widekernel.sparsity.dynamic.processes import MaskMismatchError
    from widekernel.sparsity.mask_files import load_masks, save_masks
    from widekernel.sparsity.merging import check_merged_support, merged_support, shared_mask
    from widekernel.sparsity.report import SparsityReport
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
    "DynamicSparsity": "widekernel.sparsity.dynamic.controller",
    "DynamicSparsityConfig": "widekernel.sparsity.dynamic.config",
    "MaskMismatchError": "widekernel.sparsity.dynamic.processes",
    "SparsityReport": "widekernel.sparsity.report",
    "check_merged_support": "widekernel.sparsity.merging",
    "compact": "widekernel.transforms.compaction",
    "compact_report": "widekernel.transforms.compaction",
    "load_masks": "widekernel.sparsity.mask_files",
    "merged_support": "widekernel.sparsity.merging",
    "published_shiftwise": "widekernel.sparsity.dynamic.config",
    "published_slak": "widekernel.sparsity.dynamic.config",
    "save_masks": "widekernel.sparsity.mask_files",
    "semi_structured": "widekernel.sparsity.semi_structured",
    "shared_mask": "widekernel.sparsity.merging",
}
__getattr__, __dir__ = attach(__name__, _WHERE)
