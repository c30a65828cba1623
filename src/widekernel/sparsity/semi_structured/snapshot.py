"""Snapshot of a 2:4 network, for reports and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from widekernel.sparsity.selection import Selection
from widekernel.sparsity.semi_structured.eligibility import LayerReport
from widekernel.sparsity.snapshot import SparsitySnapshot, take_snapshot


def semi_structured_snapshot(
    model: nn.Module, layers: Sequence[LayerReport], masks: Mapping[str, Tensor]
) -> SparsitySnapshot:
    """Return a snapshot of the weights of Conv2d and Linear layers.

    Args:
        model: the converted network, with plain weights.
        layers: the layers, such as `SemiStructured.report`.
        masks: parameter name -> bool tensor.
    """
    selection = [Selection(row.weight_name, tuple(row.shape), "" if row.masked else row.reason) for row in layers]
    return take_snapshot(model, selection, masks)
