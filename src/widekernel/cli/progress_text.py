"""Texts on the progress and the results of a run, for terminals and log files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from widekernel.engine.metrics import Metric
from widekernel.engine.reporter import RunLength

GAP = "  "
"""Space between the parts of a line."""

_LOSS = "train_loss_"


def duration(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds, such as 12:34:56."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def row_parts(length: RunLength, step: int, row: Mapping[str, Any]) -> list[str]:
    """Return what a row of metrics.jsonl tells about the training, the most important first."""
    parts = [f"epoch {length.epoch_of(step)}/{length.epochs}"]
    if "train_loss" in row:
        parts.append(f"loss {_loss(row['train_loss'])}")
    if "lr" in row:
        parts.append(f"lr {row['lr']:.1e}")
    if "images_per_second" in row:
        rate = row["images_per_second"]
        parts.append(f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s")
        parts.append(f"data {_data_share(row):.0%}".replace("%", " %"))
    named = [f"{key.removeprefix(_LOSS)} {_loss(value)}" for key, value in row.items() if key.startswith(_LOSS)]
    if named:
        parts.append(f"losses: {', '.join(named)}")
    return parts


def fitted(parts: Sequence[str], width: int) -> str:
    """Return as many of the `parts`, from the first on, as fit in one line of `width` characters."""
    line = ""
    for part in parts:
        longer = f"{line}{GAP}{part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line


def metric_texts(
    metrics: Iterable[Metric], values: Mapping[str, Any], is_best: bool = False, widths: dict[str, int] | None = None
) -> dict[str, str]:
    """Return what an evaluation measured: the kind of weights -> their metrics.

    Args:
        metrics: what was measured.
        values: results by the metrics' names; those of the averaged weights by `ema_` and name. Missing ones are left out.
        is_best: whether to mark the first metric, of the averaged weights if there are any, as the best so far.
        widths: longest values so far, which align the lines of one run; updated.
    """
    metrics, widths = tuple(metrics), {} if widths is None else widths
    found = {"weights": "", "averaged weights": "ema_"}
    lines = {kind: [m for m in metrics if prefix + m.name in values] for kind, prefix in found.items()}
    lines = {kind: shown for kind, shown in lines.items() if shown}
    deciding = list(lines)[-1:]
    texts = {}
    for kind, shown in lines.items():
        parts = []
        for metric in shown:
            text = metric.text(values[found[kind] + metric.name])
            widths[metric.name] = max(widths.get(metric.name, 0), len(text))
            mark = " (best so far)" if is_best and [kind] == deciding and metric is metrics[0] else ""
            parts.append(f"{metric.label} {text:>{widths[metric.name]}}{mark}")
        texts[kind] = GAP.join(parts)
    return texts


def _loss(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 or math.isnan(value) else f"{value:.2e}"


def _data_share(row: Mapping[str, Any]) -> float:
    """Return the share of the time that was spent waiting for data."""
    return row["data_seconds"] / max(row["data_seconds"] + row["step_seconds"], 1e-12)
