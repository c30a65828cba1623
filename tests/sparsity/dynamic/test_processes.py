"""Two processes compute the same masks independently, and notice if they differ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.sparsity.nets import OPTIMIZERS, data, quick, small_net
from widekernel.errors import ArgumentError
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig, MaskMismatchError
from widekernel.sparsity.dynamic.processes import check_equal

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch has no gloo here"),
]


def started(rank: int, folder: str, work: Callable[[int, Path], object]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)  # processes differ in what they draw from the global generator
    meeting = f"file://{Path(folder) / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        torch.save(work(rank, Path(folder)), Path(folder) / f"{rank}.pth")
    finally:
        dist.destroy_process_group()


def in_two(folder: Path, work: Callable[[int, Path], object]) -> list:
    mp.spawn(started, args=(str(folder), work), nprocs=2)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


class Traffic:
    """Counter of the collectives that the controller starts, by name, with the bytes of each."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        for name in ("broadcast", "all_reduce", "all_gather", "broadcast_object_list"):
            self._wrap(name)

    def _wrap(self, name: str) -> None:
        original = getattr(dist, name)

        def counted(value, *args, **kwargs):
            tensor = value if isinstance(value, torch.Tensor) else args[0]
            self.sent.append((name, tensor.numel() * tensor.element_size()))
            return original(value, *args, **kwargs)

        setattr(dist, name, counted)


def train(rank: int, growth: str, init: str) -> dict:
    model = DistributedDataParallel(small_net())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    traffic = Traffic()
    config = DynamicSparsityConfig(sparsity=0.6, init=init, growth=growth, update_interval=1, total_steps=100)
    controller = DynamicSparsity(model, optimizer, config, batch=None if init == "snip" else data(rank))
    for step in range(50):
        x, y = data(2 * step + rank)
        optimizer.zero_grad()
        with model.no_sync():  # two batches per step; gradients are averaged with the second
            nn.functional.cross_entropy(model(x), y).backward()
        nn.functional.cross_entropy(model(x.flip(0)), y.flip(0)).backward()
        optimizer.step()
    return {"masks": controller.masks, "updates": controller.updates, "sent": traffic.sent, "names": list(controller.masks)}


def random_growth(rank: int, folder: Path) -> dict:
    return train(rank, "random", "snip")


def gradient_growth(rank: int, folder: Path) -> dict:
    return train(rank, "gradient", "snip_mask")


@pytest.mark.parametrize("work", [random_growth, gradient_growth])
def test_masks_are_equal_after_fifty_updates_without_sending_them(work, tmp_path: Path) -> None:
    first, second = in_two(tmp_path, work)
    assert first["updates"] == second["updates"] == 50
    assert first["names"] == second["names"] and not any(name.startswith("module.") for name in first["names"])
    for name, mask in first["masks"].items():
        assert torch.equal(mask, second["masks"][name]), name
    # One digest and its complement at the start and at every update; scores of the first batch if it was given.
    digests = [(name, size) for name, size in first["sent"] if size == 16]
    assert digests == [("all_reduce", 16)] * 51
    others = [entry for entry in first["sent"] if entry[1] != 16]
    gradients = 8 if work is gradient_growth else 0
    assert len(others) <= gradients and {name for name, _ in others} <= {"all_reduce"}


def diverging(rank: int, folder: Path) -> str:
    model = small_net(seed=rank).train()  # other weights, and gradients are not averaged
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    try:
        DynamicSparsity(model, optimizer, quick(init="magnitude"))
    except MaskMismatchError as error:
        return str(error)
    return "nothing noticed"


def test_different_masks_are_an_error_that_names_layers(tmp_path: Path) -> None:
    for message in in_two(tmp_path, diverging):
        assert "the masks of stem.weight, " in message and "differ between processes" in message


def one_layer(rank: int, folder: Path) -> str:
    masks = {name: torch.ones(3, 5, dtype=torch.bool) for name in "abc"}
    check_equal(masks)
    masks["b"][rank, rank] = False
    try:
        check_equal(masks)
    except MaskMismatchError as error:
        return str(error)
    return "nothing noticed"


def test_a_single_different_bit_is_found(tmp_path: Path) -> None:
    for message in in_two(tmp_path, one_layer):
        assert message.startswith("the masks of b differ between processes")


def sharded(rank: int, folder: Path) -> dict[str, str]:
    """Return the errors for a sharded network: new, after an evaluation, sharded later, and in the older wrapper."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def said(work: Callable[..., object], *args: object) -> str:
        try:
            work(*args)
        except ArgumentError as error:
            return str(error)
        return "nothing noticed"

    found = {}
    for name in ("fresh", "evaluated", "trained"):
        model = plain_net()
        fully_shard(model[0])
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
        if name == "evaluated":
            with torch.no_grad():
                model(torch.randn(2, 8))
        elif name == "trained":
            model(torch.randn(2, 8)).sum().backward()
            optimizer.step()
        found[name] = said(DynamicSparsity, model, optimizer, quick())
    model = plain_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    controller = DynamicSparsity(model, optimizer, quick())
    fully_shard(model)
    model(torch.randn(2, 8)).sum().backward()
    found["later"] = said(controller.state_dict)
    older = FullyShardedDataParallel(plain_net(), device_id=torch.device("cpu"))
    found["older"] = said(DynamicSparsity, older, torch.optim.SGD(older.parameters(), 0.1), quick())
    return found


def plain_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_sharded_networks_are_refused_as_such_whatever_was_done_before(tmp_path: Path) -> None:
    for found in in_two(tmp_path, sharded):
        assert len(found) == 5
        for name, message in found.items():
            assert "sharded over processes (FSDP, or another kind of DTensor)" in message, (name, message)
            assert "does not train" not in message, name


def resumed_in_the_order_of_hooks(rank: int, folder: Path) -> dict:
    """Resume after an update; weights are loaded before wrapper and controller are made, masks after."""

    def make(weights: dict | None) -> tuple:
        network = small_net(seed=rank if weights is None else 5)
        if weights is not None:
            network.load_state_dict(weights)
        model = DistributedDataParallel(network)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        config = quick(init="erk", growth="gradient")
        return model, optimizer, DynamicSparsity(model, optimizer, config)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x, y = data(2 * step + rank)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    model, optimizer, controller = make(None)
    go(model, optimizer, range(4))
    saved = copy.deepcopy((model.module.state_dict(), optimizer.state_dict(), controller.state_dict()))
    go(model, optimizer, range(4, 7))
    again = make(saved[0])
    again[1].load_state_dict(saved[1])
    again[2].load_state_dict(saved[2])
    # Each process has its own batch statistics, and the wrapper broadcasts those of the first.
    found = {"given back": all(torch.equal(p, saved[0][n]) for n, p in again[0].module.named_parameters())}
    go(again[0], again[1], range(4, 7))
    assert controller.updates == again[2].updates == 3
    found["went on"] = all(torch.equal(v, again[0].state_dict()[n]) for n, v in model.state_dict().items())
    return found


def test_a_run_of_two_processes_resumes_in_the_order_of_hooks(tmp_path: Path) -> None:
    for found in in_two(tmp_path, resumed_in_the_order_of_hooks):
        assert found == {"given back": True, "went on": True}
