"""Plots of the training curves, drawn without touching matplotlib's global state."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from widekernel.figures import new_figure, to_png
from widekernel.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and accuracy over optimizer steps from the rows of metrics.jsonl.

    Raises:
        WidekernelError: the picture cannot be written.
    """
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    draw_loss(left, rows)
    draw_accuracy(right, rows)
    write_file(path, to_png(figure, dpi=120))


def draw_loss(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    """Draw training loss, held-out loss and learning rate over optimizer steps."""
    _plot(axes, rows, "train_loss", "training", alpha=0.6)
    _plot(axes, rows, "val_loss", "held-out", marker=".")
    _plot(axes, rows, "ema_val_loss", "held-out, averaged weights", marker=".")
    axes.set(xlabel="optimizer step", ylabel="loss", title="Loss")
    if axes.lines:
        axes.legend(loc="upper right")
    rates = axes.twinx()
    _plot(rates, rows, "lr", "learning rate", color="0.75", linewidth=1, linestyle="--")
    rates.set_ylabel("learning rate (dashed)", color="0.5")


def draw_accuracy(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    """Draw held-out top-1 accuracy in percent over optimizer steps."""
    _plot(axes, rows, "val_top1", "weights", marker=".")
    _plot(axes, rows, "ema_val_top1", "averaged weights", marker=".")
    axes.set(xlabel="optimizer step", ylabel="top-1 (%)", title="Held-out accuracy")
    if axes.lines:
        axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


def _plot(axes: "Axes", rows: list[dict[str, Any]], key: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=label, **style)
