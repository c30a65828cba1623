"""Triton's interpreter with bounds checks for every tensor: what compute-sanitizer does on a GPU, without a GPU.

Interpreted kernels read and write the memory of this process, where an address outside a tensor usually belongs to
something else: a load returns a number that may be multiplied by zero later, a store damages unrelated data. Comparing
results finds neither. Here every tensor that is passed to a launch appears to the kernel at a separate range of addresses,
far from all others, so an address identifies its tensor. A launch fails if it

* loads or stores an address that is not an element of that tensor, even in the same allocation, such as beside a slice;
* stores an element twice, in whatever order programs run, or only some of the elements of a tensor;
* loads from a tensor into which it stores.

Meanwhile uninitialized memory holds NaN, so that results show what was not written, or was read before it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

_RANGE = 2**40
"""Size of the range of each tensor, which begins in its middle: no 32-bit offset leads to another range."""


class AccessError(AssertionError):
    """A launch accessed memory in a way that is not allowed."""


class Watched:
    """A tensor that appears at a separate range of addresses."""

    def __init__(self, tensor: Tensor, number: int) -> None:
        self.tensor, self.begin = tensor, number * _RANGE + _RANGE // 2
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        elements = torch.zeros(span, dtype=torch.bool)
        if span:
            # Elements that are repeated by a stride of 0 exist once.
            sizes = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride())]
            elements.as_strided(sizes, tensor.stride(), 0).fill_(True)
        self.elements = elements.numpy()
        self.stored, self.loaded = np.zeros(span, dtype=bool), False

    def __str__(self) -> str:
        return f"{self.tensor.dtype} {tuple(self.tensor.shape)} with strides {self.tensor.stride()}"

    def places(self, addresses: np.ndarray, verb: str) -> np.ndarray:
        """Convert addresses to offsets in the tensor, in elements.

        Raises:
            AccessError: if some of them are not elements of the tensor.
        """
        each = self.tensor.element_size()
        places, rest = np.divmod(addresses.astype(np.int64) - self.begin, each)
        wrong = (rest != 0) | (places < 0) | (places >= len(self.elements))
        wrong |= ~self.elements.take(places, mode="clip") if len(self.elements) else True
        if wrong.any():
            raise AccessError(
                f"{verb} outside {self}: {int(wrong.sum())} of {wrong.size} numbers, the first at {places[wrong][0]}"
            )
        return places

    def store(self, places: np.ndarray) -> None:
        """Record that elements are stored.

        Raises:
            AccessError: if one of them was stored before.
        """
        if self.stored[places].any() or len(np.unique(places)) < len(places):
            raise AccessError(f"store of an element that is stored already in {self}")
        self.stored[places] = True


class Guard:
    """Checks the accesses of interpreted kernels to memory."""

    def __init__(self) -> None:
        self.launches = 0
        self._watched: list[Watched] = []
        self._violation: AccessError | None = None

    def begin(self) -> None:
        """Start checking a new launch."""
        self._watched, self._violation = [], None

    def moved(self, tensor: Tensor) -> int:
        """Return the address at which the tensor appears to a kernel."""
        self._watched.append(Watched(tensor, len(self._watched) + 1))
        return self._watched[-1].begin

    def access(self, pointers: np.ndarray, mask: np.ndarray, verb: str) -> np.ndarray:
        """Return the actual addresses of what is loaded or stored; masked ones are zero."""
        try:
            return self._access(pointers, np.broadcast_to(mask, pointers.shape), verb)
        except AccessError as violation:
            # The interpreter wraps errors in kernels, once for every function that they call.
            self._violation = violation
            raise

    def _access(self, pointers: np.ndarray, mask: np.ndarray, verb: str) -> np.ndarray:
        memory = np.zeros(pointers.shape, dtype=np.uint64)
        addresses = pointers[mask]
        if not addresses.size:
            return memory
        number = int(addresses[0]) // _RANGE
        if not 1 <= number <= len(self._watched):
            raise AccessError(f"{verb} at {int(addresses[0]):#x}, which is in no tensor of the launch")
        watched = self._watched[number - 1]
        places = watched.places(addresses, verb)
        if verb == "store":
            watched.store(places)
        else:
            watched.loaded = True
        memory[mask] = watched.tensor.data_ptr() + places * watched.tensor.element_size()
        return memory

    def launch(self, kernel: str, run: Callable[[], None]) -> None:
        """Run a launch and check its accesses.

        Raises:
            AccessError: if an access is not allowed.
        """
        from triton.runtime.errors import InterpreterError

        self.begin()
        try:
            run()
        except InterpreterError:
            if self._violation is None:
                raise
            raise AccessError(f"{kernel}: {self._violation}") from None
        for watched in self._watched:
            left = int((watched.elements & ~watched.stored).sum())
            if watched.stored.any() and left:
                raise AccessError(f"{kernel}: {left} numbers are never stored of {watched}")
            if watched.stored.any() and watched.loaded:
                raise AccessError(f"{kernel}: loads from the tensor that it stores into, {watched}")
        self.launches += 1


@contextmanager
def guarded() -> Iterator[Guard]:
    """Check all launches of the interpreter inside the block, and fill uninitialized memory with NaN."""
    from triton.runtime import interpreter

    guard, builder, executor = Guard(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    convert, call = interpreter._implicit_cvt, executor.__call__

    def at(handle: Any, mask: Any, verb: str) -> Any:
        return interpreter.TensorHandle(guard.access(handle.data, mask.data, verb), handle.dtype)

    def guarded_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        return load(self, at(pointers, mask, "load"), mask, *others)

    def guarded_store(self: Any, pointers: Any, values: Any, mask: Any, *others: Any) -> Any:
        return store(self, at(pointers, mask, "store"), values, mask, *others)

    def moving(argument: Any) -> Any:
        converted = convert(argument)
        if isinstance(argument, Tensor):
            converted.handle.data[...] = guard.moved(argument)
        return converted

    def refused(*_: Any) -> Any:
        raise NotImplementedError("the guard supports no atomics, because results must not depend on the order of programs")

    def guarded_call(self: Any, *arguments: Any, **named: Any) -> None:
        guard.launch(self.fn.__name__, lambda: call(self, *arguments, **named))

    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", guarded_load)
        patch.setattr(builder, "create_masked_store", guarded_store)
        patch.setattr(builder, "create_atomic_rmw", refused)
        patch.setattr(builder, "create_atomic_cas", refused)
        patch.setattr(interpreter, "_implicit_cvt", moving)
        patch.setattr(executor, "__call__", guarded_call)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield guard
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
