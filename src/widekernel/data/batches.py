"""What a data set yields: samples, and batches whose content may be any nesting of tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Unreadable(NamedTuple):
    """Name of an image that could not be decoded, and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Sample(NamedTuple):
    """One item of a data set, or `None` if it is unreadable, and the unreadable images met while loading it."""

    item: Any
    unreadable: tuple[Unreadable, ...] = ()


class Batch(NamedTuple):
    """Several items together.

    Args:
        content: tensors in any nesting of tuples, named tuples, lists and dictionaries; `None` if there are no items
        size: number of items
        unreadable: the unreadable images met while loading them
    """

    content: Any
    size: int
    unreadable: tuple[Unreadable, ...] = ()

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> "Batch":
        """Return the batch with its tensors on `device`, without waiting for the copies.

        Args:
            device: device of the network.
            memory_format: layout of floating-point tensors with four dimensions, which are images; others keep theirs.
        """
        return self._replace(content=_moved(self.content, device, memory_format))


def _moved(value: Any, device: torch.device, memory_format: torch.memory_format) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 4 and value.is_floating_point():
            return value.to(device, non_blocking=True, memory_format=memory_format)
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(part, device, memory_format) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_moved(part, device, memory_format) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
