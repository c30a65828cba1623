"""A second task, as different from classification as possible: sequences of several lengths, regression, gathered errors."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from widekernel.data import BatchPlan, EvaluationLoader, EvaluationSamples, LoaderOptions, TrainingLoader, TrainingSamples
from widekernel.data.batches import Batch
from widekernel.data.images import UnreadableImageError
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
    Trainer,
)
from widekernel.engine.config import TrainingConfig
from widekernel.engine.metrics import Metric
from widekernel.engine.reporter import Reporter, SilentReporter
from widekernel.engine.task import Evaluator, Position, Task


class Tracks:
    """Random walks of 3 to 9 steps, which are to be summarized by the place where they end; some can be damaged."""

    def __init__(self, count: int, seed: int, damaged: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
        self.steps = [torch.randn(length, 2, generator=generator) for length in self.lengths]
        self.damaged = damaged

    def __len__(self) -> int:
        return len(self.steps)

    def load(self, index: int) -> Tensor:
        if index in self.damaged:
            raise UnreadableImageError("the recorder failed")
        return self.steps[index]

    def sample_name(self, index: int) -> str:
        return f"track {index}"


def noisy(steps: Tensor) -> Tensor:
    return steps + 0.01 * torch.randn_like(steps)


def same(steps: Tensor) -> Tensor:
    return steps


def padded(tracks: list[Tensor]) -> dict[str, object]:
    """Return a batch as a dictionary, with a list in it; its tensors have different numbers of dimensions."""
    return {
        "steps": nn.utils.rnn.pad_sequence(tracks, batch_first=True),
        "lengths": torch.tensor([len(track) for track in tracks]),
        "ends": [torch.stack([track.sum(0)[axis] for track in tracks]) for axis in range(2)],
    }


class TrackNet(nn.Module):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 16)
        self.drop = nn.Dropout(dropout)
        self.end = nn.Linear(16, 2)

    def forward(self, steps: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.arange(steps.shape[1], device=steps.device) < lengths[:, None]
        hidden = self.drop(self.embed(steps).tanh()) * inside[..., None]
        return self.end(hidden.sum(1))


class EndErrors(Evaluator):
    """Distances between the true and the predicted ends, gathered as Python objects."""

    def __init__(self, broken: bool) -> None:
        self.broken = broken
        self.found: list[tuple[int, float]] = []

    @override
    def update(self, model: nn.Module, batch: Batch) -> None:
        content = batch.content
        ends = torch.stack(content["ends"], 1)
        distances = (model(content["steps"], content["lengths"]) - ends).norm(dim=1)
        self.found += zip(content["lengths"].tolist(), distances.tolist(), strict=True)

    @override
    def reduce(self, processes: Processes) -> None:
        self.found = sorted(pair for part in processes.gather(self.found) for pair in part)

    @override
    def result(self) -> dict[str, float]:
        distances = [distance for _, distance in self.found]
        return {
            "val_distance": math.nan if self.broken else statistics.median(distances),
            "val_close": 100 * sum(distance < 1 for distance in distances) / len(distances),
            "val_tracks": len(distances),
        }


class FindEnds(Task):
    metrics = (
        Metric("val_distance", "median distance", "m", larger_is_better=False, digits=3),
        Metric("val_close", "within 1 m", "%"),
    )
    nouns = ("track", "tracks")

    def __init__(self, broken_evaluations: tuple[int, ...] = ()) -> None:
        self.broken, self.evaluations = broken_evaluations, 0

    @override
    def loss(self, model: nn.Module, batch: Batch, position: Position) -> dict[str, Tensor]:
        content = batch.content
        found = model(content["steps"], content["lengths"])
        ends = torch.stack(content["ends"], 1)
        return {"distance": F.smooth_l1_loss(found, ends), "size": 1e-3 * found.square().mean()}

    @override
    def evaluator(self) -> EndErrors:
        self.evaluations += 1
        return EndErrors(self.evaluations in self.broken)


def make_track_trainer(
    folder: Path,
    *,
    task: Task | None = None,
    reporter: Reporter | None = None,
    processes: Processes | None = None,
    damaged: tuple[int, ...] = (),
    dropout: float = 0.2,
    max_unreadable: int = 5,
) -> Trainer:
    """Return a trainer of 20 steps in an epoch of 7, which is evaluated every 5 steps."""
    processes = processes or Processes()
    config = TrainingConfig(
        seed=3,
        optimizer=OptimizerConfig(lr=0.02, weight_decay=0.0),
        schedule=ScheduleConfig(steps=20, warmup_steps=4),
        ema=EmaConfig(decay=0.5),
        loop=LoopConfig(batch_size=8, micro_batch=2, log_every=4, device="cpu"),
        checkpoint=CheckpointConfig(every_steps=3),
        max_unreadable=max_unreadable,
        evaluation=EvaluationConfig(every_steps=5),
    )
    plan = BatchPlan(8, 2, processes.world_size)
    training = TrainingSamples(Tracks(60, 0, damaged), noisy, config.seed, padded)
    held_out = EvaluationSamples(Tracks(11, 1), same, padded)
    data = RunData(
        TrainingLoader(training, LoaderOptions(0), plan, processes.rank),
        EvaluationLoader(held_out, 4, LoaderOptions(), processes.shard),
    )
    torch.manual_seed(processes.rank)  # the first process's weights count
    run = RunFolder(folder)
    processes.from_main(lambda: run.prepare({}))
    context = RunContext(run, torch.device("cpu"), processes, reporter or SilentReporter(), {"tracks": 60})
    return Trainer(TrackNet(dropout), task or FindEnds(), data, config, context)
