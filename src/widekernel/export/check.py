"""The check of a file: its outputs beside those of PyTorch, and its latency beside that of the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.bench.timing import SETTLING, first_calls, interleave
from widekernel.export.base import ExportError, Run

LATENCY_SECONDS = 1.0
"""Time to spend on each of the two latencies."""


@dataclass(frozen=True)
class Comparison:
    """Outputs of a file beside those of PyTorch on the same images.

    Attributes:
        images: number of images.
        max_difference: largest absolute difference, relative to the largest absolute output of PyTorch.
        agreement: share of the images whose largest output is the same; None for networks without classes.
        accuracy: share of the images that PyTorch and the file classify correctly; None if the classes are not known.
    """

    images: int
    max_difference: float
    agreement: float | None
    accuracy: tuple[float, float] | None = None


def compare(wanted: Tensor, got: Tensor, classes: bool, labels: Tensor | None = None) -> Comparison:
    """Compare outputs (N, K).

    Raises:
        ExportError: the shapes differ, or outputs of the file are not finite.
    """
    if wanted.shape != got.shape:
        raise ExportError(f"Outputs of the file have the shape {tuple(got.shape)} instead of {tuple(wanted.shape)}.")
    if not got.isfinite().all():
        raise ExportError("The file computes numbers that are not finite. Export with full precision.")
    largest = wanted.abs().max().item()
    difference = (got - wanted).abs().max().item()
    relative = difference / largest if largest else (math.inf if difference else 0.0)
    if not classes:
        return Comparison(len(wanted), relative, None)
    ours, theirs = wanted.argmax(1), got.argmax(1)
    accuracy = None
    if labels is not None:
        accuracy = (ours == labels).float().mean().item(), (theirs == labels).float().mean().item()
    return Comparison(len(wanted), relative, (ours == theirs).float().mean().item(), accuracy)


def outputs(run: Run, images: Tensor, batch: int) -> Tensor:
    """Return the outputs for images, which are computed in batches of exactly `batch`."""
    parts = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        full = torch.cat([part, part[-1:].expand(batch - len(part), *part.shape[1:])]) if len(part) < batch else part
        parts.append(run(full.contiguous())[: len(part)])
    return torch.cat(parts)


def network_run(network: nn.Module) -> Run:
    """Return the function that runs a network without gradients."""

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(images).clone()

    return run


def latencies(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Time calls in turn, and return the shortest time of each in milliseconds: other work can only prolong a call."""
    _, first = first_calls(calls)
    timings = interleave(calls, first, seconds, pause=SETTLING)
    return {name: 1e3 * min(timing.seconds) for name, timing in timings.items()}
