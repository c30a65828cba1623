"""Program of `test_processes`: runs scenarios, each in two processes, all at once; writes one JSON file.

The scenarios `values` and `nonfinite` write what they computed; most others end with a fault.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tests.engine import nonfinite_program
from tests.engine.forked import Group, Scenario, free_ports, start
from torch import nn

from widekernel.engine.distributed import dist  # imported once, before the processes are forked
from widekernel.engine.equality import digests
from widekernel.engine.joining import joined_processes
from widekernel.engine.processes import Processes
from widekernel.engine.synced_norms import SyncedBatchNorm, convert_batch_norms
from widekernel.errors import DataError, WidekernelError

TIMEOUT_S = 2.0


class PickyError(WidekernelError):
    """An error that cannot be rebuilt from its text."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def exchanges(processes: Processes) -> dict[str, object]:
    rank = processes.rank
    first, second = processes.vote(rank == 1), processes.vote(False)
    half = torch.tensor([0.5 + rank], dtype=torch.float64)
    return {
        "sum": processes.sum(half).tolist(),
        "unchanged": half.tolist(),
        "mean": processes.mean(torch.tensor(float(rank))).item(),
        "largest": processes.largest(torch.tensor([rank, -rank])).tolist(),
        "any": [processes.any(rank == 1), processes.any(False)],
        "votes": [second(), first()],
        "union": sorted(processes.union({f"of {rank}", "common"})),
        "broadcast": processes.broadcast(f"from {rank}"),
        "gather": processes.gather(rank),
        "finite": [processes.all_finite(torch.tensor(rank == 0)).item(), processes.all_finite(torch.tensor(True)).item()],
        "carried": carried_votes(processes),
        "from_main": processes.from_main(lambda: f"made by {rank}"),
        "shard": [processes.shard.rank, processes.shard.world_size],
    }


def carried_votes(processes: Processes) -> list[object]:
    """Vote as a training loop does, and count the exchanges: each question travels with the check of the next step."""
    found: list[object] = []
    before, number = dist.all_reduce, 0

    def counted(*args: object, **options: object) -> object:
        nonlocal number
        number += 1
        return before(*args, **options)

    dist.all_reduce = counted
    try:
        former = processes.vote(False)
        for step in range(4):
            finite = processes.all_finite(torch.tensor([True, step != 3 or processes.rank == 0]))
            vote = processes.vote(step == processes.rank == 1)
            found.append([finite.tolist(), former()])
            former = vote
    finally:
        dist.all_reduce = before
    return [*found, number, former()]


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def raising(error: BaseException) -> Callable[[], object]:
    def function() -> object:
        raise error

    return function


def errors_of_main(processes: Processes) -> dict[str, object]:
    return {
        "data": error_of(lambda: processes.from_main(raising(DataError("no images")))),
        "picky": error_of(lambda: processes.from_main(raising(PickyError("a", "b")))),
        "other": error_of(lambda: processes.from_main(raising(OSError(28, "No space left")))),
        "unsendable": error_of(lambda: processes.from_main(lambda: lambda: 0))[:20],
    }


def make_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2), nn.Linear(2, 2)
    )
    network.register_buffer("mask", torch.rand(5) > 0.5)
    return network.to(memory_format=torch.channels_last)


def gradients_are_averaged(processes: Processes) -> dict[str, object]:
    """Compare with the gradients of both processes' images, which any process can compute alone."""
    network = make_network(processes.rank)
    differing = error_of(lambda: processes.require_equal(network))
    processes.equalize(network)
    network[5].requires_grad_(False)
    network[1].eval()
    nn.utils.parametrize.register_parametrization(network[4], "weight", Doubled())
    alone = copy.deepcopy(network)
    wrapped = processes.wrap(network)
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(2, 2, 3, 3, 4, 4, generator=generator)  # micro-batch, process, image, channel, height, width
    for step in range(3):
        network.zero_grad()
        with processes.without_sync(wrapped):
            wrapped(images[0, processes.rank]).square().sum().backward()
        unsynced = network[0].weight.grad.clone()
        wrapped(images[1, processes.rank] + step).square().sum().backward()
    (alone(images[0].flatten(0, 1)).square().sum() + alone(images[1].flatten(0, 1) + 2).square().sum()).div(2).backward()
    pairs = [(a.grad, b.grad) for a, b in zip(network.parameters(), alone.parameters()) if a.requires_grad]
    return {
        "differing": differing,
        "wrapped": type(wrapped).__name__,
        "close": [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs],
        "unsynced_differs": len(set(processes.gather(unsynced.sum().item()))),
        "digests": processes.gather(digests(dict(network.named_buffers()))),
    }


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def buffers_are_copied(processes: Processes) -> dict[str, object]:
    network = make_network(0)
    network[1].running_mean.fill_(processes.rank + 1)
    network.mask.fill_(processes.rank == 0)
    unequal = error_of(lambda: processes.require_equal(network))
    processes.synchronize_buffers(network)
    processes.require_equal(network)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    processes.equalize(frozen)
    other = nn.Linear(2, 2 + processes.rank)
    return {
        "unequal": unequal,
        "mean": network[1].running_mean.tolist(),
        "mask": network.mask.tolist(),
        "frozen": processes.wrap(frozen) is frozen,
        "other": error_of(lambda: processes.equalize(other)),
    }


