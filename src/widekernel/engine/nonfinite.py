"""What is not finite in a step, for the message to the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.data.batches import Batch


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
