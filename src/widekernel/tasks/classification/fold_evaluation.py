"""Evaluation of a network and of its folded form on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from widekernel.data import Batch, EvaluationLoader
from widekernel.engine.evaluation import EvaluationOptions
from widekernel.engine.evaluation import evaluate as evaluate_task
from widekernel.engine.processes import Processes
from widekernel.engine.task import Evaluator
from widekernel.tasks.classification.evaluation import Accuracy, Evaluation, result_of
from widekernel.tasks.run_parts import IMAGES


@dataclass(frozen=True)
class FoldEvaluation:
    """Comparison of a network with its folded form.

    Args:
        before: result of the network
        after: result of its folded form
        max_difference: largest absolute difference between the logits of the two, over all images and outputs
        max_logit: largest absolute logit of the network
    """

    before: Evaluation
    after: Evaluation
    max_difference: float
    max_logit: float


class BothForms(Evaluator):
    """Evaluator of a network and of its folded form.

    Args:
        folded: the folded form, on the device of the network
        accuracies: evaluators of the two
    """

    def __init__(self, folded: nn.Module, accuracies: tuple[Accuracy, Accuracy]) -> None:
        self._folded, self._accuracies = folded, accuracies
        self._largest = torch.zeros(2, dtype=torch.float64)

    @override
    def update(self, model: nn.Module, batch: Batch) -> None:
        images, targets = batch.content
        logits = model(images).float(), self._folded(images).float()
        for each, accuracy in zip(logits, self._accuracies, strict=True):
            accuracy.add(each, targets)
        found = torch.stack([_largest(logits[0] - logits[1]), _largest(logits[0])])
        self._largest = torch.maximum(self._largest.to(found.device), found)

    @override
    def reduce(self, processes: Processes) -> None:
        for accuracy in self._accuracies:
            accuracy.reduce(processes)
        found = torch.tensor(processes.gather(self._largest.tolist()), dtype=torch.float64)
        self._largest = torch.where(found.isnan().any(0), math.nan, found.amax(0))

    @override
    def result(self) -> dict[str, float]:
        before, after = (accuracy.result() for accuracy in self._accuracies)
        difference, logit = self._largest.tolist()
        values = {**before, **{f"folded_{key}": value for key, value in after.items()}}
        return {**values, "max_difference": difference, "max_logit": logit}


def _largest(values: Tensor) -> Tensor:
    return values.abs().max().double()


def evaluate_both(
    model: nn.Module,
    folded: nn.Module,
    loader: EvaluationLoader,
    options: EvaluationOptions,
    accuracies: tuple[Accuracy, Accuracy],
) -> FoldEvaluation | None:
    """Evaluate `model` and its folded form on the same batches; otherwise as `evaluation.evaluate`.

    Returns:
        the comparison; `None` if `options.stop()` became true.
    """
    values = evaluate_task(model, loader, BothForms(folded, accuracies), replace(options, nouns=IMAGES))
    if values is None:
        return None
    prefix = "folded_"
    after = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    return FoldEvaluation(
        before=result_of(values),
        after=result_of({**after, "val_unreadable": values["val_unreadable"]}),
        max_difference=values["max_difference"],
        max_logit=values["max_logit"],
    )
