"""Report on the sparsity of a network, by layer: as text, as JSON and as a plot."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from widekernel.sparsity.plot import plot
from widekernel.sparsity.selection import Selection
from widekernel.sparsity.snapshot import LayerSparsity, SparsitySnapshot, TopologyUpdate, take_snapshot


@dataclass(frozen=True)
class SparsityReport:
    """Report on what is masked and how densely, why other parameters are not masked, and how the masks have moved.

    Attributes:
        snapshot: the data of the report, such as `DynamicSparsity.snapshot()`.
    """

    snapshot: SparsitySnapshot

    @classmethod
    def of(
        cls, model: nn.Module, choices: Sequence[Selection], masks: Mapping[str, Tensor], controller: Any = None
    ) -> SparsityReport:
        """Return `SparsityReport(controller.snapshot())`; deprecated."""
        warnings.warn(
            "SparsityReport.of() will be removed in the next version: write SparsityReport(controller.snapshot())",
            FutureWarning,
            stacklevel=2,
        )
        return cls(take_snapshot(model, choices, masks) if controller is None else controller.snapshot())

    @property
    def layers(self) -> tuple[LayerSparsity, ...]:
        """Every parameter, in the network's order."""
        return self.snapshot.layers

    @property
    def masked(self) -> list[LayerSparsity]:
        """The parameters that have masks."""
        return [layer for layer in self.layers if not layer.reason]

    @property
    def churn(self) -> tuple[TopologyUpdate, ...]:
        """The topology updates so far, newest last."""
        return self.snapshot.churn

    def sparsity(self) -> float:
        """Return the share of zeros among the weights of the masked parameters."""
        total = sum(layer.size for layer in self.masked)
        return 1 - sum(layer.active for layer in self.masked) / max(1, total)

    def summary(self) -> str:
        """Return a few lines on how much is masked, and why the rest is not."""
        total = sum(layer.size for layer in self.layers)
        inside = sum(layer.size for layer in self.masked)
        pending = self.snapshot.pending
        now = "the masks are drawn at the first step" if pending else f"{100 * self.sparsity():.1f} % of them zero"
        lines = [f"{len(self.masked)} of {len(self.layers)} parameters are masked: {inside:,} of {total:,} weights, {now}"]
        for reason, count in Counter(layer.reason for layer in self.layers if layer.reason).most_common():
            size = sum(layer.size for layer in self.layers if layer.reason == reason)
            lines.append(f"dense: {count} parameters, {size:,} weights: {reason}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "sparsity": self.sparsity(),
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "weights": layer.size,
                    "active": layer.active,
                    "density": layer.density,
                    "target_density": layer.target,
                    "moved": layer.grown,
                    "masked": not layer.reason,
                    "reason": layer.reason,
                }
                for layer in self.layers
            ],
            "churn": [vars(update) for update in self.churn],
        }

    def picture(self) -> bytes:
        """Return a PNG file: the density of every layer, the churn of every update, and some kernels with their masks."""
        return plot(self.snapshot)
