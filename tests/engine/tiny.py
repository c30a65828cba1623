"""Small network with features that make resuming hard: batch norm buffers and dropout."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from widekernel.data import (
    AugmentConfig,
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
from widekernel.data.seeding import MODEL_STREAM, scoped_seed
from widekernel.data.sources import ArraySource
from widekernel.engine import (
    CheckpointConfig,
    EmaConfig,
    LoopConfig,
    OptimizerConfig,
    Processes,
    RunContext,
    RunData,
    RunFolder,
    ScheduleConfig,
    Trainer,
)
from widekernel.engine.rates import TIMING_KEYS
from widekernel.engine.task import Task
from widekernel.tasks.classification.config import TrainConfig
from widekernel.tasks.classification.task import Classification


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(1, 3))

    def no_weight_decay(self) -> set[str]:
        return {"scale"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3)))) * self.scale


def array_source(count: int = 42, classes: int = 3) -> ArraySource:
    """Return images of noise around a brightness that depends on the class."""
    generator = np.random.default_rng(0)
    targets = [index % classes for index in range(count)]
    images = np.stack([generator.integers(0, 80, (10, 10, 3)) + 60 * target for target in targets]).astype(np.uint8)
    return ArraySource(images, targets, tuple("abc"[:classes]), "array")


def make_config(output: Path, **changes) -> TrainConfig:
    settings = {
        "augment": AugmentConfig(auto_augment="rand-m5-mstd0.5-inc1", erase_prob=0.25),
        "optimizer": OptimizerConfig(lr=5e-3, clip_grad=1.0),
        "schedule": ScheduleConfig(epochs=3, warmup_epochs=1),
        "ema": EmaConfig(decay=0.9),
        "loop": LoopConfig(batch_size=12, micro_batch=4, log_every=2, device="cpu"),
        "checkpoint": CheckpointConfig(),
    }
    return TrainConfig(output=str(output), seed=5, **{**settings, **changes})


def make_trainer(
    config: TrainConfig,
    workers: int = 0,
    source: ArraySource | None = None,
    reporter=None,
    model: nn.Module | None = None,
    processes: Processes | None = None,
    held_out: int = 20,
    task: Task | None = None,
) -> Trainer:
    source, processes = source or array_source(), processes or Processes()
    folder = RunFolder(config.output)
    processes.from_main(lambda: folder.prepare(config.to_dict()))
    with scoped_seed(MODEL_STREAM, config.seed):
        model = model or TinyNet()
    preprocessing = Preprocessing(8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0)
    transforms = OnImage(preprocessing.train_transform(config.augment)), OnImage(preprocessing.eval_transform())
    samples = TrainingSamples(source, transforms[0], config.seed, LabeledImages.collate)
    evaluated = EvaluationSamples(array_source(held_out), transforms[1], LabeledImages.collate)
    plan = BatchPlan(config.loop.batch_size, config.loop.micro_batch, processes.world_size)
    data = RunData(
        TrainingLoader(samples, LoaderOptions(workers), plan, processes.rank),
        EvaluationLoader(evaluated, 8, LoaderOptions(), processes.shard),
    )
    task = task or Classification(config.augment, config.label_smoothing, 3)
    device = torch.device("cuda" if config.loop.device == "cuda" else "cpu")
    extra = {} if reporter is None else {"reporter": reporter}
    fingerprint = {"images": len(source)}
    context = RunContext(folder, device, processes=processes, fingerprint=fingerprint, **extra)
    return Trainer(model.to(device), task, data, config.training, context)


def without_timings(rows: list[dict]) -> list[dict]:
    """Return rows of metrics without what depends on the machine."""
    return [{key: value for key, value in row.items() if key not in TIMING_KEYS} for row in rows]


def states_equal(left, right) -> bool:
    """Return whether nested containers are equal, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(states_equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(states_equal, left, right))
    return left == right
