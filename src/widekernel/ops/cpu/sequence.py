"""Sequences: recorded native calls that one call of the library makes again, on other images of the same shape.

After a native call that reads megabytes, the caches hold neither the code nor the objects of Python, so that a call of a few
functions takes tens of microseconds. A sequence needs Python only once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from widekernel.ops import call_trace
from widekernel.ops.cpu import library as native
from widekernel.ops.recording import NativeCall, Recording, Value

_X, _Y, _SPACE = range(3)
"""The bases of addresses: the input, the result, and the memory for all other values."""
_NOWHERE = native.Place(-1, 0)
_ALIGNMENT = 64


class UnrecordableError(Exception):
    """Native calls alone do not lead from the input to the result; the message says why."""


class Sequence:
    """Native calls that lead from one tensor to another, in their order.

    Args:
        recorded: the calls that were made, and all that led from `x` to `y`.
        x: the input.
        y: the result.
        addresses: the addresses from which the calls may read kernels, factors and summands every time. Whoever calls the
            sequence must know that the tensors there have kept their place, shape, strides and type.

    Raises:
        UnrecordableError: if a call reads what no call before has written, or a kernel, factor or summand lies at another
            address, such as a copy of it; or if `y` is not the result of the last call.
    """

    def __init__(self, recorded: Recording, x: Tensor, y: Tensor, addresses: Container[int]) -> None:
        calls, result = recorded.calls, Value.of(y)
        if not calls or result != calls[-1].y or result.size != calls[-1].y.size:
            raise UnrecordableError("the result is not that of the last native call")
        if not all(tensor.data_ptr() in addresses for call in calls for tensor in call.constants):
            raise UnrecordableError("a native call reads a copy of a kernel or bias, which does not follow later changes")
        self._library = native.load()
        self._run = self._library.calls.wk_run_steps
        places, self._space = _places(calls, Value.of(x))
        self._steps = (native.Step * len(calls))(*[_step(call, places) for call in calls])
        # What the steps point to, and the shapes of the results.
        self._kept = [(call.owner, call.call, call.taps, call.partial, call.constants) for call in calls]
        self._shapes = [call.y.shape for call in calls]
        self._shape, self._strides = tuple(y.shape), y.stride()
        self._events = recorded.events

    def __call__(self, x: Tensor) -> Tensor:
        """Make the calls.

        Args:
            x: an input with the type, shape and strides of that of the recording.

        Returns:
            the result, without gradients.

        Raises:
            NativeMemoryError: if there is no memory for the working space of a call.
        """
        y, bases, _space = self._memory(x)
        error = self._run(self._steps, len(self._steps), bases)
        if error:
            self._library.check(error)
        self._note()
        return y

    def __len__(self) -> int:
        """Return the number of calls."""
        return len(self._steps)

    def one_by_one(self, x: Tensor) -> tuple[Tensor, Iterator[tuple[Any, tuple[int, ...], Callable[[], None]]]]:
        """Return the result; and for each call its owner, the shape of its result, and a function that makes it.

        The functions must be called in turn.
        """
        y, bases, space = self._memory(x)
        self._note()

        def make(i: int) -> None:
            assert space is not None  # which must live until the last call
            self._library.check(self._run(ctypes.byref(self._steps[i]), 1, bases))

        return y, ((kept[0], self._shapes[i], partial(make, i)) for i, kept in enumerate(self._kept))

    def _note(self) -> None:
        if call_trace.OPEN_TRACES:
            for event in self._events:
                event()

    def _memory(self, x: Tensor) -> tuple[Tensor, Any, Tensor]:
        y = torch.empty_strided(self._shape, self._strides, dtype=torch.float32, device="cpu")
        space = torch.empty(self._space, dtype=torch.uint8, device="cpu")
        return y, (native.Address * 3)(x.data_ptr(), y.data_ptr(), space.data_ptr()), space


def _places(calls: list[NativeCall], x: Value) -> tuple[dict[Value, native.Place], int]:
    """Find a place for every value; return the places, and the bytes of all.

    A value takes the first gap among those that are still needed when it is computed.
    """
    last = {read: i for i, call in enumerate(calls) for read in (call.x, call.factors, call.residual) if read is not None}
    places = {x: native.Place(_X, 0)}
    taken: list[tuple[int, int, int]] = []
    space = 0
    for i, call in enumerate(calls):
        if call.y in places:
            raise UnrecordableError("two native calls have written to the same place")
        if i == len(calls) - 1:
            places[call.y] = native.Place(_Y, 0)
            break
        size = -(-call.y.size // _ALIGNMENT) * _ALIGNMENT
        taken = sorted(entry for entry in taken if entry[2] >= i)
        start = 0
        for begin, end, _ in taken:
            if start + size <= begin:
                break
            start = end
        places[call.y] = native.Place(_SPACE, start)
        taken.append((start, start + size, last.get(call.y, i)))
        space = max(space, start + size)
    return places, space


def _step(call: NativeCall, places: dict[Value, native.Place]) -> native.Step:
    x, factors, residual, y = (
        _NOWHERE if value is None else places.get(value) for value in (call.x, call.factors, call.residual, call.y)
    )
    if None in (x, factors, residual):
        raise UnrecordableError("a native call reads what none before it has written")
    address = ctypes.addressof(call.call._obj)
    taps = None if call.taps is None else ctypes.addressof(call.taps)
    partial = None if call.partial is None else ctypes.addressof(call.partial)
    of_values = (x, factors, residual, y)
    return native.Step(call.kind, call.relu, address, call.packed, *of_values, taps, call.scale, call.shift, partial)
