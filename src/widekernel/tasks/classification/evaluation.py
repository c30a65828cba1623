"""Accuracy and loss of a classifier; every image counts exactly once."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widekernel.data import EvaluationLoader
from widekernel.data.batches import Unreadable
from widekernel.engine.error_context import NetworkError, errors_as
from widekernel.engine.processes import Processes
from widekernel.engine.reporter import Reporter, SilentReporter
from widekernel.engine.unreadable import check_unreadable
from widekernel.errors import DataError
from widekernel.layers.training_modes import training_modes_restored


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


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of an evaluation.

    Args:
        device: device of the model
        max_unreadable: largest number of unreadable images that is accepted
        class_mapping: the model's output for every class index of the data; `None` if they are the same
        processes: the processes that evaluate together
        reporter: receives progress and messages
        stop: called between batches, equally often in all processes; if true, the evaluation ends without a result
        observe: function that receives the logits `(n, classes)` and targets `(n,)` of every batch
    """

    device: torch.device
    max_unreadable: int
    class_mapping: tuple[int, ...] | None = None
    processes: Processes = field(default_factory=Processes)
    reporter: Reporter = field(default_factory=SilentReporter)
    stop: Callable[[], bool] = lambda: False
    observe: Callable[[Tensor, Tensor], None] = lambda logits, targets: None


def evaluate(model: nn.Module, loader: EvaluationLoader, options: EvaluationOptions, name: str = "") -> Evaluation | None:
    """Evaluate `model` in evaluation mode and full precision, and restore the mode of every module afterwards.

    Returns:
        the result; `None` if `options.stop()` became true.

    Raises:
        DataError: no image could be read.
        NetworkError: the network fails on the images.
        TrainingError: more than `max_unreadable` images could not be read.
    """
    options.reporter.start_evaluation(len(loader), name)
    sums = torch.zeros(4, dtype=torch.float64)  # top-1 hits, top-5 hits, loss, images
    unreadable: set[str] = set()
    with training_modes_restored(model), torch.inference_mode():
        model.eval()
        batches = iter(loader)
        # To stop together, all processes must call `stop` equally often.
        for _ in range(loader.most_batches):
            if options.stop():
                return None
            batch = next(batches, None)
            if batch is None:
                continue
            _note_unreadable(batch.unreadable, unreadable, options)
            if batch.size:
                images, targets = batch.content
                sums += _batch_sums(model, images, targets, options)
            options.reporter.evaluated(1)
    right1, right5, loss, count = options.processes.sum(sums).tolist()
    unreadable = options.processes.union(unreadable)
    if not count:
        raise DataError(f"None of the {len(unreadable)} images could be read. Check the data set.")
    return Evaluation(
        top1=100 * right1 / count,
        top5=100 * right5 / count,
        loss=loss / count,
        images=int(count),
        unreadable=len(unreadable),
    )


def _batch_sums(model: nn.Module, images: Tensor, targets: Tensor, options: EvaluationOptions) -> Tensor:
    with errors_as(NetworkError, "Evaluating the network"):
        logits = model(images.to(options.device, non_blocking=True)).float()
    if options.class_mapping is not None:
        targets = torch.tensor(options.class_mapping)[targets]
    targets = targets.to(options.device, non_blocking=True)
    options.observe(logits, targets)
    ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack(
        [ranked[:, 0].sum().double(), ranked.sum().double(), loss.double(), loss.new_tensor(len(targets)).double()]
    ).cpu()


def _note_unreadable(images: tuple[Unreadable, ...], seen: set[str], options: EvaluationOptions) -> None:
    for image in images:
        options.reporter.message(f"Left out an unreadable image: {image}")
        seen.add(image.name)
    check_unreadable(seen, options.max_unreadable, "evaluation")
