"""Runs that exercise everything that has a state, for the campaigns of `resume_program`; each in a forked process.

All of them have a layer of SLaK, batch norms, dropout, drop path, mixup and random erasing. The variants differ in
sparsity, precision, accumulation, loading processes and training processes, so that each pair of choices occurs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.engine.tiny import make_config, make_trainer, without_timings
from timm.layers import DropPath
from torch import Tensor, nn

from widekernel.data import AugmentConfig
from widekernel.engine import (
    CheckpointConfig,
    EmaConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    SilentReporter,
    Trainer,
    checkpoint,
    components,
    loop,
)
from widekernel.engine.config import EvaluationConfig, SparsityConfig
from widekernel.engine.joining import joined_processes
from widekernel.engine.metrics_log import read_metrics
from widekernel.engine.state_file import step_of
from widekernel.layers import LargeKernel, SplitStrips
from widekernel.sparsity import DynamicSparsityConfig
from widekernel.sparsity.semi_structured import SemiStructuredConfig
from widekernel.tasks.classification.config import ModelConfig, TrainConfig

STEPS = 20
EVALUATED_EVERY = 8
RANKS = 2
SLOW_S = 0.004
"""Time that each `fsync` of a save takes longer, so that kills arrive within saves."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = LargeKernel(SplitStrips(8, 7, 3), [nn.BatchNorm2d(8), nn.BatchNorm2d(8)], identity=True)
        self.mix = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.2))
        self.path = DropPath(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.path(self.mix(self.wide(x)))).mean((2, 3)))


@dataclass(frozen=True)
class Variant:
    """What distinguishes a run.

    Args:
        sparsity: dense, learned, or how a dynamic sparse run grows connections
        precision: precision of the loop
        accumulate: forward passes per optimizer step
        workers: loading processes
        world_size: training processes
        log_every: optimizer steps between rows of metrics
        steps: optimizer steps of the run
    """

    sparsity: str
    precision: str
    accumulate: int
    workers: int
    world_size: int
    log_every: int = 3
    steps: int = STEPS

    @property
    def name(self) -> str:
        return f"{self.sparsity}-{self.precision}-a{self.accumulate}-w{self.workers}-p{self.world_size}"

    def config(self, folder: Path, interval: int) -> TrainConfig:
        """Return the settings of a run that saves every `interval` steps."""
        micro = 4 if self.accumulate == 1 else 2
        batch = micro * self.accumulate * 2
        return make_config(
            folder,
            # The network is given, so the file to start from, which learned masks require, need not exist.
            model=ModelConfig(weights="given" if self.sparsity == "learned" else None),
            augment=AugmentConfig(auto_augment=None, color_jitter=0.0, erase_prob=0.25),
            optimizer=OptimizerConfig(lr=5e-3, clip_grad=1.0),
            schedule=ScheduleConfig(steps=self.steps, warmup_steps=4),
            ema=EmaConfig(None) if self.sparsity == "learned" else EmaConfig(0.9, warmup=self.accumulate == 1),
            loop=LoopConfig(
                batch_size=batch,
                micro_batch=micro if self.world_size == RANKS else 2 * micro,
                precision=self.precision,
                device="cpu",
                log_every=self.log_every,
            ),
            evaluation=EvaluationConfig(every_steps=EVALUATED_EVERY),
            checkpoint=CheckpointConfig(every_epochs=STEPS, every_steps=interval),
            sparsity=self._sparsity(),
        )

    def _sparsity(self) -> SparsityConfig:
        if self.sparsity == "dense":
            return SparsityConfig()
        if self.sparsity == "learned":
            settings = SemiStructuredConfig(method="learned", min_in_channels=4, min_out_channels=1)
            return SparsityConfig("semi_structured", semi_structured=settings)
        dynamic = DynamicSparsityConfig(sparsity=0.4, growth=self.sparsity, update_interval=3, prune_schedule="cosine")
        return SparsityConfig("dynamic", dynamic=dynamic)


VARIANTS = (
    Variant("dense", "fp32", accumulate=1, workers=0, world_size=1, log_every=1),
    Variant("random", "fp32", accumulate=3, workers=0, world_size=2),
    Variant("dense", "bf16", accumulate=3, workers=1, world_size=2),
    Variant("gradient", "fp16", accumulate=1, workers=2, world_size=1),
    Variant("dense", "fp16", accumulate=3, workers=0, world_size=2),
    Variant("momentum", "fp32", accumulate=3, workers=2, world_size=1),
    Variant("random", "bf16", accumulate=1, workers=0, world_size=2),
    Variant("learned", "fp16", accumulate=1, workers=0, world_size=1),
    Variant("learned", "fp32", accumulate=3, workers=0, world_size=2),
    Variant("learned", "bf16", accumulate=1, workers=2, world_size=1),
)

SHORT = Variant("random", "fp16", accumulate=1, workers=0, world_size=2, steps=9)


