"""Section on speed: every form of the network on this machine, beside PyTorch's own convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from widekernel import ops
from widekernel.bench.devices import accelerator
from widekernel.bench.timing import Stopwatch, WallClock, first_calls, interleave
from widekernel.bench.variants import (
    ACCELERATED,
    FOLDED,
    FUSED,
    INFER,
    OURS,
    PYTORCH,
    PYTORCH_FOLDED,
    Variant,
    build_variants,
)
from widekernel.errors import WidekernelError, in_short
from widekernel.ops.explanation import explain_problem
from widekernel.ops.reference import relative_error
from widekernel.report.conversion import quietly, random_images
from widekernel.report.parts import Missing, Progress, ReportOptions
from widekernel.report.subject import Subject
from widekernel.tasks.assembly import choose_device

_DISTURBED = 0.25
"""Relative spread of the times from which a machine counts as busy."""
_LABELS = {
    PYTORCH: "PyTorch convolutions",
    PYTORCH_FOLDED: "folded, PyTorch convolutions",
    OURS: "training form",
    FOLDED: "folded",
    ACCELERATED: "folded and accelerated",
    FUSED: "folded, accelerated and fused",
}
_OF_OTHERS = {PYTORCH: "as it is", FOLDED: "folded", ACCELERATED: "accelerated", FUSED: "accelerated and fused"}
_OF_FOLDED = {PYTORCH: "PyTorch convolutions", OURS: "folded", ACCELERATED: _LABELS[ACCELERATED], FUSED: _LABELS[FUSED]}


@dataclass(frozen=True)
class FormSpeed:
    """The time of one form of the network for one batch size.

    Attributes:
        form: which form, such as "folded".
        layout: memory layout of the images, NCHW or NHWC.
        batch: images per call.
        milliseconds: median time of a call.
        fastest: shortest time of a call, in milliseconds; other programs only ever make calls slower.
        spread: half the interquartile range of the times, relative to the median.
        calls: number of timed calls.
        images_per_second: images of the batch divided by the shortest time.
        backends: calls of our operator in one forward pass, by the backend that computed them; {} for other layers.
        difference: largest difference of the outputs from those of PyTorch's convolutions, relative to the largest output.
        is_ours: whether it is a form to deploy, and not the baseline of PyTorch.
    """

    form: str
    layout: str
    batch: int
    milliseconds: float
    fastest: float
    spread: float
    calls: int
    images_per_second: float
    backends: dict[str, int]
    difference: float
    is_ours: bool


@dataclass(frozen=True)
class Speed:
    """Times on this machine.

    Attributes:
        rows: every form for every batch size.
        device: what computed.
        size: (channels, height, width) of the images.
        threads: number of threads of the CPU.
        explanations: why each kind of operator call ran where it did, for the folded network and the smallest batch.
    """

    rows: tuple[FormSpeed, ...]
    device: str
    size: tuple[int, int, int]
    threads: int
    explanations: tuple[tuple[str, str, str, tuple[str, ...]], ...]

    def best(self, batch: int, ours: bool = True) -> FormSpeed | None:
        """Return the fastest form for a batch size: ours, or of PyTorch's convolutions."""
        found = [row for row in self.rows if row.batch == batch and row.is_ours == ours]
        return min(found, key=lambda row: row.fastest, default=None)

    @property
    def is_disturbed(self) -> bool:
        """Whether times vary so much that other programs must have been running."""
        return any(row.spread > _DISTURBED for row in self.rows)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that were timed."""
        return tuple(sorted({row.batch for row in self.rows}))


def speed(subject: Subject, options: ReportOptions, progress: Progress) -> Speed | Missing:
    """Time the network in all its forms."""
    if not options.time:
        return Missing("Timing was turned off.", "Leave out `--time false`.")
    device = choose_device(options.device)
    rows: list[FormSpeed] = []
    explanations: tuple[tuple[str, str, str, tuple[str, ...]], ...] = ()
    model = subject.model.to(device)
    try:
        for batch in sorted(set(options.batch_sizes)):
            what = f"speed, {batch} image{'' if batch == 1 else 's'} per call"
            progress(f"{what}: building all forms", 0, 0)
            images = random_images(subject, batch, options).to(device)
            with quietly():
                variants = build_variants(model, INFER, images, compiled=False)
            rows += _timed(subject, variants, options, _stopwatch(device), partial(progress, what))
            if not explanations:
                explanations = _explanations(variants)
    except (WidekernelError, RuntimeError, AssertionError) as error:
        # Networks of other libraries raise anything for an input size that they do not take.
        return Missing(f"It cannot be timed: {in_short(error)}", "Try another input size: `--input_size PIXELS`.")
    finally:
        subject.model.cpu()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Speed(tuple(rows), name, subject.input_size(options.input_size), torch.get_num_threads(), explanations)


def _stopwatch(device: torch.device) -> Stopwatch:
    found = accelerator(str(device))
    return WallClock() if found is None else found.stopwatch


def _timed(
    subject: Subject,
    variants: list[Variant],
    options: ReportOptions,
    stopwatch: Stopwatch,
    progress: Callable[[int, int], None],
) -> list[FormSpeed]:
    def call_of(variant: Variant) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.inference_mode():
                return variant.forward(variant.images)

        return call

    calls = {variant.name: call_of(variant) for variant in variants}
    outputs: dict[str, Tensor] = {}
    first: dict[str, float] = {}
    for number, (name, call) in enumerate(calls.items()):
        progress(number, len(calls) + 1)
        output, seconds = first_calls({name: call}, stopwatch)
        outputs |= output
        first |= seconds
    progress(len(calls), len(calls) + 1)
    timings = interleave(calls, first, options.seconds, stopwatch=stopwatch)
    expected = outputs[variants[0].name]
    rows = []
    for variant in variants:
        timing, batch = timings[variant.name], len(variant.images)
        with ops.trace() as traced, torch.inference_mode():
            variant.forward(variant.images)
        rows.append(
            FormSpeed(
                form=_label(subject, variant.kind),
                layout=variant.layout,
                batch=batch,
                milliseconds=1e3 * timing.median,
                fastest=1e3 * min(timing.seconds),
                spread=timing.spread,
                calls=timing.calls,
                images_per_second=batch / min(timing.seconds),
                backends=dict(Counter(traced.backends()).most_common()),
                difference=relative_error(outputs[variant.name].float(), expected.float()),
                is_ours=variant.kind not in (PYTORCH, PYTORCH_FOLDED),
            )
        )
    return rows


def _label(subject: Subject, kind: str) -> str:
    labels = _OF_FOLDED if subject.is_folded else _LABELS if subject.is_ours else _OF_OTHERS
    return labels.get(kind, kind)


def _explanations(variants: list[Variant]) -> tuple[tuple[str, str, str, tuple[str, ...]], ...]:
    """Return problem, backend, details and reasons against the others, for each kind of call of the folded network."""
    ours = [variant for variant in variants if variant.kind in (FOLDED, OURS)]
    if not ours:
        return ()
    chosen = next((variant for variant in ours if variant.kind == FOLDED), ours[0])
    with ops.trace() as traced, torch.inference_mode():
        chosen.forward(chosen.images)
    found = []
    for problem in dict.fromkeys(problem for _, problem in traced.calls):
        explained = explain_problem(problem)
        reasons = tuple(f"{name}: {'; '.join(why)}" for name, why in explained.reasons.items())
        found.append((str(problem), explained.backend, explained.details, reasons))
    return tuple(found)
