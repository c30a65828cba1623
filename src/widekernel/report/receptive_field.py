"""Section on the effective receptive field."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from widekernel.analysis.erf import THRESHOLDS, Area, area_ratios, contribution, log_scores
from widekernel.errors import WidekernelError
from widekernel.report.conversion import folded_quietly
from widekernel.report.images import Images
from widekernel.report.parts import Missing, Progress, ReportOptions
from widekernel.report.subject import Subject
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.image_channels import input_channels, match_channels

USUAL_SIZE = 1024
"""Side in pixels of the inputs in the papers."""
_LARGEST, _TIMES = 512, 4


@dataclass(frozen=True)
class ReceptiveField:
    """The effective receptive field of the last feature map.

    Attributes:
        scores: contribution of each pixel (H, W) from 0 to 1, on the logarithmic scale of the papers.
        areas: smallest centered square by the share of the scores that it holds; None if no square does.
        images: number of images over which the contributions were averaged.
        size: height and width of the input in pixels.
        own_size: height and width of the network's own input in pixels.
        place: where the images are.
    """

    scores: np.ndarray
    areas: dict[float, Area | None]
    images: int
    size: int
    own_size: int
    place: str


def receptive_field(
    subject: Subject, images: Images, options: ReportOptions, progress: Progress
) -> ReceptiveField | Missing:
    """Measure the effective receptive field on some of the images."""
    if not len(images):
        return Missing(
            "The effective receptive field is averaged over images, and none are known.",
            "Give a folder or a .tar archive of any images, without classes, too: `--data DIR`.",
        )
    own = subject.input_size()[1]
    size = options.erf_size or max(own, min(_LARGEST, _TIMES * own))
    count = min(options.erf_images, len(images))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("effective receptive field", done, count)

    progress("effective receptive field", 0, count)
    model = folded_quietly(subject)[0].to(choose_device(options.device))
    try:
        found = contribution(model, _inputs(subject, images, count, size, options.seed), advance=advance)
        areas = area_ratios(found.matrix, THRESHOLDS)
    except (WidekernelError, RuntimeError, AssertionError) as error:
        # Networks of other libraries raise anything for an input size that they do not take.
        return Missing(
            f"It cannot be measured with inputs of {size} × {size} pixels: {str(error).splitlines()[0]}",
            f"Try the network's own size: `--erf_size {own}`.",
        )
    return ReceptiveField(log_scores(found.matrix), areas, found.images, size, own, images.place)


def _inputs(subject: Subject, images: Images, count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield images warped to the square, as in the papers."""
    transform = match_channels(subject.saved.preprocessing.warped(size).eval_transform(), input_channels(subject.model))
    for image in images.draw(count, seed):
        yield transform(image)


def in_words(field: ReceptiveField) -> str:
    """Describe the heat map for those who do not see it."""
    parts = [f"{100 * share:g} % of the scores lie in {a.percentage} of the area" for share, a in field.areas.items() if a]
    return f"Heat map of the effective receptive field, brightest at the center: {'; '.join(parts) or 'no centered square'}."
