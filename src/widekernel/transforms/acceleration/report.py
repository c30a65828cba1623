"""The report of `accelerate`: the change to each layer, and the reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerAcceleration:
    """One depthwise or pointwise layer.

    Attributes:
        name: its name in the network, "" if it is the network itself.
        before: description of the layer before the call of `accelerate`.
        after: class of the layer now; None if it was left alone.
        reason: why it was swapped without measuring, or left alone.
        calls: number of calls in the run on the example; 0 without an example.
        milliseconds_before: total time of these calls with the original layer; None if not measured.
        milliseconds_after: total time of these calls with the alternative, whether it was chosen or not; None if not
            measured.
    """

    name: str
    before: str
    after: str | None
    reason: str = ""
    calls: int = 0
    milliseconds_before: float | None = None
    milliseconds_after: float | None = None

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
    """The reports on every depthwise and pointwise layer of a network.

    Attributes:
        layers: one report per layer, in the order of the network.
        backward: whether backward passes were measured, too.
        threads: number of threads during the measurement.
    """

    layers: tuple[LayerAcceleration, ...]
    backward: bool
    threads: int

    @property
    def swapped(self) -> tuple[LayerAcceleration, ...]:
        """The layers that were swapped."""
        return tuple(layer for layer in self.layers if layer.is_swapped)

    def __getitem__(self, name: str) -> LayerAcceleration:
        """Return the report on the layer of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"{name!r} is not among the {len(self.layers)} depthwise and pointwise layers of the report")

    def totals(self) -> tuple[float, float]:
        """Return the time of all measured layers, before and now, in milliseconds."""
        before = now = 0.0
        for layer in self.layers:
            if layer.milliseconds_before is not None and layer.milliseconds_after is not None:
                before += layer.milliseconds_before
                now += layer.milliseconds_after if layer.is_swapped else layer.milliseconds_before
        return before, now

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        before, now = self.totals()
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "swapped": len(self.swapped),
            "milliseconds_before": before,
            "milliseconds_after": now,
            "backward": self.backward,
            "threads": self.threads,
        }

    def __str__(self) -> str:
        """Return a table with one line per layer, and a summary."""
        table: list[tuple[str, ...]] = [("layer", "was", "is now", "ms before", "other way", "gain", "")]
        table += [_cells(layer) for layer in self.layers]
        widths = [max(len(row[column]) for row in table) for column in range(6)]
        lines = []
        for row in table:
            left = [cell.ljust(width) for cell, width in zip(row[:3], widths)]
            right = [cell.rjust(width) for cell, width in zip(row[3:6], widths[3:])]
            lines.append("  ".join([*left, *right, row[6]]).rstrip())
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        swapped = f"{len(self.swapped)} of {len(self.layers)} layers swapped"
        before, now = self.totals()
        if not before:
            return f"{swapped}."
        passes = "forward and backward" if self.backward else "forward"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{swapped}; the measured ones take {now:.2f} ms instead of {before:.2f} ({passes}, {threads})."


def _cells(layer: LayerAcceleration) -> tuple[str, ...]:
    numbers = (layer.milliseconds_before, layer.milliseconds_after)
    times = ["" if number is None else f"{number:.3f}" for number in numbers]
    gain = "" if layer.gain is None else f"{layer.gain:.2f}"
    return (layer.name or "(itself)", layer.before, layer.after or "as it was", *times, gain, layer.reason)
