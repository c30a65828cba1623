"""The cost of the training engine: its steps and those of a bare PyTorch loop alternate within one run.

    OMP_WAIT_POLICY=passive python benchmarks/engine_overhead.py
    OMP_WAIT_POLICY=passive python benchmarks/engine_overhead.py --processes 2

The engine trains as always: `Trainer.run`, with rows of metrics, checks for values that are not finite, and requests to
stop. Between its blocks of steps, the reporter runs blocks of the bare loop: the same network, augmented batches,
optimizer, clipping and average of the weights, and nothing else. Reports nothing unless both loops end with equal weights,
bit for bit.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import widekernel
from widekernel.data import (
    AugmentConfig,
    Batch,
    BatchPlan,
    EvaluationLoader,
    EvaluationSamples,
    LabeledImages,
    LoaderOptions,
    OnImage,
    Preprocessing,
    TrainingLoader,
    TrainingSamples,
)
from widekernel.data.sources import ArraySource
from widekernel.engine import (
    CheckpointConfig,
    EmaConfig,
    EvaluationConfig,
    LoopConfig,
    OptimizerConfig,
    Processes,
    RunContext,
    RunData,
    RunFolder,
    ScheduleConfig,
    SilentReporter,
    Trainer,
)
from widekernel.engine.joining import joined_processes
from widekernel.engine.optimization import create_optimizer
from widekernel.launch.local import environments
from widekernel.tasks.classification.config import TrainConfig
from widekernel.tasks.classification.task import Classification

CLASSES, LR, DECAY, SMOOTHING = 10, 1e-3, 0.99, 0.1
RESNET = {"depths": (1, 1, 2, 1), "width": 16}


@dataclass(frozen=True)
class Case:
    """A network and its batches.

    Args:
        title: name in the table
        model: name of the network
        options: arguments of the network
        size: height and width of the images
        batch: images per step, over all processes
        steps: steps per block
        share: share of the blocks of the other cases that this one measures
    """

    title: str
    model: str
    options: Mapping[str, Any]
    size: int = 32
    batch: int = 32
    steps: int = 10
    share: float = 1.0


CASES = {
    "slak": Case("slak_nano, 32², batch 32", "slak_nano", {}),
    "resnet": Case("ResNet (roadmap, step 0), width 16, 32², batch 32", "roadmap_00_resnet50", RESNET),
    "large": Case("slak_tiny, 64², batch 16", "slak_tiny", {}, size=64, batch=16, steps=1, share=0.2),
}


@dataclass
class Block:
    """Seconds of a block of steps: by the clock, of this process's cores, and of them in the loader by the clock."""

    wall: float
    cpu: float
    loading: float

    @property
    def computing(self) -> float:
        """Seconds outside the loader."""
        return self.wall - self.loading


