"""The report of `compact`: savings layer by layer, and the reason if there are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from widekernel.deprecation import renamed_attribute


@dataclass(frozen=True)
class LayerReport:
    """One layer before and after.

    Attributes:
        name: name of the module in the network, "" for the network itself.
        kind: type of the module.
        channels: number of channels that the folded layer convolves; for an MLP, of its hidden units.
        channels_kept: number of channels, or units, that are still computed.
        dense: multiply-accumulates per output pixel (or token) of the folded layer.
        nonzero: those of `dense` whose weight is not zero.
        realized: multiply-accumulates that the compacted layer executes; more than `nonzero` if zeros lie between live
            taps.
        reason: why nothing, or not everything, was removed; "" if all dead parts were.
    """

    name: str
    kind: str
    channels: int
    channels_kept: int
    dense: int
    nonzero: int
    realized: int
    reason: str = ""

    realised = renamed_attribute("realised", "realized")

    def __str__(self) -> str:
        what = f"{self.name or self.kind}: {self.channels} -> {self.channels_kept} channels"
        macs = f"{self.dense} dense, {self.nonzero} non-zero, {self.realized} realized MACs per pixel"
        return f"{what}, {macs}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class CompactReport:
    """The reports on layers with zeros or a large kernel, in the order of the network."""

    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers)) or "no layer holds zeros or a large kernel"

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the JSON form: one object per layer."""
        return [asdict(layer) for layer in self.layers]
