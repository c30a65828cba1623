"""Section on accuracy: overall, by class, and which classes are taken for which."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from widekernel.data import EvaluationLoader, EvaluationSamples, ImageSource, LabeledImages, LoaderOptions, OnImage, Shard
from widekernel.data.formats import printable
from widekernel.engine.reporter import SilentReporter
from widekernel.errors import DataError
from widekernel.report.images import Images, Subset
from widekernel.report.parts import Missing, Progress, ReportOptions
from widekernel.report.subject import Subject
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.classification.class_mapping import class_mapping, mapping_note
from widekernel.tasks.classification.evaluation import Accuracy, EvaluationOptions, evaluate
from widekernel.tasks.image_channels import input_channels, match_channels

FULL_MATRIX = 20
"""Largest number of classes of which the whole confusion matrix is shown."""
_CONFUSIONS = 20


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy on the images of one class.

    Attributes:
        name: the class.
        images: number of its images.
        right: number of those that were recognized.
        taken_for: the class that they are most often taken for instead; "" if they never are.
        taken: how often.
    """

    name: str
    images: int
    right: int
    taken_for: str
    taken: int

    @property
    def share(self) -> float:
        """Share of its images that were recognized."""
        return self.right / self.images


@dataclass(frozen=True)
class Measured:
    """Accuracy on held-out images.

    Attributes:
        place: where the images are.
        images: number of images that were evaluated.
        available: number of images that there are.
        unreadable: number of those that could not be read.
        top1: in percent.
        top5: in percent.
        loss: mean cross-entropy.
        classes: accuracy by class, in the order of the classes.
        confusions: (class, taken for, how often, share of the class's images), the most frequent first.
        matrix: images by true class (row) and predicted class (column); () for many classes.
        names: the classes of the matrix.
        recorded: top-1 that the run recorded at its end for the same weights, in percent; None if unknown.
        note: how the classes were matched to the outputs; "" if there was nothing to decide.
    """

    place: str
    images: int
    available: int
    unreadable: int
    top1: float
    top5: float
    loss: float
    classes: tuple[ClassAccuracy, ...]
    confusions: tuple[tuple[str, str, int, float], ...]
    matrix: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    recorded: float | None
    note: str

    @property
    def worst(self) -> tuple[ClassAccuracy, ...]:
        """The classes that are recognized least often, the worst first."""
        return tuple(sorted(self.classes, key=lambda each: (each.share, each.name)))


def measured(subject: Subject, images: Images, options: ReportOptions, progress: Progress) -> Measured | Missing:
    """Evaluate the network on held-out images.

    Raises:
        DataError: no image can be read.
    """
    if isinstance(images.labeled, Missing):
        return images.labeled
    source = _chosen(images.labeled, options)
    try:
        order = class_mapping(subject.saved, source.class_names)
    except DataError as error:
        return Missing(
            f"The classes of the images are not those of the network: {error}", "Give other images: `--data DIR`."
        )
    pairs: Counter[tuple[int, int]] = Counter()

    def observe(logits: Tensor, targets: Tensor) -> None:
        pairs.update(zip(targets.tolist(), logits.argmax(1).tolist(), strict=True))

    preprocessing = subject.saved.preprocessing
    transform = match_channels(preprocessing.eval_transform(), input_channels(subject.model))
    device = choose_device(options.device)
    config = images.config
    loading = LoaderOptions.configured(config, pin_memory=device.type == "cuda", notify=lambda text: None)
    samples = EvaluationSamples(source, OnImage(transform), LabeledImages.collate)
    loader = EvaluationLoader(samples, options.batch_size, loading, Shard())
    how = EvaluationOptions(device, config.max_unreadable, reporter=_Reporter(progress))
    try:
        result = evaluate(subject.model.to(device), loader, how, Accuracy(order, observe))
    finally:
        subject.model.cpu()
    assert result is not None, "nothing stops this evaluation"
    outputs = order or tuple(range(len(source.class_names)))
    names = dict(zip(outputs, source.class_names, strict=True))
    for output, name in enumerate(subject.saved.class_names):
        names.setdefault(output, name)
    return Measured(
        place=printable(images.place),
        images=result.images,
        available=len(images),
        unreadable=result.unreadable,
        top1=result.top1,
        top5=result.top5,
        loss=result.loss,
        classes=_by_class(pairs, outputs, names),
        confusions=_confusions(pairs, names),
        matrix=_matrix(pairs, outputs, len(names)),
        names=tuple(_name(names, output) for output in outputs),
        recorded=_recorded(subject) if images.of_the_run and len(source) == len(images) else None,
        note=mapping_note(subject.saved, source.class_names),
    )


def _chosen(source: ImageSource, options: ReportOptions) -> ImageSource:
    """Return the source, or a random part of it if it is larger than wanted."""
    if len(source) <= options.eval_images:
        return source
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(source), generator=generator)[: options.eval_images]
    return Subset(source, sorted(order.tolist()))


def _recorded(subject: Subject) -> float | None:
    value = subject.summary.get("ema_val_top1" if subject.weights == "ema" else "val_top1")
    return float(value) if isinstance(value, (int, float)) else None


def _name(names: dict[int, str], output: int) -> str:
    return printable(names.get(output, f"output {output}"))


def _by_class(pairs: Counter[tuple[int, int]], outputs: tuple[int, ...], names: dict[int, str]) -> tuple[ClassAccuracy, ...]:
    rows: dict[int, Counter[int]] = {}
    for (target, predicted), count in pairs.items():
        rows.setdefault(target, Counter())[predicted] += count
    found = []
    for output in outputs:
        row = rows.get(output)
        if row is None:
            continue
        wrong = Counter({predicted: count for predicted, count in row.items() if predicted != output})
        often = min(wrong, key=lambda predicted: (-wrong[predicted], predicted), default=None)
        taken_for = "" if often is None else _name(names, often)
        taken = 0 if often is None else wrong[often]
        found.append(ClassAccuracy(_name(names, output), row.total(), row[output], taken_for, taken))
    return tuple(found)


def _confusions(pairs: Counter[tuple[int, int]], names: dict[int, str]) -> tuple[tuple[str, str, int, float], ...]:
    totals: Counter[int] = Counter()
    for (target, _), count in pairs.items():
        totals[target] += count
    wrong = sorted((-count, pair) for pair, count in pairs.items() if pair[0] != pair[1])[:_CONFUSIONS]
    return tuple((_name(names, t), _name(names, p), -count, -count / totals[t]) for count, (t, p) in wrong)


def _matrix(pairs: Counter[tuple[int, int]], outputs: tuple[int, ...], known: int) -> tuple[tuple[int, ...], ...]:
    if len(outputs) > FULL_MATRIX or known > len(outputs):
        return ()
    return tuple(tuple(pairs[target, predicted] for predicted in outputs) for target in outputs)


class _Reporter(SilentReporter):
    """Reporter of an evaluation that only shows how far it is."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self._total = progress, 0, 0

    @override
    def start_evaluation(self, batches: int, name: str) -> None:
        self._total = batches
        self._progress("accuracy", 0, batches)

    @override
    def evaluated(self, batches: int) -> None:
        self._done += batches
        self._progress("accuracy", self._done, self._total)
