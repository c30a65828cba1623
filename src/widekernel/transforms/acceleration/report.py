"""The report of `accelerate`: the change to each layer, and the reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from widekernel.transforms.acceleration.outputs import OutputDeviation


@dataclass(frozen=True)
class LayerAcceleration:
    """One depthwise or pointwise layer, one batch norm, or one block.

    Attributes:
        name: its name in the network, "" if it is the network itself.
        before: description of the layer before the call of `accelerate`; of a block, what can be fused.
        after: class of the layer now; None if it was left alone.
        reason: why it was swapped without being faster alone, or left alone.
        calls: number of calls in the run on the example; 0 without an example.
        milliseconds_before: total time of these calls with the original layer; None if not measured.
        milliseconds_after: total time of these calls with the alternative, whether it was chosen or not; None if not
            measured.
        deviation: of a block, the largest difference between a fused part, or the whole, and the original on the example,
            relative to the largest number; None if not compared.
    """

    name: str
    before: str
    after: str | None
    reason: str = ""
    calls: int = 0
    milliseconds_before: float | None = None
    milliseconds_after: float | None = None
    deviation: float | None = None

    @property
    def is_swapped(self) -> bool:
        """Whether the layer was swapped."""
        return self.after is not None

    @property
    def gain(self) -> float | None:
        """Time of the original divided by time of the alternative: below 1 if that is slower, None if not measured."""
        if self.milliseconds_before is None or not self.milliseconds_after:
            return None
        return self.milliseconds_before / self.milliseconds_after

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self) | {"gain": self.gain}


@dataclass(frozen=True)
class AccelerationReport:
    """The reports on every depthwise and pointwise layer of a network and, in training, on every batch norm.

    Attributes:
        layers: one report per layer, in the order of the network.
        backward: whether backward passes were measured, too.
        threads: number of threads during the measurement.
        blocks: one report per block of which parts can be fused; the times include the layers of the block.
        precision: type of the factors of products in fused blocks.
        outputs: how the outputs of the network have changed on the example; None in float32.
        chains: names of the containers whose members are all fused blocks, which one native call can compute together.
    """

    layers: tuple[LayerAcceleration, ...]
    backward: bool
    threads: int
    blocks: tuple[LayerAcceleration, ...] = ()
    precision: str = "float32"
    outputs: OutputDeviation | None = None
    chains: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[LayerAcceleration, ...]:
        """The layers that were swapped."""
        return tuple(layer for layer in self.layers if layer.is_swapped)

    @property
    def fused(self) -> tuple[LayerAcceleration, ...]:
        """The blocks that were fused."""
        return tuple(block for block in self.blocks if block.is_swapped)

    def __getitem__(self, name: str) -> LayerAcceleration:
        """Return the report on the layer or block of that name."""
        for row in (*self.layers, *self.blocks):
            if row.name == name:
                return row
        known = f"{len(self.layers)} layers and {len(self.blocks)} blocks"
        raise KeyError(f"{name!r} is not among the {known} of the report")

    def totals(self) -> tuple[float, float]:
        """Return the time of all measured layers, before and now, in milliseconds, as if no block were fused."""
        return _totals(self.layers)

    def summary(self) -> str:
        """Return one line on the layers: how many were swapped, and the time of those measured, before and now."""
        return self._summary("layer", "swapped", self.layers, self.backward)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        before, now = self.totals()
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "blocks": [block.to_dict() for block in self.blocks],
            "swapped": len(self.swapped),
            "fused": len(self.fused),
            "chains": list(self.chains),
            "milliseconds_before": before,
            "milliseconds_after": now,
            "backward": self.backward,
            "threads": self.threads,
            "precision": self.precision,
            "outputs": None if self.outputs is None else self.outputs.to_dict(),
        }

    def __str__(self) -> str:
        """Return a table with one line per block, another one with the layers, and a summary of each."""
        lines = []
        if self.blocks:
            lower = self.precision != "float32"
            done = f"fused in {self.precision}" if lower else "fused"
            lines = [*_table("block", self.blocks, lower), self._summary("block", done, self.blocks, False), ""]
        if self.chains:
            names = ", ".join(name or "(itself)" for name in self.chains)
            lines[-1:] = [f"Fused blocks in a row, each chain for one native call: {names}.", ""]
        if self.outputs is not None:
            lines[-1:] = [str(self.outputs), ""]
        lines += [*_table("layer", self.layers), self.summary()]
        return "\n".join(lines)

    def _summary(self, what: str, done: str, rows: tuple[LayerAcceleration, ...], backward: bool) -> str:
        swapped = f"{sum(row.is_swapped for row in rows)} of {len(rows)} {what}{'' if len(rows) == 1 else 's'} {done}"
        before, now = _totals(rows)
        if not before:
            return f"{swapped}."
        passes = "forward and backward" if backward else "forward"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        if not any(row.is_swapped and row.milliseconds_before is not None for row in rows):
            return f"{swapped}; none of those measured is faster in another way ({passes}, {threads})."
        return f"{swapped}; the measured ones take {now:.2f} ms instead of {before:.2f} ({passes}, {threads})."


def _totals(rows: tuple[LayerAcceleration, ...]) -> tuple[float, float]:
    before = now = 0.0
    for row in rows:
        if row.milliseconds_before is not None and row.milliseconds_after is not None:
            before += row.milliseconds_before
            now += row.milliseconds_after if row.is_swapped else row.milliseconds_before
    return before, now


def _table(what: str, rows: tuple[LayerAcceleration, ...], deviations: bool = False) -> list[str]:
    more = ["deviation"] if deviations else []
    table: list[list[str]] = [[what, "was", "is now", "ms before", "other way", "gain", *more, ""]]
    table += [_cells(row, deviations) for row in rows]
    widths = [max(len(row[column]) for row in table) for column in range(6 + len(more))]
    lines = []
    for row in table:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths)]
        right = [cell.rjust(width) for cell, width in zip(row[3:-1], widths[3:])]
        lines.append("  ".join([*left, *right, row[-1]]).rstrip())
    return lines


def _cells(layer: LayerAcceleration, deviations: bool) -> list[str]:
    numbers = (layer.milliseconds_before, layer.milliseconds_after)
    times = ["" if number is None else f"{number:.3f}" for number in numbers]
    gain = "" if layer.gain is None else f"{layer.gain:.2f}"
    more = ["" if layer.deviation is None else f"{layer.deviation:.1e}"] if deviations else []
    return [layer.name or "(itself)", layer.before, layer.after or "as it was", *times, gain, *more, layer.reason]
