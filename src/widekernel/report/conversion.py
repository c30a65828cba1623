"""Section on `fold` and `accelerate`: what they do to each layer, and whether the outputs stay the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.errors import WidekernelError
from widekernel.layers import FoldedLargeKernel, LargeKernel
from widekernel.layers.sources import rects_of
from widekernel.report.parts import Missing, ReportOptions
from widekernel.report.subject import Subject
from widekernel.tasks.assembly import choose_device
from widekernel.tasks.folding import FoldCheck, fold_and_check
from widekernel.transforms.acceleration import AccelerationReport, accelerate
from widekernel.transforms.fold import Foldable, fold


@dataclass(frozen=True)
class FoldedLayer:
    """One large-kernel layer before and after folding.

    Attributes:
        name: name of the layer in the network.
        before: sizes of its branches.
        after: sizes of its rectangles once folded; () if it was not folded.
        taps_before: taps of all branches per channel.
        taps_after: taps of all rectangles per channel.
        reason: why it was not folded; "" if it was.
    """

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    taps_before: int
    taps_after: int
    reason: str = ""


@dataclass(frozen=True)
class Folding:
    """The report on folding.

    Attributes:
        layers: the large-kernel layers.
        check: largest difference of the outputs on random images.
        notes: warnings about layers that were not folded.
        modules_before: number of modules.
        modules_after: number of modules of the folded network.
    """

    layers: tuple[FoldedLayer, ...]
    check: FoldCheck
    notes: tuple[str, ...]
    modules_before: int
    modules_after: int


@contextmanager
def quietly() -> Iterator[list[warnings.WarningMessage]]:
    """Record warnings within the block instead of showing them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def can_fold(model: nn.Module) -> bool:
    """Return whether anything in a network can be folded."""
    return any(isinstance(module, Foldable) and module.foldable() for module in model.modules())


def folded_quietly(subject: Subject) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a folded copy of the network, and the warnings about layers that were not folded."""
    with quietly() as caught:
        result = fold(subject.model)
    return result, tuple(str(warning.message) for warning in caught)


def folding(subject: Subject) -> Folding | Missing:
    """Fold the network, compare the outputs, and describe each large-kernel layer."""
    if subject.is_folded:
        return Missing(
            "The network was loaded in its folded form, so the branches that were folded are unknown.",
            "Report on the training form: give the run folder, or the file that it was folded from.",
        )
    if not can_fold(subject.model):
        return Missing(
            "No layer of the network can be folded.", "Report on a network of this library; `widekernel models` lists them."
        )
    try:
        with quietly() as caught:
            folded, check = fold_and_check(subject.model, subject.input_size()[1])
    except WidekernelError as error:
        return Missing(str(error), "Report the network and the message as a bug.")
    after = dict(folded.named_modules())
    layers = tuple(
        _layer(name, module, after.get(name))
        for name, module in subject.model.named_modules()
        if isinstance(module, LargeKernel)
    )
    counts = (sum(1 for _ in model.modules()) for model in (subject.model, folded))
    return Folding(layers, check, tuple(str(warning.message) for warning in caught), *counts)


def _layer(name: str, before: LargeKernel, after: nn.Module | None) -> FoldedLayer:
    rects = rects_of(before.source) or []
    sizes = tuple(rect.label for rect in rects) or (type(before.source).__name__,)
    taps = sum(rect.size[0] * rect.size[1] for rect in rects)
    if not isinstance(after, FoldedLargeKernel):
        return FoldedLayer(name, sizes, (), taps, taps, "; ".join(before.reasons_against_folding()) or "merged elsewhere")
    kept = after.rects()
    return FoldedLayer(
        name,
        sizes,
        tuple(rect.label for rect in kept),
        taps,
        sum(rect.size[0] * rect.size[1] for rect in kept),
    )


def acceleration(subject: Subject, options: ReportOptions) -> AccelerationReport | Missing:
    """Accelerate a folded copy of the network for one image, and return the report on its layers."""
    if not options.time:
        return Missing("Acceleration is decided by timing, which was turned off.", "Leave out `--time false`.")
    device = choose_device(options.device)
    model = folded_quietly(subject)[0].to(device)
    image = random_images(subject, 1, options).to(device)
    try:
        with torch.no_grad():
            return accelerate(model.eval(), image)[1]
    except WidekernelError as error:
        return Missing(f"The network cannot be accelerated: {error}", "Try another input size: `--input_size PIXELS`.")


def random_images(subject: Subject, count: int, options: ReportOptions) -> Tensor:
    """Return `count` random images (N, C, H, W) for the network."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randn(count, *subject.input_size(options.input_size), generator=generator)
