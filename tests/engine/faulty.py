"""Values that are not finite, injected into the steps of a trainer, and a record of what each step changed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tests.engine.test_resume import Killed
from torch import Tensor

from widekernel.engine import SilentReporter, Trainer

NAMES = {
    "input": "the input images",
    "weight": "the parameter conv.weight",
    "loss": "the loss",
    "gradient": "the gradient of head.bias",
    "averaged gradient": "the gradient of head.bias",
}
"""Kinds of injections, and what the message calls the tensor that they spoil."""


@dataclass(frozen=True)
class Injection:
    """A value that is not finite.

    Args:
        kind: one of `NAMES`; a gradient is spoiled before or after it is averaged over the processes
        steps: optimizer steps, counted from 1
        value: NaN or infinity
        rank: the process in which it appears
    """

    kind: str
    steps: tuple[int, ...]
    value: float = math.nan
    rank: int = 0

    def into(self, trainer: Trainer) -> Trainer:
        """Inject the value into `trainer`, if it is that of the process, and return the trainer."""
        if trainer.context.processes.rank == self.rank:
            _INJECTORS[self.kind](trainer, self._now(trainer), self.value)
        return trainer

    def _now(self, trainer: Trainer) -> Callable[[], bool]:
        return lambda: trainer.progress.step + 1 in self.steps


def _into_input(trainer: Trainer, now: Callable[[], bool], value: float) -> None:
    """Spoil one pixel of the first micro-batch."""
    take = trainer._batches.take

    def spoiled(step: int) -> list:
        batches = take(step)
        if now():
            batches[0].content.images[0, 0, 0, 0] = value
        return batches

    trainer._batches.take = spoiled


def _into_weight(trainer: Trainer, now: Callable[[], bool], value: float) -> None:
    """Spoil a weight for the time of the step."""
    make, weight = trainer.step.make, trainer.model.conv.weight

    def spoiled(*arguments: Any) -> bool | None:
        kept = weight.detach().clone()
        if now():
            weight.data[0, 0, 0, 0] = value
        made = make(*arguments)
        if now():
            weight.data.copy_(kept)
        return made

    trainer.step.make = spoiled


def _into_loss(trainer: Trainer, now: Callable[[], bool], value: float) -> None:
    """Spoil the loss of the process and nothing else: its gradients stay finite."""
    loss = trainer.task.loss

    def spoiled(*arguments: Any) -> dict[str, Tensor]:
        return {name: part + value if now() else part for name, part in loss(*arguments).items()}

    trainer.task.loss = spoiled


def _into_gradient(trainer: Trainer, now: Callable[[], bool], value: float) -> None:
    trainer.model.head.bias.register_hook(lambda gradient: torch.full_like(gradient, value) if now() else gradient)


def _into_averaged_gradient(trainer: Trainer, now: Callable[[], bool], value: float) -> None:
    scaler, bias = trainer.components.trained.scaler, trainer.model.head.bias
    unscale = scaler.unscale_

    def spoiled(optimizer: torch.optim.Optimizer) -> None:
        unscale(optimizer)
        if now():
            bias.grad[0] = value

    scaler.unscale_ = spoiled


_INJECTORS = {
    "input": _into_input,
    "weight": _into_weight,
    "loss": _into_loss,
    "gradient": _into_gradient,
    "averaged gradient": _into_averaged_gradient,
}


class Record(SilentReporter):
    """Reporter that keeps the messages, and digests of everything that a step may change.

    Args:
        killed_at: number of reported steps after which the process "dies"

    Attributes:
        messages: the messages
        steps: numbers of the reported steps
        digests: after each of them, digests of parameters, buffers, average, optimizer and sparsity
    """

    def __init__(self, killed_at: int | None = None) -> None:
        self.killed_at = killed_at
        self.messages: list[str] = []
        self.steps: list[int] = []
        self.digests: list[dict[str, str]] = []
        self.trainer: Trainer | None = None

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, step: int, figures: dict) -> None:
        self.steps.append(step)
        if self.trainer is not None:
            self.digests.append(digests_of(self.trainer))
        if len(self.steps) == self.killed_at:
            raise Killed

    def unchanged(self) -> list[int]:
        """Return the steps that changed nothing at all."""
        pairs = zip(self.steps[1:], self.digests, self.digests[1:])
        return [step for step, before, after in pairs if before == after]

    def touched(self) -> list[int]:
        """Return the steps that changed anything."""
        pairs = zip(self.steps[1:], self.digests, self.digests[1:])
        return [step for step, before, after in pairs if any(before[key] != after[key] for key in before)]


def digests_of(trainer: Trainer) -> dict[str, str]:
    """Return digests of everything that a step may change, except counts and sums."""
    trained = trainer.components.trained
    states = {
        "parameters": dict(trained.model.named_parameters()),
        "buffers": dict(trained.model.named_buffers()),
        "average": {} if trained.average is None else trained.average.module.state_dict(),
        "optimizer": trained.optimizer.state_dict()["state"],
        "sparsity": trained.sparsity.state(),
    }
    return {name: digest_of(state) for name, state in states.items()}


def digest_of(value: Any) -> str:
    """Return a digest of nested containers, tensors bit for bit."""
    digest = hashlib.sha256()
    _add(value, digest)
    return digest.hexdigest()[:16]


def _add(value: Any, digest: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _add(value[key], digest)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _add(part, digest)
    else:
        digest.update(repr(value).encode())