def norm_like_one_process(processes: Processes, sizes: tuple[int, int], momentum: float | None) -> dict[str, object]:
    """Return the largest differences to a batch norm of one process that has all images."""
    torch.manual_seed(1)
    whole = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=momentum)).double()
    nn.init.normal_(whole[1].weight)
    mine = convert_batch_norms(copy.deepcopy(whole), processes)
    images = torch.randn(sum(sizes), 2, 3, 5, dtype=torch.float64) * 3 + 100
    weights = torch.randn(sum(sizes), 3, 3, 5, dtype=torch.float64)
    place = slice(0, sizes[0]) if processes.rank == 0 else slice(sizes[0], None)
    largest: dict[str, float] = {}

    def compare(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
        largest[what] = max(largest.get(what, 0.0), (a - b).abs().max().item() if a.numel() else 0.0)

    for _ in range(2):
        every, part = images.clone().requires_grad_(), images[place].clone().requires_grad_()
        expected, found = whole(every), mine(part)
        (expected * weights).sum().backward()
        (found * weights[place]).sum().backward()
        compare("output", found, expected[place])
        compare("input gradient", part.grad, every.grad[place])
    for (name, a), b in zip(mine.named_parameters(), whole.parameters()):
        compare(f"gradient of {name}", processes.sum(a.grad), b.grad)
    for (name, a), b in zip(mine.named_buffers(), whole.buffers()):
        compare(name, a.double(), b.double())
    compare("evaluation", mine.eval()(images), whole.eval()(images))
    return {"largest": largest, "kind": type(mine[1]).__name__, "keys": list(mine.state_dict()) == list(whole.state_dict())}


def values() -> None:
    with joined_processes("cpu", 60) as processes:
        found = {
            "exchanges": exchanges(processes),
            "errors": errors_of_main(processes),
            "gradients": gradients_are_averaged(processes),
            "buffers": buffers_are_copied(processes),
            "norms": [norm_like_one_process(processes, sizes, 0.1) for sizes in ((3, 3), (1, 4), (0, 2))],
            "cumulative": norm_like_one_process(processes, (2, 3), None),
            "one value": error_of(lambda: one_value(processes)),
        }
        processes.barrier("writing what was found")
    Path(f"values.{processes.rank}.json").write_text(json.dumps(found))


def one_value(processes: Processes) -> None:
    norm = SyncedBatchNorm(nn.BatchNorm1d(2), processes)
    norm(torch.randn(1 - processes.rank, 2))


def fault(rank: int, harm: Callable[[], object]) -> Scenario:
    """Train in two processes, and harm one of them after three steps; the other waits for it in an exchange."""

    def scenario() -> None:
        with joined_processes("cpu", TIMEOUT_S) as processes:
            for step in range(10**6):
                processes.note(step, f"training step {step + 1}")
                if step == 3 and processes.rank == rank:
                    time.sleep(0.5)  # the signs of this step are published
                    Path(f"harmed.{os.environ['MASTER_PORT']}").write_text(str(time.time()))
                    harm()
                processes.sum(torch.ones(1))

    return scenario


def busy() -> None:
    """Compute for longer than the timeout, with no exchange and no note; then nobody is lost."""
    with joined_processes("cpu", TIMEOUT_S / 2) as processes:
        if processes.is_main:
            end = time.monotonic() + TIMEOUT_S
            while time.monotonic() < end:
                torch.randn(200, 200).mm(torch.randn(200, 200))
        processes.barrier("the long computation of process 0")


def unequal_ends() -> None:
    """Stop with an error that all processes raise, while process 0 saves for longer than the timeout."""
    with joined_processes("cpu", TIMEOUT_S / 2) as processes:
        processes.note(5, "saving")
        if processes.is_main:
            time.sleep(TIMEOUT_S * 1.5)
            print("saved", flush=True)
        raise SystemExit(143)


SCENARIOS: dict[str, Scenario] = {
    "values": values,
    "busy": busy,
    "unequal_ends": unequal_ends,
    "nonfinite": lambda: nonfinite_program.run(nonfinite_program.short_cases()),
    "kill-0": fault(0, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "kill-1": fault(1, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "stop-0": fault(0, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "stop-1": fault(1, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "raise-0": fault(0, raising(DataError("broken image"))),
    "raise-1": fault(1, raising(DataError("broken image"))),
}


def main() -> None:
    """Run all scenarios at once in the current folder, and write report.json."""
    ports = free_ports()
    groups = []
    for name, scenario in SCENARIOS.items():
        port = next(ports)
        groups.append((port, start(name, scenario, 2, Path(), port)))
    report = {}
    deadline = time.time() + 60
    left = [group for _, group in groups]
    while left and time.time() < deadline:
        left = [group for group in left if not (group.reap() or stopped(group))]
        time.sleep(0.02)
    for port, group in groups:
        group.wait(0)
        harmed = Path(f"harmed.{port}")
        after = float(harmed.read_text()) if harmed.exists() else 0.0
        report[group.name] = {
            "codes": group.codes,
            "pids": group.pids,
            "seconds": {rank: ended - after for rank, ended in group.ended.items()},
        }
    Path("report.json").write_text(json.dumps(report))


def stopped(group: Group) -> bool:
    """Return whether only the stopped process of a scenario is left."""
    return group.name.startswith("stop-") and 1 - int(group.name[-1]) in group.codes


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main()
