"""Two processes with two images each train like one process with four."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.dense.detection.shapes import KINDS, batch, nothing, small_detector
from widekernel.engine.processes import Processes
from widekernel.engine.synced_norms import SyncedBatchNorm, convert_batch_norms

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch has no gloo here"),
]
STEPS = 2


@dataclass(frozen=True)
class Pair(Processes):
    """The exchanges of two processes that the norms and losses need."""

    world_size: int = 2

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / 2


def train(kind: str, part: slice, processes: Processes) -> dict[str, Tensor]:
    """Return the parameters after some steps on a part of a batch, in which one image has no objects."""
    detector = convert_batch_norms(small_detector(kind), processes).train()
    if kind == "cascade" and processes.world_size > 1:
        assert sum(isinstance(module, SyncedBatchNorm) for module in detector.modules()) == 12
    detector.mean_over_processes = processes.mean
    images, sizes, targets, seeds = batch(count=4)
    targets[1] = nothing(targets[1])
    optimizer = torch.optim.SGD(detector.parameters(), 0.03, momentum=0.9)
    for step in range(STEPS):
        now = [seed + 10 * step for seed in seeds[part]]
        optimizer.zero_grad()
        sum(detector(images[part], sizes[part], targets[part], now).values()).backward()
        for parameter in detector.parameters():
            parameter.grad = processes.mean(parameter.grad)
        # Of an image's padding, the first norm makes large gradients.
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    return detector.state_dict()


def _run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        for kind in KINDS:
            state = train(kind, slice(2 * rank, 2 * rank + 2), Pair(rank))
            torch.save(state, folder / f"{kind}{rank}.pth")
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(_run, args=(tmp_path,), nprocs=2)
    for kind in KINDS:
        first, second = (torch.load(tmp_path / f"{kind}{rank}.pth", weights_only=True) for rank in range(2))
        start, alone = small_detector(kind).state_dict(), train(kind, slice(0, 4), Processes())
        assert set(first) == set(second) == set(alone)
        moved = max((alone[key] - start[key]).abs().max() for key in alone if "num_batches" not in key)
        assert moved > 0.01
        for key, value in alone.items():
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=key)
            torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5, msg=key)
