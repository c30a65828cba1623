"""Accuracy and loss of a classifier; every image counts exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from widekernel.data import Batch, EvaluationLoader
from widekernel.engine.evaluation import EvaluationOptions
from widekernel.engine.evaluation import evaluate as evaluate_task
from widekernel.engine.metrics import Metric
from widekernel.engine.processes import Processes
from widekernel.engine.task import Evaluator
from widekernel.tasks.run_parts import IMAGES

METRICS = (
    Metric("val_top1", "top-1", "%"),
    Metric("val_top5", "top-5", "%"),
    Metric("val_loss", "loss", larger_is_better=False, digits=4),
)
"""What an evaluation yields, by the keys in metrics.jsonl."""


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a data set.

    Args:
        top1: share of images whose largest output is the right class, in percent
        top5: share of images whose right class is among the five largest outputs, in percent
        loss: mean cross-entropy
        images: number of images that were evaluated
        unreadable: number of further images that could not be read
    """

    top1: float
    top5: float
    loss: float
    images: int
    unreadable: int


class Accuracy(Evaluator):
    """Evaluator of top-1, top-5 and cross-entropy.

    Args:
        class_mapping: the model's output for every class index of the data; `None` if they are the same
        observe: function that receives the logits `(n, classes)` and targets `(n,)` of every batch
        class_map: outputs, for every class index of the data, that alone are compared (data.class_map). A class without
            output (-1) has the smallest of their logits
    """

    def __init__(
        self,
        class_mapping: tuple[int, ...] | None = None,
        observe: Callable[[Tensor, Tensor], None] = lambda logits, targets: None,
        class_map: tuple[int, ...] | None = None,
    ) -> None:
        self._mapping = None if class_mapping is None else torch.tensor(class_mapping)
        self._map = None if class_map is None else torch.tensor(class_map)
        self._observe = observe
        self._sums = torch.zeros(4, dtype=torch.float64)  # top-1 hits, top-5 hits, loss, images

    @override
    def update(self, model: nn.Module, batch: Batch) -> None:
        images, targets = batch.content
        self.add(model(images).float(), targets)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Add the logits `(n, outputs)` of images with the class indices `targets` `(n,)` of the data."""
        if self._map is not None:
            logits = _chosen(logits, self._map.to(logits.device))
        if self._mapping is not None:
            targets = self._mapping.to(targets.device)[targets]
        self._observe(logits, targets)
        ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        # Sums in float64 do not depend on how the images are divided into batches and among processes.
        loss = F.cross_entropy(logits, targets, reduction="none").double().sum()
        sums = ranked[:, 0].sum().double(), ranked.sum().double(), loss, loss.new_tensor(len(targets))
        self._sums = self._sums.to(logits.device) + torch.stack(sums)

    @override
    def reduce(self, processes: Processes) -> None:
        # From the host: a process that has had no readable image has its sums there, whatever the device.
        self._sums = processes.sum(self._sums.cpu())

    @override
    def result(self) -> dict[str, float]:
        right1, right5, loss, images = self._sums.tolist()
        return {
            "val_top1": 100 * right1 / images,
            "val_top5": 100 * right5 / images,
            "val_loss": loss / images,
            "val_images": int(images),
        }


def _chosen(logits: Tensor, outputs: Tensor) -> Tensor:
    """Return the chosen outputs of `logits`; where there is none (-1), the smallest of the others."""
    chosen, missing = logits[:, outputs.clamp(min=0)], outputs < 0
    lowest = chosen.masked_fill(missing, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(missing, lowest, chosen)


def evaluate(
    model: nn.Module, loader: EvaluationLoader, options: EvaluationOptions, accuracy: Accuracy | None = None
) -> Evaluation | None:
    """Evaluate `model` in evaluation mode and full precision, and restore the mode of every module afterwards.

    Returns:
        the result; `None` if `options.stop()` became true.

    Raises:
        DataError: no image could be read.
        NetworkError: the network fails on the images.
        TrainingError: more than `max_unreadable` images could not be read.
    """
    values = evaluate_task(model, loader, accuracy or Accuracy(), replace(options, nouns=IMAGES))
    return None if values is None else result_of(values)


def result_of(values: dict[str, float]) -> Evaluation:
    """Return the result that the metrics of an evaluation tell."""
    return Evaluation(
        top1=values["val_top1"],
        top5=values["val_top5"],
        loss=values["val_loss"],
        images=int(values["val_images"]),
        unreadable=int(values["val_unreadable"]),
    )
