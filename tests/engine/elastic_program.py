"""Program of `test_elastic`: runs of one and two processes, and runs that go on with another number of processes.

    python -m tests.engine.elastic_program FOLDER NAME...

Each run leaves its run folder, and next to it what every process has seen: NAME.seen.RANK, a line for each forward pass. If
the only name is `torchrun`, this is a process that torchrun has started, which is killed if it is its turn.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tests.engine.forked import Group, free_ports, start
from tests.engine.sequences import make_track_trainer
from tests.engine.test_resume import KillAt
from tests.engine.tiny import array_source, make_config, make_trainer
from torch import Tensor, nn
from typing_extensions import override

import widekernel.engine.distributed  # noqa: F401 - once, before the processes are forked
from widekernel.data import AugmentConfig, Batch
from widekernel.engine import (
    CheckpointConfig,
    EmaConfig,
    EvaluationConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    loop,
)
from widekernel.engine.config import SparsityConfig
from widekernel.engine.joining import joined_processes
from widekernel.engine.processes import Processes
from widekernel.engine.task import Position
from widekernel.sparsity import DynamicSparsityConfig
from widekernel.tasks.classification.task import Classification

BATCH, STEPS = 8, 20
"""Images of a step, and steps of a run."""

LOG_EVERY, SAVE_EVERY = 4, 3

STOPS = (8, 17)
RESUMED = ((6, 7), (14, 15))
"""Steps at which runs with changing numbers of processes are killed, and the steps after which they may be resumed.

States are saved in the background, also at the end of an epoch. All these contain losses since the last row of metrics.
"""

KILLS = ((5, 0), (9, 1), (16, 0))
"""Steps at which a process is killed under torchrun, and its rank; one for each of its starts."""


class WideNet(nn.Module):
    """Small network with a wide depthwise kernel, without dropout; no bias that a norm would remove."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.GELU())
        self.wide = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8, bias=False), norm(8), nn.GELU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.wide(x)).mean((2, 3)))


class Watched(Classification):
    """The classification, which writes a line for each forward pass: step, place of the first image, loss and images."""

    def __init__(self, augment: AugmentConfig, name: str, processes: Processes) -> None:
        super().__init__(augment, 0.1, 3)
        self.path, self.processes = Path(f"{name}.seen.{processes.rank}"), processes.world_size

    @override
    def loss(self, model: nn.Module, batch: Batch, position: Position) -> dict[str, Tensor]:
        losses = super().loss(model, batch, position)
        images = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12] for image in batch.content[0]]
        place = {"processes": self.processes, "step": position.step, "first": position.first}
        row = {**place, "images": images, "loss": losses["cross_entropy"].item()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return losses


KINDS = {
    "batch norm": (nn.BatchNorm2d, None, 20),
    "group norm": (lambda channels: nn.GroupNorm(2, channels), 2, 1),
    "sparse": (nn.BatchNorm2d, None, 17),
}
"""The norm, the images of a forward pass (`None` is all of a process), and the number of held-out images.

Two processes cannot share 17 images equally. With one image, process 1 has nothing to evaluate.
"""


def tiny_trainer(name: str, kind: str, processes: Processes, reporter: KillAt | None = None) -> loop.Trainer:
    """Return the trainer of the run `name`."""
    norm, micro_batch, held_out = KINDS[kind]
    augment = AugmentConfig(auto_augment=None, color_jitter=0.0, mixup=0.8, cutmix=1.0)
    moving = DynamicSparsityConfig(sparsity=0.5, growth="gradient", update_interval=4)
    config = make_config(
        Path(name),
        augment=augment,
        optimizer=OptimizerConfig(lr=2e-3, clip_grad=1.0),
        schedule=ScheduleConfig(steps=STEPS, warmup_steps=4),
        ema=EmaConfig(decay=0.9),
        loop=LoopConfig(batch_size=BATCH, micro_batch=micro_batch, log_every=LOG_EVERY, device="cpu"),
        checkpoint=CheckpointConfig(every_steps=SAVE_EVERY),
        evaluation=EvaluationConfig(every_steps=10),
        sparsity=SparsityConfig("dynamic", dynamic=moving) if kind == "sparse" else SparsityConfig(),
    )
    torch.manual_seed(0)
    return make_trainer(
        config,
        source=array_source(59),  # seven steps in an epoch, and three images that do not fill another batch
        reporter=reporter,
        model=WideNet(norm),
        processes=processes,
        held_out=held_out,
        task=Watched(augment, name, processes),
    )


def tiny_run(name: str, kind: str, stop: int | None = None) -> Callable[[], None]:
    """Return a scenario that trains until the end, or until all processes are killed at step `stop`."""

    def scenario() -> None:
        reporter = None if stop is None else KillAt(stop, signal.SIGKILL)
        with joined_processes("cpu", 20) as processes:
            tiny_trainer(name, kind, processes, reporter).run()

    return scenario


def track_run(name: str) -> Callable[[], None]:
    """Return a scenario that trains the second task."""

    def scenario() -> None:
        with joined_processes("cpu", 20) as processes:
            make_track_trainer(Path(name), processes=processes).run()

    return scenario


def under_torchrun() -> None:
    """Train in a process that torchrun has started; in each start, one of them is killed."""
    turn = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.set_num_threads(1)
    with joined_processes("cpu", 20) as processes:
        step, victim = KILLS[turn] if turn < len(KILLS) else (0, 0)
        reporter = KillAt(step, signal.SIGKILL) if step and victim == processes.rank else None
        trainer = tiny_trainer("torchrun", "sparse", processes, reporter)
        if reporter is not None:
            with Path("torchrun.kills").open("a") as file:
                file.write(f"{step} {victim}\n")
        trainer.run()


Part = tuple[Callable[[], None], int]
"""A scenario, and its number of processes."""


def sequences() -> dict[str, list[Part]]:
    """Return, for each run, its parts one after the other."""
    found: dict[str, list[Part]] = {}
    for kind in KINDS:
        name = f"{kind} changing"
        parts = zip((*STOPS, None), (2, 1, 2), strict=True)
        found[name] = [(tiny_run(name, kind, stop), size) for stop, size in parts]
        for size in (1, 2):
            name = f"{kind} {size}"
            found[name] = [(tiny_run(name, kind), size)]
    for size in (1, 2):
        found[f"tracks {size}"] = [(track_run(f"tracks {size}"), size)]
    return found


def main(chosen: list[str]) -> None:
    """Run those chosen, at most four processes at once, in the current folder, and write the exit codes to report.json."""
    loop.save_curves = lambda *_: None  # drawing takes longer than these runs
    ports, waiting = free_ports(), {name: parts for name, parts in sequences().items() if name in chosen}
    codes: dict[str, list[list[int]]] = {name: [] for name in waiting}
    running: list[Group] = []
    while waiting or running:
        for group in list(running):
            if group.reap():
                running.remove(group)
                codes[group.name].append([group.codes[rank] for rank in range(len(group.pids))])
        names = {group.name for group in running}
        for name, parts in list(waiting.items()):
            scenario, size = parts[0]
            if name not in names and size + sum(len(group.pids) for group in running) <= 4:
                running.append(start(name, scenario, size, Path("logs"), next(ports)))
                waiting[name] = parts[1:]
                if not waiting[name]:
                    del waiting[name]
        time.sleep(0.01)
    Path("report.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    if sys.argv[2:] == ["torchrun"]:
        under_torchrun()
    else:
        Path("logs").mkdir()
        main(sys.argv[2:])
