"""Copies of training states in the memory of the CPU, which are written to disk while training goes on."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.errors import CheckpointError, in_short

# The exact types that `torch.load(..., weights_only=True)` reads; not subclasses, such as `numpy.float64` of `float`.
_VALUES = {type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.Size}
_MAPPINGS = {dict, collections.OrderedDict, collections.Counter}
_SEQUENCES = {list, tuple, set}
_TENSORS = {Tensor, nn.Parameter, nn.Buffer}
_DEEPEST = 100
_ALIGNMENT = 64  # bytes


class UnsavableError(CheckpointError):
    """Error for a training state that holds something other than tensors, plain values and plain containers."""


def tensors_of(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the place and the tensor for all tensors in nested containers; a shared container is visited once.

    Raises:
        UnsavableError: a file that executes nothing cannot hold a value; the message names its place and type.
    """
    yield from _tensors_of(state, (), set())


def _tensors_of(value: Any, place: tuple[str, ...], visited: set[int]) -> Iterator[tuple[str, Tensor]]:
    kind = type(value)
    if kind in _TENSORS:
        yield ".".join(place), value
    elif kind in _MAPPINGS or kind in _SEQUENCES:
        if id(value) in visited:
            return
        visited.add(id(value))
        if len(place) > _DEEPEST:
            raise UnsavableError(f"{_named(place[:1])} is nested more than {_DEEPEST} levels deep.")
        if kind in _MAPPINGS:
            for key, item in value.items():
                _check_key(key, place)
                yield from _tensors_of(item, (*place, str(key)), visited)
            yield from _tensors_of(getattr(value, "__dict__", None) or None, (*place, "__dict__"), visited)
        else:
            for number, item in enumerate(value):
                yield from _tensors_of(item, (*place, str(number)), visited)
    elif kind not in _VALUES:
        raise _unsavable(value, place)


def _check_key(key: Any, place: tuple[str, ...]) -> None:
    for part in key if type(key) is tuple else (key,):
        if type(part) not in _VALUES:
            raise _unsavable(part, (*place, f"key {str(key)[:40]!r}"))


def _unsavable(value: Any, place: tuple[str, ...]) -> UnsavableError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    where = f" at {'.'.join(place)}" if len(place) > 1 else ""
    return UnsavableError(
        f"{_named(place[:1])} cannot be saved: it holds a value of type {kind}{where}. The state of a component is made of "
        "tensors, plain numbers and texts, dicts, lists, tuples and sets: convert the value to one of them in `state_dict`."
    )


def _named(place: tuple[str, ...]) -> str:
    return f"Component {place[0]!r} of the training state" if place else "The training state"


@dataclass
class _Part:
    """Storage to copy, and its place in the reused memory."""

    source: torch.UntypedStorage
    start: int
    copy: torch.UntypedStorage | None = None


class Snapshot:
    """Maker of copies of a state, which reuses its memory: a copy is valid until the next one is made.

    The memory is page-locked if tensors are on a CUDA device, so that they are copied without waiting for each.
    Tensors that share memory share it in the copy, too.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes of the memory that is kept for the next copy."""
        return 0 if self._memory is None else self._memory.numel()

    def take(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of `state` on the CPU that later changes of the tensors and containers do not affect.

        Raises:
            UnsavableError: it holds something other than tensors, plain values and plain containers.
            CheckpointError: there is too little memory for the copy.
        """
        plain = {id(tensor): _plain(tensor, place) for place, tensor in tensors_of(dict(state))}
        parts, size = _plan(plain.values())
        self._reserve(size, any(part.source.device.type == "cuda" for part in parts.values()))
        self._fill(parts)
        copies = {key: _over(parts[_key(tensor)], tensor) for key, tensor in plain.items()}
        copied: dict[str, Any] = _rebuilt(dict(state), copies, {})
        return copied

    def _reserve(self, size: int, pinned: bool) -> None:
        memory = self._memory
        if memory is not None and memory.numel() >= size and (not pinned or memory.is_pinned()):
            return
        self._memory = memory = None  # the old memory is released before the new one is taken
        try:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"There is too little memory for a copy of the training state ({size / 1e6:.0f} MB): {in_short(error)}."
            ) from error

    def _fill(self, parts: dict[Any, _Part]) -> None:
        memory = self._memory
        assert memory is not None
        devices = set()
        for part in parts.values():
            length = part.source.nbytes()
            part.copy = memory.untyped_storage()[part.start : part.start + length] if length else torch.UntypedStorage(0)
            if length:
                source = torch.empty(0, dtype=torch.uint8, device=part.source.device).set_(part.source)
                memory[part.start : part.start + length].copy_(source, non_blocking=source.is_cuda)
                if source.is_cuda:
                    devices.add(source.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()


def _plain(tensor: Tensor, place: str) -> Tensor:
    """Return the values of `tensor`, with memory that holds each of its elements."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        kind = "quantized tensor" if tensor.is_quantized else f"{tensor.layout} tensor on {tensor.device}"
        component = place.split(".")[0]
        raise UnsavableError(
            f"Component {component!r} of the training state cannot be saved: {place} is a {kind}. Save its dense parts."
        )
    tensor = tensor.detach().resolve_conj().resolve_neg()
    expanded = tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    return tensor.contiguous() if expanded else tensor


def _key(tensor: Tensor) -> tuple[int, torch.dtype]:
    # A file cannot hold one storage with two types of elements, so each type gets a copy of its own.
    return tensor.untyped_storage()._cdata, tensor.dtype


def _plan(tensors: Any) -> tuple[dict[Any, _Part], int]:
    parts: dict[Any, _Part] = {}
    size = 0
    for tensor in tensors:
        if _key(tensor) not in parts:
            parts[_key(tensor)] = _Part(tensor.untyped_storage(), size)
            size += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
    return parts, size


def _over(part: _Part, tensor: Tensor) -> Tensor:
    assert part.copy is not None
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(part.copy, tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload, no-any-return]


def _rebuilt(value: Any, copies: dict[int, Tensor], done: dict[int, Any]) -> Any:
    """Copy nested containers, with `copies` in the place of the tensors with these ids."""
    kind = type(value)
    if kind in _TENSORS:
        return copies[id(value)]
    if kind is bytearray:
        return bytearray(value)
    if kind not in _MAPPINGS and kind not in _SEQUENCES:
        return value
    if id(value) in done:
        return done[id(value)]
    if kind in _SEQUENCES:
        items: Any = kind() if kind is list else None
        done[id(value)] = items
        rebuilt = [_rebuilt(item, copies, done) for item in value]
        if items is None:
            done[id(value)] = items = kind(rebuilt)
        else:
            items.extend(rebuilt)
        return items
    done[id(value)] = mapping = kind()
    for key, item in value.items():
        mapping[key] = _rebuilt(item, copies, done)
    for name, item in getattr(value, "__dict__", {}).items():  # `_metadata` of a state_dict
        setattr(mapping, name, _rebuilt(item, copies, done))
    return mapping
