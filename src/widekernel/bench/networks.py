"""Whole networks: a training step and inference, ours against the same network on PyTorch's convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.bench.agreement import check_rivals
from widekernel.bench.baselines import (
    INFER,
    MODES,
    PYTORCH,
    Conditions,
    Rival,
    build_rivals,
    with_visible_blocks,
)
from widekernel.bench.depthwise_share import depthwise_share
from widekernel.bench.errors import BenchmarkError
from widekernel.bench.timing import Timing, first_calls, interleave
from widekernel.tasks.channels import input_channels

# Seconds of one call beyond which there is one more, and none.
_PATIENCE = 10.0, 60.0
_LEARNING_RATE = 1e-6  # steps are timed, not taken: the numbers must not run away


@dataclass(frozen=True)
class NetworkRow:
    """One rival in one mode and layout; times in milliseconds.

    Attributes:
        model: its name.
        mode: `train` (forward, loss, backward, step of SGD) or `infer`.
        batch: images in a call.
        size: their height and width.
        rival: what runs.
        layout: of images and weights.
        compiled: whether by `torch.compile`.
        ms: median.
        spread: half the distance between the quartiles, relative to the median.
        calls: that count.
        times_nhwc: how many times faster it is than the network on PyTorch's convolutions with channels_last.
        times_default: how many times faster it is than that in PyTorch's default layout.
        images_per_second: at the median.
        depthwise_share: of the time, in depthwise convolutions; None if compiled, where the profiler cannot tell.
    """

    model: str
    mode: str
    batch: int
    size: int
    rival: str
    layout: str
    compiled: bool
    ms: float
    spread: float
    calls: int
    times_nhwc: float
    times_default: float
    images_per_second: float
    depthwise_share: float | None


def measure_network(
    name: str,
    model: nn.Module,
    *,
    batch: int,
    size: int,
    modes: Sequence[str] = MODES,
    compiled: bool = False,
    seconds: float = 3.0,
    rounds: int | None = None,
) -> Iterator[NetworkRow]:
    """Time a network, all rivals in turns.

    Args:
        name: for the table.
        model: takes (N, C, size, size) and gives (N, classes); left as it is.
        batch: N.
        size: height and width of the images.
        modes: those to time.
        compiled: whether `torch.compile` takes part.
        seconds: for each rival.
        rounds: calls of each rival, instead.

    Raises:
        BenchmarkError: if rivals give different outputs or gradients, or the network cannot run.
    """
    model = with_visible_blocks(model)
    images, target = examples(name, model, batch, size)
    for mode in modes:
        rivals = build_rivals(model, mode, images, compiled)
        calls = {rival.name: call_of(rival, mode, target) for rival in rivals}
        check_rivals(name, rivals, mode, target)
        timings = interleave(calls, first_calls(calls)[1], seconds, rounds, _PATIENCE)
        for rival in rivals:
            share = None if rival.compiled else depthwise_share(calls[rival.name])
            yield NetworkRow(**row_fields(name, mode, rival, timings, share))


def examples(name: str, model: nn.Module, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Give images (N, C, size, size) and the classes (N) they are trained towards, on the device of the model.

    Raises:
        BenchmarkError: if the network does not run on such images, or is no classifier.
    """
    images = torch.randn(batch, input_channels(model), size, size, generator=torch.Generator().manual_seed(0))
    device = next((parameter.device for parameter in model.parameters()), images.device)
    images = images.to(device)
    return images, torch.arange(batch, device=device) % _classes(name, model, images)


def call_of(rival: Rival, mode: str, target: Tensor, conditions: Conditions = nullcontext) -> Callable[[], None]:
    """Give what is timed: inference, or a step of training."""
    forward, x = rival.forward, rival.images
    if mode == INFER:

        def infer() -> None:
            with torch.inference_mode(), conditions():
                forward(x)

        return infer
    optimizer = torch.optim.SGD(rival.network.parameters(), lr=_LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        with conditions():
            loss = F.cross_entropy(forward(x), target)
        loss.backward()
        optimizer.step()

    return step


def _classes(name: str, model: nn.Module, images: Tensor) -> int:
    """Run one image, which is also how one learns that the network does not take this size."""
    try:
        with torch.inference_mode():
            output = copy.deepcopy(model).eval()(images[:1])
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = tuple(images.shape[1:])
        raise BenchmarkError(f"{name} does not run on images of {shape}: {error}. Give another size.") from error
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise BenchmarkError(f"{name} gives no table (N, classes) but {type(output).__name__}: only classifiers are timed.")
    return output.shape[1]


def row_fields(name: str, mode: str, rival: Rival, timings: Mapping[str, Timing], share: float | None) -> dict[str, Any]:
    """Give the fields of a `NetworkRow`; of rivals without a timing the times are NaN."""
    failed = Timing(())
    timing = timings.get(rival.name, failed)
    batch, size = rival.images.shape[0], rival.images.shape[2]
    return {
        "model": name,
        "mode": mode,
        "batch": batch,
        "size": size,
        "rival": rival.rival,
        "layout": rival.layout,
        "compiled": rival.compiled,
        "ms": 1e3 * timing.median,
        "spread": timing.spread,
        "calls": timing.calls,
        "times_nhwc": timings.get(f"{PYTORCH} NHWC", failed).median / timing.median,
        "times_default": timings.get(f"{PYTORCH} NCHW", failed).median / timing.median,
        "images_per_second": batch / timing.median,
        "depthwise_share": share,
    }
