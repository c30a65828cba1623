"""What is not finite in a step, for the message to the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widekernel.data.batches import Batch
from widekernel.engine.config import TrainingConfig
from widekernel.engine.processes import Processes

REMEDIES = (
    "Lower optimizer.lr, set optimizer.clip_grad, or use precision bf16 or fp32, in another output folder; or let the run "
    "return to its last training state and leave out the batches since then, with faults.rollbacks."
)
"""What the user can do about steps that are not finite."""


class NonFinite(NamedTuple):
    """Tensor with a value that is not finite.

    Args:
        stage: place in the order in which such values spread: inputs, parameters, buffers, losses, gradients
        text: description
    """

    stage: int
    text: str


def first_nonfinite(losses: Mapping[str, Tensor], batches: Sequence[Batch], model: nn.Module) -> NonFinite | None:
    """Return the first tensor of this process with a value that is not finite, or `None` if there is none.

    Inputs come first, then parameters, buffers, losses and gradients, because what comes first spoils what follows.
    """
    parameters = list(model.named_parameters())
    stages: tuple[list[tuple[str, Tensor]], ...] = (
        [pair for batch in batches for pair in _of_batch(batch.content)],
        [(f"the parameter {name}", value) for name, value in parameters],
        [(f"the buffer {name}", value) for name, value in model.named_buffers()],
        [(f"the loss {name!r}" if len(losses) > 1 else "the loss", value) for name, value in losses.items()],
        [(f"the gradient of {name}", value.grad) for name, value in parameters if value.grad is not None],
    )
    for stage, tensors in enumerate(stages):
        for name, value in tensors:
            if not _is_finite(value):
                return NonFinite(stage, _described(name, value))
    return None


def first_of_all(own: NonFinite | None, processes: Processes) -> str:
    """Return the description of the first tensor of all processes, and in which one it is if there are several."""
    found = [(each, rank) for rank, each in enumerate(processes.gather(own)) if each is not None]
    if not found:
        return "the norm of the gradients"
    first, rank = min(found, key=lambda pair: pair[0].stage)
    return first.text if processes.world_size == 1 else f"{first.text} in process {rank}"


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
