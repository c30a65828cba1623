"""Distributed training with gloo: all families have buffers that can be sent, and all processes stay equal."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import widekernel
from tests.models.zoo import NANO, alive, create

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch has no gloo here")

# Types that gloo can broadcast.
SENDABLE = {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8}


def _join(folder: Path, rank: int, size: int) -> None:
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60))


def _step(model: nn.Module, seed: int) -> DistributedDataParallel:
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    parallel(x).square().mean().backward()
    optimizer.step()
    return parallel


@pytest.fixture
def _alone(tmp_path: Path) -> Iterator[None]:
    _join(tmp_path, 0, 1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", NANO)
def test_one_process_trains_as_without_distribution(name: str) -> None:
    model = alive(name, num_classes=4).train()
    other = copy.deepcopy(model)
    parallel = _step(model, 1)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    other(x).square().mean().backward()
    for (key, parameter), alone in zip(parallel.module.named_parameters(), other.parameters()):
        torch.testing.assert_close(parameter.grad, alone.grad, msg=lambda text, key=key: f"{key}: {text}")
        torch.testing.assert_close(parameter, alone - 0.1 * parameter.grad)


@pytest.mark.usefixtures("_alone")
def test_networks_in_processes_are_saved_and_loaded_like_others(tmp_path: Path) -> None:
    parallel = DistributedDataParallel(create("shiftwise_nano"))
    path = widekernel.save_checkpoint(parallel, tmp_path / "a.safetensors")
    other = create("shiftwise_nano")
    assert not widekernel.load_checkpoint(other, path).notes
    widekernel.load_checkpoint(parallel, widekernel.save_checkpoint(other, tmp_path / "a.pth", layout="official"))


@pytest.mark.parametrize("folded", [False, True], ids=["training", "folded"])
@pytest.mark.parametrize("name", NANO)
def test_buffers_can_be_sent(name: str, folded: bool) -> None:
    model = create(name)
    model = widekernel.fold(model) if folded else model
    assert {buffer.dtype for buffer in model.buffers()} <= SENDABLE


def _train_all(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    _join(folder, rank, 2)
    try:
        for name in NANO:
            torch.manual_seed(rank)
            model = create(name, num_classes=4)
            if rank:  # process 0 decides
                for key, buffer in model.named_buffers():
                    if key.endswith("tile_at"):
                        buffer.zero_()
            torch.save(_step(model, rank).module.state_dict(), folder / f"{name}_{rank}.pth")
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_stay_equal(tmp_path: Path) -> None:
    mp.spawn(_train_all, args=(tmp_path,), nprocs=2)
    for name in NANO:
        first, second = (torch.load(tmp_path / f"{name}_{rank}.pth", weights_only=True) for rank in range(2))
        # Each process has statistics of batch norms of its own until the next forward pass.
        shared = [key for key in first if "running" not in key]
        assert all(torch.equal(first[key], second[key]) for key in shared), name
