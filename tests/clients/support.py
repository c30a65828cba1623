"""Helpers of the tests with third-party libraries: code from the documentation, a small network, and two processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.sparsity.nets import SmallNet, data, small_net, weights_outside
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig

DOCUMENT = Path(__file__).parents[2] / "docs" / "sparsity.md"
CONFIG = DynamicSparsityConfig(sparsity=0.5, init="erk", growth="gradient", update_interval=2)


def documented(heading: str, **names: Any) -> dict[str, Any]:
    """Run the first Python block below a heading of docs/sparsity.md with these names, and return all its names."""
    text = DOCUMENT.read_text()
    below = text[text.index(f"\n### {heading}\n") :].removeprefix(f"\n### {heading}")
    block = below[: below.index("\n### ")].split("```python\n")[1].split("```")[0]
    names = {"torch": torch, "F": nn.functional, "DynamicSparsity": DynamicSparsity, "config": CONFIG, **names}
    exec(compile(block, f"{DOCUMENT.name}: {heading}", "exec"), names)
    return names


class Samples(Dataset):
    """Return 32 images and classes, as dictionaries for the Trainer if wanted."""

    def __init__(self, as_dictionary: bool = False) -> None:
        self._as_dictionary = as_dictionary
        self._images, self._classes = data(0, 32)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: int) -> Any:
        image, kind = self._images[place], self._classes[place]
        return {"x": image, "labels": kind} if self._as_dictionary else (image, kind)


def samples() -> DataLoader:
    """Return a loader of batches of four, in order."""
    return DataLoader(Samples(), batch_size=4)


def network(seed: int = 0) -> SmallNet:
    """Return a network in training mode."""
    net = small_net(seed)
    net.train()
    return net


def outside(model: nn.Module, controller: DynamicSparsity) -> int:
    """Return the number of non-zero weights outside the masks; assert that there are masks."""
    assert any(not mask.all() for mask in controller.masks.values())
    return weights_outside(model, controller)


def in_two(folder: Path, work: Callable[[int, Path], Any]) -> list[Any]:
    """Return the results of `work(rank, folder)` in two processes that are started as by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_started, args=(str(folder), port, work), nprocs=2)
    return [torch.load(folder / f"result{rank}.pth", weights_only=True) for rank in range(2)]


def _started(rank: int, folder: str, port: int, work: Callable[[int, Path], Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    result = work(rank, Path(folder))
    torch.save(result, Path(folder) / f"result{rank}.pth")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