class BareLoop(SilentReporter):
    """A PyTorch loop without an engine, which runs a block whenever the engine has run one.

    Args:
        case: network and batches
        average: whether the weights are averaged
        loader: loader of the training batches
        processes: the processes that train together
    """

    def __init__(self, case: Case, average: bool, loader: TrainingLoader, processes: Processes) -> None:
        self.case, self.loader = case, loader
        self.model = make_model(case)
        self.average = ModelEmaV3(self.model, decay=DECAY) if average else None
        self.optimizer = create_optimizer(self.model, settings(case).optimizer, fused=True)
        self.parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        self.loss = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
        self.network = processes.wrap(self.model)
        self.processes = processes
        self.batches = self.endless()
        self.model.train()
        self.engine: list[Block] = []
        self.bare: list[Block] = []
        self.start = (0.0, 0.0)

    def endless(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from self.loader.epoch(epoch)
            epoch += 1

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Run a block of the bare loop after each row of metrics, which ends a block of the engine."""
        if step % self.case.steps or len(self.bare) == step // self.case.steps:
            return
        if figures:  # the last row comes only after the evaluation, so the last block of the engine is not measured
            wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
            self.engine.append(Block(wall, cpu, figures["data_seconds"] * self.case.steps))
        self.processes.barrier("the bare loop")
        self.bare.append(self.block())
        self.processes.barrier("the engine")
        self.start = time.perf_counter(), time.process_time()

    def block(self) -> Block:
        wall, cpu, loading = time.perf_counter(), time.process_time(), 0.0
        for _ in range(self.case.steps):
            start = time.perf_counter()
            images, targets = next(self.batches).content
            loading += time.perf_counter() - start
            self.loss(self.network(images), targets).backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update(self.model)
        return Block(time.perf_counter() - wall, time.process_time() - cpu, loading)


def make_model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(case.model, num_classes=CLASSES, **case.options)


def settings(case: Case, steps: int = 1, average: bool = False, output: str = "") -> TrainConfig:
    """Return the settings of a run with a constant learning rate, which is evaluated and saved only at its end."""
    return TrainConfig(
        output=output,
        augment=AugmentConfig(mixup=0.0, cutmix=0.0),
        label_smoothing=SMOOTHING,
        optimizer=OptimizerConfig(lr=LR, clip_grad=1.0),
        schedule=ScheduleConfig(steps=steps, warmup_steps=0, min_lr=LR),
        ema=EmaConfig(decay=DECAY if average else None),
        evaluation=EvaluationConfig(every_steps=steps),
        checkpoint=CheckpointConfig(every_epochs=10**6),
        loop=LoopConfig(batch_size=case.batch, log_every=case.steps, device="cpu", sync_batch_norm=False),
    )


def make_source(case: Case, count: int) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (count, case.size, case.size, 3), dtype=np.uint8)
    return ArraySource(images, [number % CLASSES for number in range(count)], tuple("0123456789"), "noise")


def make_preprocessing(case: Case) -> Preprocessing:
    return Preprocessing(case.size, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0)


def make_loader(case: Case, processes: Processes) -> TrainingLoader:
    transform = OnImage(make_preprocessing(case).train_transform(AugmentConfig()))
    samples = TrainingSamples(make_source(case, 100 * case.batch), transform, 0, LabeledImages.collate)
    plan = BatchPlan(case.batch, None, processes.world_size)
    return TrainingLoader(samples, LoaderOptions(), plan, processes.rank)


def measure(case: Case, average: bool, blocks: int, processes: Processes) -> BareLoop:
    """Run the engine with the bare loop in between, and return the latter, which has measured both."""
    loader, transform = make_loader(case, processes), OnImage(make_preprocessing(case).eval_transform())
    held_out = EvaluationSamples(make_source(case, 2 * case.batch), transform, LabeledImages.collate)
    evaluation = EvaluationLoader(held_out, case.batch, LoaderOptions(), processes.shard)
    bare = BareLoop(case, average, make_loader(case, processes), processes)
    with tempfile.TemporaryDirectory() as output:
        output = processes.broadcast(output)
        config = settings(case, (blocks + 1) * case.steps, average, output)
        folder = RunFolder(output)
        processes.from_main(lambda: folder.prepare(config.to_dict()))
        context = RunContext(folder, torch.device("cpu"), processes, bare)
        task = Classification(config.augment, SMOOTHING, CLASSES)
        trainer = Trainer(make_model(case), task, RunData(loader, evaluation), config.training, context)
        trainer.run()
        processes.barrier("the end of the run")
    # The evaluation at the end has copied the running statistics of process 0 to the others.
    if processes.is_main:
        require_equal(trainer.model, bare.model, "weights")
        if bare.average is not None:
            require_equal(trainer.average.module, bare.average.module, "averages")
    return bare


def require_equal(engine: nn.Module, bare: nn.Module, what: str) -> None:
    """End the benchmark unless both loops have computed the same."""
    pairs = zip(engine.state_dict().items(), bare.state_dict().values(), strict=True)
    differing = [name for (name, value), other in pairs if not torch.equal(value, other)]
    if differing:
        sys.exit(f"the {what} of the engine and of the bare loop differ, first in {differing[0]}: nothing is reported")


def median_and_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median and its confidence interval of at least 95 %, from order statistics."""
    ordered, count = sorted(values), len(values)
    tail, below = 0.0, 0
    while (tail := tail + math.comb(count, below) / 2**count) <= 0.025:
        below += 1
    # `below` values at each end may lie outside; without any, the interval is the range.
    first = max(0, below - 1)
    return statistics.median(ordered), ordered[first], ordered[count - 1 - first]


def row(case: Case, average: bool, bare: BareLoop) -> str:
    """Return a row of the table: each block of the engine is compared with the bare ones before and after it."""
    images = case.steps * case.batch
    wall, cpu, computing, seconds = [], [], [], []
    for engine, before, after in zip(bare.engine, bare.bare, bare.bare[1:]):
        around = [(getattr(before, key) + getattr(after, key)) / 2 for key in ("wall", "cpu", "computing")]
        wall.append(100 * (engine.wall / around[0] - 1))
        cpu.append(100 * (engine.cpu / around[1] - 1))
        computing.append(100 * (engine.computing / around[2] - 1))
        seconds.append((engine.computing - around[2]) / case.steps)
    rates = [images / statistics.median(block.wall for block in blocks) for blocks in (bare.engine, bare.bare)]
    step = statistics.median(block.computing for block in bare.bare) / case.steps
    spread = statistics.quantiles((block.wall for block in bare.bare), n=4)
    cells = [
        case.title,
        "yes" if average else "no",
        f"{rates[1]:.1f}",
        f"{rates[0]:.1f}",
        *("{:+.2f} % ({:+.2f} to {:+.2f})".format(*median_and_interval(values)) for values in (wall, cpu, computing)),
        f"{1e3 * step:.1f}",
        f"{1e6 * statistics.median(seconds):+.0f}",
        f"{100 * (spread[2] - spread[0]) / spread[1]:.0f} %",
        f"{len(wall)} × {case.steps}",
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = (
    "network", "average", "bare loop (images/s)", "engine (images/s)", "added time per image", "added processor time",
    "added, without loading", "bare step without loading (ms)", "added per step (µs)", "spread of the bare blocks", "blocks",
)  # fmt: skip


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    with joined_processes("cpu") as processes:
        rows = []
        for name in options.cases:
            for average in (False, True):
                case = CASES[name]
                bare = measure(case, average, max(8, round(options.blocks * case.share)), processes)
                rows.append(row(case, average, bare))
                if processes.is_main:
                    print(rows[-1], file=sys.stderr)
    if not processes.is_main:
        return
    print("# The training engine and a bare PyTorch loop\n")
    print(
        f"{platform.processor() or platform.machine()}, {processes.world_size} process(es), {torch.get_num_threads()} "
        f"thread(s) each, PyTorch {torch.__version__}, widekernel {widekernel.__version__}, AdamW (fused), clipping by "
        "norm, batch norms not synchronized. Blocks of both loops alternate within one run; each block of the engine is "
        "compared with the mean of the bare ones before and after it. Medians, in brackets with intervals of 95 % "
        "confidence. The spread is the interquartile range, which other programs on the machine widen. Both loops ended "
        "with equal weights.\n"
    )
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    print("\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=200, help="blocks of each loop")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    if "RANK" in os.environ or options.processes == 1:
        run(options)
        return
    command = [sys.executable, *sys.argv]
    started = [subprocess.Popen(command, env=env) for env in environments(options.processes, os.environ)]
    sys.exit(max(process.wait() for process in started))


if __name__ == "__main__":
    main()
