"""Two processes with two images each train a detector like one with four, up to the rounding of double precision.

In single precision, rounding grows: ten steps of AdamW, which divides by the roots of tiny numbers, make of it a part in a
thousand of the losses. In double precision, a dependence on the division of a batch cannot hide behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tests.data.scenes import make_scene
from tests.dense.detection.shapes import CLASSES, nothing, small_options, targets_of
from torch import Tensor, nn

from widekernel.data import Batch
from widekernel.data.detection.batches import DetectionCollate, DetectionItem
from widekernel.dense.backbone import build_pyramid
from widekernel.dense.detection.fcos import Fcos, FcosOptions
from widekernel.dense.detection.sampling import SampleOptions
from widekernel.dense.detection.structures import ImageSize, Targets
from widekernel.dense.detection.two_stage import CascadeRCNN, MaskRCNN
from widekernel.engine.processes import Processes
from widekernel.engine.synced_norms import SyncedBatchNorm, convert_batch_norms
from widekernel.engine.task import Position
from widekernel.tasks.detection.task import Detection

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch has no gloo here"),
]
SIZES = ((30, 44), (32, 40), (40, 64), (64, 28))
"""Heights and widths of the images. The first two alone would be padded to 32 x 64, all four are to 64 x 64."""


class Case(NamedTuple):
    """A training.

    Args:
        kind: the detector
        optimizer: its optimizer
        empty: numbers of the images without objects
        steps: number of steps
    """

    kind: str
    optimizer: str
    empty: tuple[int, ...] = (1,)
    steps: int = 10


CASES = [
    *(Case(kind, optimizer) for kind in ("fcos", "cascade", "mask") for optimizer in ("sgd", "adamw")),
    *(Case(kind, "sgd", empty, 2) for kind in ("fcos", "mask") for empty in ((0, 1), (0, 1, 2, 3))),
]


@dataclass(frozen=True)
class Pair(Processes):
    """The exchanges of two processes that the norms and losses need."""

    world_size: int = 2

    def sum(self, values: Tensor) -> Tensor:
        return self._reduced(values, dist.ReduceOp.SUM)

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / 2

    def largest(self, values: Tensor) -> Tensor:
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Tensor, operation: object) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, operation)
        return total


class Trained(NamedTuple):
    """The losses of each step by name, and the state of the network at the end."""

    losses: list[dict[str, Tensor]]
    state: dict[str, Tensor]


def items(empty: tuple[int, ...]) -> Iterator[DetectionItem]:
    for number, (height, width) in enumerate(SIZES):
        scene = make_scene(number)
        rows, columns = scene.labels.shape
        pixels = torch.from_numpy(scene.image).permute(2, 0, 1).unsqueeze(0).double() / 64 - 2
        image = F.interpolate(pixels, (height, width), mode="bilinear").squeeze(0)
        boxes, labels, masks = targets_of(scene, rows, columns)
        boxes = boxes * torch.tensor([width / columns, height / rows] * 2)
        targets = Targets(boxes, labels, F.interpolate(masks.unsqueeze(0), (height, width)).squeeze(0))
        yield DetectionItem(image, ImageSize(height, width), nothing(targets) if number in empty else targets)


def detector(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "fcos":
        options = FcosOptions(CLASSES, 32, (8, 16, 32), (16.0, 32.0))
        return Fcos(build_pyramid("test_convnext", {}, (1, 2)), options).double().train()
    options = small_options(kind)
    options = replace(options, channels=16, roi=replace(options.roi, sample=SampleOptions(24, 0.25), fc_channels=16))
    backbone = build_pyramid("test_convnext", {}, 4)
    return (CascadeRCNN if kind == "cascade" else MaskRCNN)(backbone, options).double().train()


def train(case: Case, part: slice, processes: Processes) -> Trained:
    """Train on a part of the batch."""
    network = convert_batch_norms(detector(case.kind), processes)
    if case.kind == "cascade" and processes.world_size > 1:
        assert sum(isinstance(module, SyncedBatchNorm) for module in network.modules()) == 12
    task = Detection(None, case.kind != "fcos", processes)
    task.prepare(network, 0)
    parameters = list(network.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, 1e-3)
    if case.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9)
    own = list(items(case.empty))[part]
    batch = Batch(DetectionCollate(32)(own), len(own))
    history = []
    for step in range(case.steps):
        losses = task.loss(network, batch, Position(0, step, part.start))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for parameter in parameters:
            parameter.grad = processes.mean(parameter.grad)
        # Of an image's padding, the first norm makes large gradients.
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append({name: processes.mean(loss.detach()) for name, loss in losses.items()})
    return Trained(history, network.state_dict())


def _run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        for number, case in enumerate(CASES):
            torch.save(tuple(train(case, slice(2 * rank, 2 * rank + 2), Pair(rank))), folder / f"{number}-{rank}.pth")
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    both = mp.spawn(_run, args=(tmp_path,), nprocs=2, join=False)
    alone = [train(case, slice(0, len(SIZES)), Processes()) for case in CASES]
    while not both.join():
        pass
    for number, (case, whole) in enumerate(zip(CASES, alone)):
        first, second = (Trained(*torch.load(tmp_path / f"{number}-{rank}.pth", weights_only=True)) for rank in range(2))
        start = detector(case.kind).state_dict()
        assert max((whole.state[key] - start[key]).abs().max() for key in start if "num_batches" not in key) > 1e-4
        for step, (losses, wanted) in enumerate(zip(first.losses, whole.losses, strict=True)):
            torch.testing.assert_close(losses, wanted, rtol=1e-9, atol=1e-12, msg=f"{case}, step {step}: {losses} {wanted}")
        for key, value in whole.state.items():
            torch.testing.assert_close(first.state[key], second.state[key], rtol=0, atol=0, msg=f"{case}: {key}")
            torch.testing.assert_close(first.state[key], value, rtol=1e-9, atol=1e-9, msg=f"{case}: {key}")
