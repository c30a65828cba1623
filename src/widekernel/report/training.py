"""Section on the training: the curves of the run, and its results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from widekernel.engine.curves import draw_losses, draw_metrics, metric_groups
from widekernel.engine.metrics import Metric
from widekernel.engine.metrics_log import read_metrics
from widekernel.errors import DataError
from widekernel.figures import new_figure
from widekernel.report.parts import Missing
from widekernel.report.pictures import Drawing, drawing
from widekernel.report.subject import Subject
from widekernel.tasks.classification.evaluation import METRICS


@dataclass(frozen=True)
class Training:
    """The course of a run.

    Attributes:
        metrics: what was measured on held-out data.
        evaluations: (epoch, step, values by key) of each evaluation; averaged weights have keys with the prefix ema_.
        final: value of each metric at the end, by key.
        best: best value of the first metric, and its step; None if nothing was evaluated.
        steps: optimizer steps done.
        epochs: epochs begun.
        final_loss: mean training loss of the last steps that were logged; None if none was.
        images_per_second: median speed of the training; None if it was not logged.
        is_finished: whether the run has ended.
        rows: rows of metrics.jsonl.
    """

    metrics: tuple[Metric, ...]
    evaluations: tuple[tuple[int, int, dict[str, float]], ...]
    final: dict[str, float]
    best: tuple[float, int] | None
    steps: int
    epochs: int
    final_loss: float | None
    images_per_second: float | None
    is_finished: bool
    rows: tuple[dict[str, Any], ...]


def training(subject: Subject) -> Training | Missing:
    """Read the course of the run that trained the network.

    Raises:
        DataError: its metrics are damaged.
    """
    if subject.run is None:
        return Missing(
            "The weights do not come from a run folder, so the course of their training is unknown.",
            "Give the folder of a run: `widekernel report runs/NAME`.",
        )
    try:
        rows = read_metrics(subject.run.metrics)
    except (OSError, ValueError) as error:
        raise DataError(f"{subject.run.metrics} cannot be read: {error}.") from error
    if not rows:
        return Missing(
            "The run has logged nothing yet.", "Train it further: `widekernel train` with the same --output resumes it."
        )
    keys = {key for row in rows for key in row}
    metrics = tuple(metric for metric in METRICS if metric.name in keys or f"ema_{metric.name}" in keys)
    summary = subject.summary
    found = [(int(row.get("epoch", 0)), int(row["step"]), _values(row)) for row in rows]
    evaluations = tuple(each for each in found if each[2])
    best = summary.get("best_top1"), summary.get("best_step")
    return Training(
        metrics=metrics,
        evaluations=evaluations,
        final=_values(summary) or (evaluations[-1][2] if evaluations else {}),
        best=(float(best[0]), int(best[1])) if best[0] is not None and best[1] is not None else None,
        steps=int(rows[-1]["step"]),
        epochs=int(rows[-1].get("epoch", 0)),
        final_loss=next((row["train_loss"] for row in reversed(rows) if "train_loss" in row), None),
        images_per_second=_median([row["images_per_second"] for row in rows if "images_per_second" in row]),
        is_finished=bool(summary),
        rows=tuple(rows),
    )


def curves(course: Training) -> list[Drawing]:
    """Draw the losses, and the held-out metrics of each unit, over optimizer steps."""
    figure = new_figure(5.4, 4.4)
    draw_losses(figure.add_subplot(), course.rows, course.metrics)
    drawings = [drawing(figure, "loss", _losses_in_words(course))]
    for number, group in enumerate(metric_groups(course.metrics)):
        figure = new_figure(5.4, 4.4)
        draw_metrics(figure.add_subplot(), course.rows, group)
        drawings.append(drawing(figure, f"metrics-{number}", _metrics_in_words(course, group)))
    return drawings


def _losses_in_words(course: Training) -> str:
    losses = [row["train_loss"] for row in course.rows if "train_loss" in row]
    course_of = f", which goes from {losses[0]:.3g} to {losses[-1]:.3g}" if losses else ""
    text = f"Line chart of the training loss over {course.steps:,} optimizer steps{course_of}"
    return f"{text}, with the learning rate behind it."


def _metrics_in_words(course: Training, group: Sequence[Metric]) -> str:
    texts = []
    for metric in group:
        values = [row[2].get(f"ema_{metric.name}", row[2].get(metric.name)) for row in course.evaluations]
        known = [value for value in values if value is not None]
        if known:
            texts.append(f"{metric.label} goes from {metric.text(known[0])} to {metric.text(known[-1])}")
    return f"Line chart of held-out metrics over optimizer steps: {'; '.join(texts)}."


def _values(row: dict[str, Any]) -> dict[str, float]:
    names = [f"{prefix}{metric.name}" for metric in METRICS for prefix in ("", "ema_")]
    return {name: float(row[name]) for name in names if isinstance(row.get(name), (int, float))}


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
