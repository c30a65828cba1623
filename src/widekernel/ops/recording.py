"""Recordings: native calls, in the order in which they were made, to be made again without Python."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class Value:
    """A tensor that a native call has read or written. It does not keep the memory, which may hold another tensor later.

    Values are equal if they begin at the same address of the same memory.

    Attributes:
        memory: a weak reference to the memory, which differs from that to any other, even if the address is used again.
        address: the address.
        shape: the shape.
        size: the bytes of the elements.
    """

    memory: StorageWeakRef
    address: int
    shape: tuple[int, ...] = field(compare=False)
    size: int = field(compare=False)

    @classmethod
    def of(cls, x: Tensor) -> Value:
        """Describe a tensor."""
        return cls(StorageWeakRef(x.untyped_storage()), x.data_ptr(), tuple(x.shape), x.numel() * x.element_size())


class NativeCall(NamedTuple):
    """A native call.

    Attributes:
        kind: one of the kinds of steps in `ops.cpu.library`.
        owner: the object that made it.
        call: a reference to the C structure with its sizes and strides.
        x: its input.
        y: its result.
        packed: address of its packed weights; None for none.
        factors: what the pixels of each image are multiplied by; None for none.
        residual: what is added to the result; None for none.
        taps: array of the addresses of its kernels; None for none.
        constants: the tensors at the addresses that do not change from call to call: kernels, factors and summands.
        scale: address of factors of the result; None for none.
        shift: address of summands of the result; None for none.
        relu: whether ReLU is applied to the result.
        partial: the C structure with the channels that are read; None for all.
    """

    kind: int
    owner: Any
    call: Any
    x: Value
    y: Value
    packed: Any = None
    factors: Value | None = None
    residual: Value | None = None
    taps: Any = None
    constants: tuple[Tensor, ...] = ()
    scale: int | None = None
    shift: int | None = None
    relu: bool = False
    partial: Any = None


@dataclass
class Recording:
    """The native calls that one thread has made.

    Attributes:
        thread: the thread.
        calls: the calls.
        events: functions that note these calls in open traces.
    """

    thread: int
    calls: list[NativeCall] = field(default_factory=list)
    events: list[Callable[[], None]] = field(default_factory=list)


OPEN: list[Recording] = []
"""The open recordings. Callers of `note` check this list first, because it is nearly always empty."""
_LOCK = threading.Lock()


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the native calls that this thread makes inside the block."""
    made = Recording(threading.get_ident())
    with _LOCK:
        OPEN.append(made)
    try:
        yield made
    finally:
        with _LOCK:
            OPEN[:] = [other for other in OPEN if other is not made]


def note(
    kind: int,
    owner: Any,
    call: Any,
    x: Tensor,
    y: Tensor,
    factors: Tensor | None = None,
    residual: Tensor | None = None,
    **rest: Any,
) -> None:
    """Add a call to the open recordings of this thread.

    Args:
        kind: as in `NativeCall`, like all that follow.
        owner: the object that made the call.
        call: the C structure.
        x: the input.
        y: the result.
        factors: what the pixels of each image are multiplied by.
        residual: what is added to the result.
        rest: other attributes of `NativeCall`.
    """
    values = [None if value is None else Value.of(value) for value in (factors, residual)]
    noted = NativeCall(kind, owner, call, Value.of(x), Value.of(y), factors=values[0], residual=values[1], **rest)
    for made in _own():
        made.calls.append(noted)


def note_event(event: Callable[[], None]) -> None:
    """Add a function that notes the call in open traces to the open recordings of this thread."""
    for made in _own():
        made.events.append(event)


def _own() -> list[Recording]:
    thread = threading.get_ident()
    with _LOCK:
        return [made for made in OPEN if made.thread == thread]
