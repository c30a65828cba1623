"""Picture of the demo: digits with predictions, curves, a kernel before and after folding, a confusion matrix."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor, nn

from widekernel.engine.curves import draw_losses, draw_metrics, metric_groups
from widekernel.engine.metrics import Metric
from widekernel.figures import new_figure, to_png
from widekernel.files import write_file
from widekernel.layers import FoldedLargeKernel, LargeKernel, Rect
from widekernel.layers.norms import affine_of
from widekernel.layers.sources import rects_of

SHOWN = 32


@dataclass(frozen=True)
class PictureContent:
    """Contents of the picture.

    Args:
        digits: the held-out images
        class_names: names of the classes
        targets: true class of each image
        predictions: class that the folded network predicts for each image
        history: rows of metrics.jsonl
        metrics: what the evaluations measured
        dense: the network as trained
        folded: the network after folding
        rows: (form, top-1 in percent, milliseconds per image) of the result table
    """

    digits: list[Image.Image]
    class_names: tuple[str, ...]
    targets: list[int]
    predictions: list[int]
    history: list[dict[str, Any]]
    metrics: tuple[Metric, ...]
    dense: nn.Module
    folded: nn.Module
    rows: list[tuple[str, float, float]]


def draw(content: PictureContent, path: Path) -> None:
    """Draw `content` and write it to `path` as PNG."""
    figure = new_figure(17, 13)
    top, middle, bottom = cast(Any, figure.subfigures(3, 1, height_ratios=[1, 0.95, 1]))
    left, right = top.subfigures(1, 2, width_ratios=[1, 1.35])
    _draw_digits(left, content)
    loss, accuracy = right.subplots(1, 2)
    draw_losses(loss, content.history, content.metrics)
    draw_metrics(accuracy, content.history, metric_groups(content.metrics)[0])
    _draw_kernels(middle, content)
    confusion, table = bottom.subplots(1, 2, width_ratios=[1, 1.35])
    _draw_confusion(confusion, content)
    _draw_table(table, content)
    write_file(path, to_png(figure, dpi=90))


def _draw_digits(figure: SubFigure, content: PictureContent) -> None:
    # Wrong predictions come first.
    order = sorted(range(len(content.digits)), key=lambda i: content.predictions[i] == content.targets[i])[:SHOWN]
    mistakes = sum(p != t for p, t in zip(content.predictions, content.targets, strict=True))
    figure.suptitle(f"Held-out digits and predictions ({mistakes} of {len(content.digits)} wrong, shown first)")
    for axes, index in zip(figure.subplots(4, SHOWN // 4).flat, order, strict=True):
        axes.imshow(content.digits[index])
        axes.axis("off")
        guess, truth = content.predictions[index], content.targets[index]
        text = (
            content.class_names[guess] if guess == truth else f"{content.class_names[guess]} ({content.class_names[truth]})"
        )
        axes.set_title(text, color="black" if guess == truth else "crimson", fontsize=10)


def _draw_kernels(figure: SubFigure, content: PictureContent) -> None:
    name, layer = next((n, m) for n, m in content.dense.named_modules() if isinstance(m, LargeKernel))
    folded = content.folded.get_submodule(name)
    assert isinstance(folded, FoldedLargeKernel)
    # Each branch is multiplied by the scale of its norm, as in the sum.
    before = [
        rect.scaled(affine_of(norm, rect.kernel.shape[0])[0].to(rect.kernel))
        for rect, norm in zip(rects_of(layer.source) or [], layer.norms, strict=True)
    ]
    after = folded.rects()
    channel = int(torch.stack([rect.kernel.abs().sum((1, 2, 3)) for rect in after]).sum(0).argmax())
    panels = [(f"branch {rect.label}", [rect]) for rect in before]
    panels += [(f"folded {rect.label}", [rect]) for rect in after]
    reach = max(max(rect.reach) for rect in [*before, *after])
    figure.suptitle(
        f"One learned kernel before and after folding (layer {name}, channel {channel}): "
        f"{len(before)} branches with batch norm become {len(after)} rectangles with a bias, in one operator call"
    )
    panels.append(("sum of the folded", after))
    canvases = [_canvas(rects, channel, reach) for _, rects in panels]
    limit = max(float(canvas.abs().nan_to_num().max()) for canvas in canvases) or 1.0
    all_axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axes, (title, _), canvas in zip(all_axes, panels, canvases, strict=True):
        shown = _draw_kernel(axes, title, canvas, limit)
    figure.colorbar(shown, ax=list(all_axes), label="weight", shrink=0.8)


def _draw_kernel(axes: Axes, title: str, canvas: Tensor, limit: float) -> AxesImage:
    reach = canvas.shape[0] / 2
    shown = axes.imshow(canvas.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(-reach, reach, reach, -reach))
    axes.set_facecolor("0.9")
    axes.set_title(title, fontsize=10)
    return shown


def _canvas(rects: list[Rect], channel: int, reach: int) -> Tensor:
    """Add one channel's taps on a square canvas around the output pixel; NaN where no rectangle has a tap."""
    side = 2 * reach + 1
    taps, covered = torch.zeros(side, side), torch.zeros(side, side, dtype=torch.bool)
    for rect in (each.dense() for each in rects):
        (height, width), (row, column) = rect.size, rect.anchor
        place = slice(reach - row, reach - row + height), slice(reach - column, reach - column + width)
        taps[place] += rect.kernel[channel, 0].detach()
        covered[place] = True
    return taps.masked_fill(~covered, float("nan"))


def _draw_confusion(axes: Axes, content: PictureContent) -> None:
    count = len(content.class_names)
    table = np.zeros((count, count), dtype=int)
    np.add.at(table, (content.targets, content.predictions), 1)
    axes.imshow(np.log1p(table), cmap="Blues")
    for row, column in zip(*table.nonzero(), strict=True):
        color = "white" if row == column else "crimson"
        axes.text(column, row, str(table[row, column]), ha="center", va="center", color=color, fontsize=9)
    axes.set(xticks=range(count), yticks=range(count), xlabel="predicted", ylabel="true", title="Confusion matrix")
    axes.set_xticklabels(content.class_names)
    axes.set_yticklabels(content.class_names)


def _draw_table(axes: Axes, content: PictureContent) -> None:
    axes.axis("off")
    cells = [[name, f"{top1:.2f} %", f"{latency:.2f} ms"] for name, top1, latency in content.rows]
    table = axes.table(cells, colLabels=["network", "top-1", "per image"], loc="center", cellLoc="center")
    table.scale(1, 2.2)
    axes.set_title("Dense and folded, before and after saving")
