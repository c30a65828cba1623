"""The problems that `widekernel tune` tunes: those that occur in networks, or the passes of one convolution."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from widekernel import ops
from widekernel.ops.backends.base import Backend, Operator
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    LAYOUTS,
    Problem,
    memory_format,
    mirror,
)

if TYPE_CHECKING:
    from widekernel.bench import Case
    from widekernel.bench.precision import Precision

TRAIN, INFER = MODES = ("train", "infer")
_FEW = 2
"""Number of images that a network is run on; batch norm needs more than one."""


@dataclass(frozen=True)
class Runs:
    """The settings in which networks are run.

    Attributes:
        batch: images per call.
        modes: some of `MODES`.
        precisions: precisions in which the networks compute, the 16-bit ones by autocast.
        layouts: layouts of the images, keys of `LAYOUTS`.
    """

    batch: int
    modes: Sequence[str]
    precisions: Sequence[Precision]
    layouts: Sequence[str]


def problems_of_network(model: nn.Module, size: int, runs: Runs, device: torch.device) -> Counter[Problem]:
    """Run a network and count the problems that our kernels can compute: forward and backward in training, folded otherwise.

    Nothing is convolved: a backend in front of all others records the problems and returns zeros. So a few images suffice,
    and existing tables have no influence. A network without any of our operators is accelerated first.

    Args:
        model: the network to run; it is modified.
        size: height and width of the images.
        runs: the settings of the runs.
        device: the device to run it on.
    """
    from widekernel.transforms.acceleration import accelerate

    model = model.to(device)
    found = _counted(model, size, runs, device)
    if not found:
        found = _counted(accelerate(model, pointwise=False)[0], size, runs, device)
    return found


def problems_of_case(case: Case, runs: Runs, device: torch.device) -> Counter[Problem]:
    """Return the three passes of a convolution in every precision and layout."""
    anchor = (case.kernel[0] // 2, case.kernel[1] // 2)
    passes = ((DEPTHWISE_SUM, anchor), (DEPTHWISE_SUM, mirror(case.kernel, anchor)), (DEPTHWISE_WEIGHT_GRAD, anchor))
    found: Counter[Problem] = Counter()
    for precision in runs.precisions:
        for layout in runs.layouts:
            for op, at in passes:
                is_last = layout == "NHWC"
                tf32 = precision.matmul == "high" and device.type == "cuda"
                rect = (case.kernel,), (at,), is_last, None, tf32, (case.dilation,)
                found[Problem(op, device.type, precision.dtype, case.shape, *rect)] += 1
    return found


class _RecordingBackend(Backend):
    """A backend that returns zeros, so that a trace records the problems of a network without computing them."""

    name = "recording for widekernel tune"
    operators = TritonBackend.operators

    def reasons_against(self, problem: Problem) -> list[str]:
        can_run = 0 not in problem.shape and TritonBackend().can_run(problem)
        return [] if can_run else ["our GPU kernels cannot compute it"]

    def prepare(self, problem: Problem) -> Operator:
        return _ZEROS[problem.op]


def _zeros(x: Tensor, *others: Any) -> Tensor:
    return torch.zeros_like(x, memory_format=memory_format(x))


_ZEROS: dict[str, Operator] = {
    DEPTHWISE_SUM: _zeros,
    DEPTHWISE_WEIGHT_GRAD: lambda x, grad, kernel_size, anchor: x.new_zeros(x.shape[1], 1, *kernel_size),
    DEPTHWISE_BRANCHES: lambda x, kernels, anchors: [_zeros(x) for _ in kernels],
    DEPTHWISE_SUM_OF_BRANCHES: lambda xs, kernels, anchors: _zeros(xs[0]),
}


def _counted(model: nn.Module, size: int, runs: Runs, device: torch.device) -> Counter[Problem]:
    from widekernel.bench.precision import in_force
    from widekernel.tasks.image_channels import input_channels

    channels = input_channels(model)
    recording = _RecordingBackend()
    ops.register(recording)
    try:
        with ops.trace() as ran:
            for layout in runs.layouts:
                images = torch.zeros(_FEW, channels, size, size, device=device).contiguous(memory_format=LAYOUTS[layout])
                stored = model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
                for mode in runs.modes:
                    for precision in runs.precisions:
                        with in_force(precision, search=False), precision.autocasting(device):
                            _run(stored, mode, images)
    finally:
        ops.unregister(recording.name)
    found: Counter[Problem] = Counter()
    for name, problem in ran.calls:
        if name == recording.name:
            # If a network makes several images from one, their number is proportional to the batch.
            found[replace(problem, shape=(problem.shape[0] * runs.batch // _FEW, *problem.shape[1:]))] += 1
    return found


def _run(model: nn.Module, mode: str, images: Tensor) -> None:
    """Run a network as in training, or folded, as in inference."""
    from widekernel.transforms.fold import fold

    if mode == TRAIN:
        model.train()(images).float().sum().backward()
        model.zero_grad()
        return
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # about layers that cannot be folded
        fold(model)(images)
