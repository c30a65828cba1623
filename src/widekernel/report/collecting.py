"""Collects the data of all sections of a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import widekernel
from widekernel.errors import WidekernelError
from widekernel.report.accuracy import Measured, measured
from widekernel.report.circumstances import Circumstances, circumstances
from widekernel.report.comparison import Compared, Comparison, comparison, similarity
from widekernel.report.conversion import Folding, acceleration, folding
from widekernel.report.costs import Costs, costs
from widekernel.report.identity import Identity, identity
from widekernel.report.images import Images, find_images
from widekernel.report.kernels import Kernels, kernels
from widekernel.report.masks import Masks, masks
from widekernel.report.parts import Missing, Progress, ReportOptions, silent
from widekernel.report.receptive_field import ReceptiveField, receptive_field
from widekernel.report.speed import Speed, speed
from widekernel.report.subject import Subject
from widekernel.report.training import Training, training
from widekernel.transforms.acceleration import AccelerationReport

DataT = TypeVar("DataT")


@dataclass(frozen=True)
class Report:
    """The data of a report: one attribute for each section, which is `Missing` if there are none.

    Attributes:
        label: short name of the network.
        text: what the user named it by.
        version: version of widekernel.
    """

    label: str
    text: str
    version: str
    identity: Identity
    circumstances: Circumstances
    training: Training | Missing
    accuracy: Measured | Missing
    field: ReceptiveField | Missing
    kernels: Kernels | Missing
    masks: Masks | Missing
    costs: Costs | Missing
    speed: Speed | Missing
    folding: Folding | Missing
    acceleration: AccelerationReport | Missing
    comparison: Comparison | Missing


def collect(
    subject: Subject,
    images: Images,
    options: ReportOptions,
    other: Subject | None = None,
    progress: Progress = silent,
) -> Report:
    """Collect everything about a network, and compare it with another one.

    A section that fails with an error for the user is `Missing`, and says why.

    Args:
        subject: the network.
        images: images for accuracy, receptive fields and similarity.
        options: what to measure.
        other: the network to compare with.
        progress: told what is being done.
    """
    report = _sections(subject, images, options, progress)
    if other is None:
        return report
    beside = _sections(other, images, options, lambda what, *place: progress(f"{other.label}: {what}", *place))
    alike = similarity(subject, other, images, options, progress)
    return replace(report, comparison=comparison(_compared(report), _compared(beside), alike))


def _compared(report: Report) -> Compared:
    return Compared(**{field.name: getattr(report, field.name) for field in fields(Compared)})


def _sections(subject: Subject, images: Images, options: ReportOptions, progress: Progress) -> Report:
    def doing(what: str, collected: Callable[[], DataT]) -> DataT | Missing:
        progress(what, 0, 0)
        try:
            return collected()
        except WidekernelError as error:
            return Missing(str(error), "Correct this, and make the report again.")

    progress("model", 0, 0)
    return Report(
        label=subject.label,
        text=subject.text,
        version=widekernel.__version__,
        identity=identity(subject),
        circumstances=circumstances(subject),
        training=doing("training", lambda: training(subject)),
        accuracy=doing("accuracy", lambda: measured(subject, images, options, progress)),
        field=doing("effective receptive field", lambda: receptive_field(subject, images, options, progress)),
        kernels=doing("kernels", lambda: kernels(subject)),
        masks=doing("masks", lambda: masks(subject)),
        costs=doing("complexity", lambda: costs(subject, options)),
        speed=doing("speed", lambda: speed(subject, options, progress)),
        folding=doing("folding", lambda: folding(subject)),
        acceleration=doing("acceleration", lambda: acceleration(subject, options)),
        comparison=Missing("There is no other network to compare with.", "Name one: `--compare OTHER`."),
    )


__all__ = ["Report", "collect", "find_images"]
