"""Equal tensors in several processes: copying those of process 0, and comparing digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from widekernel.engine.signs import ProcessError

_CHUNK_BYTES = 64 * 2**20


def copy_from_main(tensors: Mapping[str, Tensor], send: Callable[[Tensor], None]) -> None:
    """Give `tensors` the values that they have in process 0.

    Args:
        tensors: tensors with equal names, shapes and types in all processes.
        send: replaces the values of a tensor (n,) of bytes by those of process 0.
    """
    chunk: list[Tensor] = []
    for value in tensors.values():
        if chunk and (value.device != chunk[0].device or sum(map(_size, chunk)) + _size(value) > _CHUNK_BYTES):
            _copy_chunk(chunk, send)
            chunk = []
        if value.numel():
            chunk.append(value)
    if chunk:
        _copy_chunk(chunk, send)


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _copy_chunk(chunk: list[Tensor], send: Callable[[Tensor], None]) -> None:
    # As bytes, because backends do not know all types, and few large messages are faster than many small ones.
    sent = torch.cat([_bytes(value) for value in chunk])
    send(sent)
    for value, part in zip(chunk, sent.split([_size(value) for value in chunk])):
        value.copy_(part.clone().view(value.dtype).view(value.shape))


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return SHA-256 of each tensor's type, shape and values."""
    found = {}
    for name, value in tensors.items():
        digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(_bytes(value).cpu().numpy().data)
        found[name] = digest.hexdigest()
    return found


def require_equal_tensors(tensors: Mapping[str, Tensor], gather: Callable[[Any], list[Any]]) -> None:
    """Raise unless `tensors` are equal, bit for bit, in all processes.

    Args:
        tensors: tensors of this process by name.
        gather: returns the values of all processes, by rank.

    Raises:
        ProcessError: they differ; the message names the first tensor and the process.
    """
    mine = digests(tensors)
    whole = gather(hashlib.sha256(repr(list(mine.items())).encode()).hexdigest())
    if len(set(whole)) == 1:
        return
    every = gather(mine)
    for rank, other in enumerate(every):
        if list(other.items()) == list(every[0].items()):
            continue
        names = [*every[0], *(name for name in other if name not in every[0])]
        differing = [name for name in names if other.get(name) != every[0].get(name)]
        first = differing[0] if differing else names[0]
        raise ProcessError(
            f"The networks of the processes differ: {len(differing)} of {len(names)} tensors of process {rank}, the first "
            f"of them {first}, are not those of process 0. Randomness or updates that differ between processes cause this."
        )
