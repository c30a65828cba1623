"""Section that compares the network with another one: side by side, and by what their stages compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from widekernel.analysis.similarity import FEWEST_IMAGES, Similarity, cka
from widekernel.errors import WidekernelError
from widekernel.report.accuracy import Measured
from widekernel.report.costs import Costs
from widekernel.report.identity import Identity
from widekernel.report.images import Images
from widekernel.report.masks import Masks
from widekernel.report.parts import Missing, Progress, ReportOptions
from widekernel.report.receptive_field import ReceptiveField
from widekernel.report.speed import Speed
from widekernel.report.subject import Subject
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.image_channels import input_channels, match_channels

_BATCH = 32


@dataclass(frozen=True)
class Compared:
    """The sections of a report that are compared.

    Attributes:
        label: short name of the network.
    """

    label: str
    identity: Identity
    accuracy: Measured | Missing
    field: ReceptiveField | Missing
    masks: Masks | Missing
    costs: Costs | Missing
    speed: Speed | Missing


@dataclass(frozen=True)
class CompareRow:
    """One figure of both networks.

    Attributes:
        label: what it is.
        first: that of the network of the report, as text; "–" if it is unknown.
        second: that of the other one.
        better: which one is better: 1, 2, or 0 if neither is or it is not a matter of better.
    """

    label: str
    first: str
    second: str
    better: int = 0


@dataclass(frozen=True)
class Comparison:
    """Two networks side by side.

    Attributes:
        first: name of the network of the report.
        second: name of the other one.
        rows: their figures.
        same_images: whether the accuracies were measured on the same images.
        similarity: centered kernel alignment between their stages.
    """

    first: str
    second: str
    rows: tuple[CompareRow, ...]
    same_images: bool
    similarity: Similarity | Missing


def comparison(first: Compared, second: Compared, similarity: Similarity | Missing) -> Comparison:
    """Put the sections of two reports side by side."""
    pair = first, second
    rows = [
        CompareRow("Model", first.identity.name, second.identity.name),
        CompareRow("Form", first.identity.form, second.identity.form),
        *_of_accuracy(pair),
        *_of_costs(pair),
        _row("Zeros among masked weights", [_sparsity(report) for report in pair], "{:.1f} %", 0),
        *_of_fields(pair),
        *_of_speed(pair),
    ]
    places = [report.accuracy.place if isinstance(report.accuracy, Measured) else None for report in pair]
    same = places[0] is not None and places[0] == places[1]
    return Comparison(first.label, second.label, tuple(rows), same, similarity)


def _row(label: str, values: list[float | None], form: str, direction: int) -> CompareRow:
    """Return a row of numbers; `direction` is 1 if larger is better, -1 if smaller is, else 0."""
    texts = ["–" if value is None else form.format(value) for value in values]
    a, b = values
    better = 0
    if direction and a is not None and b is not None and texts[0] != texts[1] and math.isfinite(a) and math.isfinite(b):
        better = 1 if (a - b) * direction > 0 else 2
    return CompareRow(label, texts[0], texts[1], better)


def _of_accuracy(pair: tuple[Compared, Compared]) -> list[CompareRow]:
    found = [report.accuracy if isinstance(report.accuracy, Measured) else None for report in pair]
    return [
        _row("Top-1 accuracy", [None if each is None else each.top1 for each in found], "{:.2f} %", 1),
        _row("Top-5 accuracy", [None if each is None else each.top5 for each in found], "{:.2f} %", 1),
        _row("Loss", [None if each is None else each.loss for each in found], "{:.4f}", -1),
    ]


def _of_costs(pair: tuple[Compared, Compared]) -> list[CompareRow]:
    found = [report.costs.counted if isinstance(report.costs, Costs) else None for report in pair]
    rows = []
    for name in ("dense", "non-zero", "folded", "realized"):
        columns = [None if each is None else each.columns()[name] for each in found]
        rows.append(_large(f"Parameters, {name}", [None if each is None else float(each.params) for each in columns]))
        rows.append(
            _large(f"Multiply-accumulates, {name}", [None if each is None else float(each.macs) for each in columns])
        )
    return rows


def _large(label: str, values: list[float | None]) -> CompareRow:
    """Return a row of large numbers, of which the smaller one is better."""
    largest = max((value for value in values if value is not None), default=0.0)
    unit, letter = (1e9, "G") if largest >= 1e8 and "accumulates" in label else (1e6, "M")
    return _row(label, [None if value is None else value / unit for value in values], f"{{:.4g}} {letter}", -1)


def _sparsity(report: Compared) -> float | None:
    return 100 * report.masks.sparsity if isinstance(report.masks, Masks) else None


def _of_fields(pair: tuple[Compared, Compared]) -> list[CompareRow]:
    found = [report.field if isinstance(report.field, ReceptiveField) else None for report in pair]
    rows = []
    for share in next((field.areas for field in found if field is not None), {}):
        areas = [None if field is None else field.areas[share] for field in found]
        ratios = [None if area is None else 100 * area.ratio for area in areas]
        rows.append(_row(f"Receptive field: area with {100 * share:g} % of the scores", ratios, "{:.1f} %", 0))
    return rows


def _of_speed(pair: tuple[Compared, Compared]) -> list[CompareRow]:
    found = [report.speed if isinstance(report.speed, Speed) else None for report in pair]
    rows = []
    for batch in next((each.batches for each in found if each is not None), ()):
        best = [None if each is None else each.best(batch) for each in found]
        times = [None if row is None else row.fastest for row in best]
        rows.append(_row(f"Fastest form, {batch} image{'s' if batch > 1 else ''} per call", times, "{:.2f} ms", -1))
    return rows


def similarity(
    first: Subject, second: Subject, images: Images, options: ReportOptions, progress: Progress
) -> Similarity | Missing:
    """Compare what the stages of two networks compute on the same images."""
    count = min(options.cka_images, len(images))
    if count < FEWEST_IMAGES:
        return Missing(
            f"Centered kernel alignment needs at least {FEWEST_IMAGES} images, and {len(images)} are known.",
            "Give a folder or a .tar archive of images: `--data DIR`.",
        )
    device, done = choose_device(options.device), 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        progress("similarity of the stages", done, count)

    progress("similarity of the stages", 0, count)
    try:
        batches = _batches(first, second, images, count, options.seed)
        return cka(first.model.to(device), second.model.to(device), batches, advance)
    except WidekernelError as error:
        return Missing(f"The stages cannot be compared: {error}", "Compare networks of widekernel or timm.")
    finally:
        first.model.cpu()
        second.model.cpu()


def _batches(first: Subject, second: Subject, images: Images, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same images as both networks take them; a last batch that is too small is left out."""
    transforms = [
        match_channels(subject.saved.preprocessing.eval_transform(), input_channels(subject.model))
        for subject in (first, second)
    ]
    waiting: list[tuple[Tensor, Tensor]] = []
    for image in images.draw(count, seed):
        waiting.append((transforms[0](image), transforms[1](image)))
        if len(waiting) == _BATCH:
            yield torch.stack([pair[0] for pair in waiting]), torch.stack([pair[1] for pair in waiting])
            waiting.clear()
    if len(waiting) >= FEWEST_IMAGES:
        yield torch.stack([pair[0] for pair in waiting]), torch.stack([pair[1] for pair in waiting])
