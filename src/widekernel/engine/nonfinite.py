"""What is not finite in a step, for the message to the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.data.batches import Batch
from widekernel.engine.config import TrainingConfig

REMEDIES = (
    "Lower optimizer.lr, set optimizer.clip_grad, or use precision bf16 or fp32, in another output folder; or let the run "
    "return to its last training state and leave out the batches since then, with faults.rollbacks."
)
"""What the user can do about steps that are not finite."""


def first_nonfinite(losses: Mapping[str, Tensor], batch: Batch | None, model: nn.Module) -> str:
    """Return a description of the first tensor with a value that is not finite, or "" if there is none.

    Inputs come first, then weights, buffers, losses and gradients, because what comes first spoils what follows.
    """
    tensors = [*_of_batch("" if batch is None else batch.content)] if batch is not None else []
    for name, parameter in model.named_parameters():
        tensors.append((f"the parameter {name}", parameter))
    for name, value in losses.items():
        tensors.append((f"the loss {name!r}" if len(losses) > 1 else "the loss", value))
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tensors.append((f"the gradient of {name}", parameter.grad))
    return next((_described(name, value) for name, value in tensors if not _is_finite(value)), "")


def _of_batch(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the contents of a batch, with their places."""
    if isinstance(content, Tensor):
        yield f"the input {name}".rstrip(), content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _of_batch(value, f"{name}.{key}".lstrip("."))
    elif isinstance(content, (list, tuple)):
        fields = getattr(content, "_fields", range(len(content)))
        for key, value in zip(fields, content, strict=True):
            yield from _of_batch(value, f"{name}.{key}".lstrip("."))


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _described(name: str, value: Tensor) -> str:
    with torch.no_grad():
        bad = ~value.isfinite()
        number = int(bad.sum())
    kind = "NaN" if bool(value.isnan().any()) else "infinite"
    return f"{name} ({kind} in {number:,} of {value.numel():,} values)"


def too_many_skipped(number: int, step: int, what: str, config: TrainingConfig) -> str:
    """Return the reason why the run cannot go on.

    Args:
        number: steps in a row that were not finite.
        step: the last of them.
        what: what was not finite in it.
        config: settings of the run.
    """
    rates = f"optimizer.lr is {config.optimizer.lr} and optimizer.clip_grad {config.optimizer.clip_grad}"
    return (
        f"{number} training step(s) in a row, up to step {step}, were not finite, but faults.max_skipped is "
        f"{config.faults.max_skipped}. In the last one, {what} was not; {rates}."
    )