class Marks:
    """Memory that the forked processes share with their parent, who reads there what they do, even after their death.

    Of each rank: `step`, the optimizer steps done; `first`, the step from which this start went on, or -1 before;
    `saving`, the step whose state is being written, or 0; `saved`, the step of the last complete state; `saves`, the
    number of states that this start began to write; `finished`, 1 after the run.
    """

    NAMES = ("step", "first", "saving", "saved", "saves", "finished")

    def __init__(self) -> None:
        self._values = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def get(self, name: str, rank: int = 0) -> int:
        return self._values[len(self.NAMES) * rank + self.NAMES.index(name)]

    def set(self, name: str, value: int, rank: int = 0) -> None:
        self._values[len(self.NAMES) * rank + self.NAMES.index(name)] = value

    def clear(self) -> None:
        for rank in range(RANKS):
            for name in self.NAMES:
                self.set(name, -1 if name == "first" else 0, rank)


# -- in a forked process ---------------------------------------------------------------------------------------------


@dataclass
class Watcher(SilentReporter):
    """Reporter that keeps the marks, notes the state after each step if wanted, and dies at a given step.

    Args:
        marks: the shared memory
        rank: number of this process
        noting: whether the state after each step is noted
        dies_at: step at which this process ends without any cleanup
    """

    marks: Marks
    rank: int
    noting: bool = False
    dies_at: int | None = None
    notes: dict[int, dict[str, str]] = field(default_factory=dict)
    trainer: Trainer | None = None

    def start_training(self, length: object, first_step: int) -> None:
        self.marks.set("step", first_step, self.rank)
        self.marks.set("saved", first_step, self.rank)
        self.marks.set("first", first_step, self.rank)

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        assert self.trainer is not None
        self.marks.set("step", step, self.rank)
        if step == self.dies_at:
            self.trainer.store.wait()  # so that it is known which state is the newest on disk
            os.kill(os.getpid(), signal.SIGKILL) if step % 2 else os._exit(9)
        if self.noting:
            self.notes[step] = digests_of(self.trainer.state())


def digests_of(state: Mapping[str, Any]) -> dict[str, str]:
    """Return SHA-256 of each component of a training state."""
    found = {}
    for name, value in state.items():
        digest = hashlib.sha256()
        _add(value, digest.update)
        found[name] = digest.hexdigest()
    return found


def _add(value: Any, update: Callable[[bytes], object]) -> None:
    update(f"{type(value).__name__} ".encode())
    if isinstance(value, Tensor):
        update(f"{value.dtype} {tuple(value.shape)} ".encode())
        update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            update(f"{key!r}: ".encode())
            _add(item, update)
    elif isinstance(value, (list, tuple)):
        update(f"{len(value)} ".encode())
        for item in value:
            _add(item, update)
    else:
        update(f"{sorted(value) if isinstance(value, set) else value!r} ".encode())


def fp16_on_cpu() -> None:
    """Let fp16 run on a CPU, with a scale that is too large at first and changes every few steps."""
    make = components.make_autocast

    def make_autocast(precision: str, device: torch.device) -> Any:
        return (lambda: torch.autocast("cpu", torch.float16)) if precision == "fp16" else make(precision, device)

    components.make_autocast = make_autocast
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**20, growth_interval=4)  # type: ignore[misc]


def mark_saves(marks: Marks, slow: bool) -> list[int]:
    """Mark when states are written; if `slow`, let it take longer. Return the list of their steps, which grows."""
    write, sync = checkpoint.write_state, os.fsync

    saves: list[int] = []

    def marked(path: Path, state: dict[str, Any]) -> None:
        saves.append(step_of(path))
        marks.set("saves", len(saves))
        marks.set("saving", step_of(path))
        write(path, state)
        marks.set("saved", step_of(path))
        marks.set("saving", 0)

    def slowly(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(SLOW_S)
        sync(descriptor)

    checkpoint.write_state = marked
    if slow:
        os.fsync = slowly
    return saves


@dataclass(frozen=True)
class Start:
    """One start of a run, in every process of it.

    Args:
        variant: the run
        folder: its folder
        marks: the shared memory
        interval: optimizer steps between saves
        noting: whether the state after each step is noted
        dies_at: step at which all processes end without any cleanup
        slow: whether saves take longer
    """

    variant: Variant
    folder: Path
    marks: Marks
    interval: int = 1
    noting: bool = False
    dies_at: int | None = None
    slow: bool = False

    def __call__(self) -> None:
        """Run to the end, and write what was found to the file `found.RANK` of the run folder's parent."""
        fp16_on_cpu()
        saves = mark_saves(self.marks, self.slow)
        loop.save_curves = lambda *_: None  # drawing takes longer than all of the training
        with joined_processes("cpu", timeout_s=10.0) as processes:
            watcher = Watcher(self.marks, processes.rank, self.noting, self.dies_at)
            torch.manual_seed(0)
            model, config = Net(), self.variant.config(self.folder, self.interval)
            trainer = make_trainer(config, self.variant.workers, reporter=watcher, model=model, processes=processes)
            watcher.trainer = trainer
            trainer.run()
            found = {
                "first": self.marks.get("first", processes.rank),
                "steps": watcher.notes,
                "end": digests_of(trainer.state()),
                "rows": [json.dumps(row) for row in without_timings(read_metrics(trainer.context.folder.metrics))],
                "saves": saves,
                "skipped": trainer.progress.skipped,
            }
            found_path(self.folder, processes.rank).write_text(json.dumps(found))
            self.marks.set("finished", 1, processes.rank)


def found_path(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}.found.{rank}")
