"""Spans of time: which modules and native calls ran in a call of a network, when, and within which others.

Modules are observed where they are called, and native calls in the classes that make them. Hooks and dispatch modes would
change what runs: a block with a hook is not fused.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.ops import cpu
from widekernel.ops.cpu.sequence import Sequence
from widekernel.transforms.acceleration.fusion import FusedBlock, FusedChain

Clock = Callable[[], float]


@dataclass
class Span:
    """One call.

    Attributes:
        path: name of the module in its network, or of the innermost module around a native call.
        owner: the module, or the object that makes the native call.
        is_native: whether it is a native call.
        inputs: its arguments.
        output: its result; for a native call of a sequence, a tensor without data of the same shape.
        seconds: time without that of the spans inside.
        has_native: whether native calls were made inside, in modules or directly.
    """

    path: str
    owner: Any
    is_native: bool
    inputs: tuple[Any, ...] = ()
    output: Any = None
    seconds: float = 0.0
    has_native: bool = False


class Spans:
    """Records the spans of a network's calls while it is `observing`.

    Args:
        network: the network.
        clock: returns the time in seconds.
    """

    def __init__(self, network: nn.Module, clock: Clock = time.perf_counter) -> None:
        self._names = {module: name for name, module in network.named_modules()}
        self._clock = clock
        self._open: list[Span] = []
        self._last = 0.0
        self.found: list[Span] = []

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Record every call inside the block, of this thread."""
        with ExitStack() as undo:
            for observed in (nn.Module, FusedBlock, FusedChain):
                undo.enter_context(self._replaced(observed, self._of_module))
            for kind in native_callers():
                undo.enter_context(self._replaced(kind, self._of_native_call))
            undo.enter_context(self._one_by_one())
            yield

    def take(self) -> list[Span]:
        """Return the spans recorded so far, and forget them."""
        found, self.found = self.found, []
        return found

    @contextmanager
    def _replaced(self, kind: type, span_of: Callable[[Any], Span | None]) -> Iterator[None]:
        original: Any = vars(kind)["__call__"]

        def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
            span = span_of(owner)
            # A fused block may go on to the call of its own class.
            if span is None or (self._open and self._open[-1].owner is owner):
                return original(owner, *args, **kwargs)
            self._begin(span)
            try:
                span.output = original(owner, *args, **kwargs)
            finally:
                self._end()
            span.inputs = (*args, *kwargs.values())
            return span.output

        setattr(kind, "__call__", call)  # noqa: B010
        try:
            yield
        finally:
            setattr(kind, "__call__", original)  # noqa: B010

    @contextmanager
    def _one_by_one(self) -> Iterator[None]:
        """Make the native calls of sequences one by one, with a span for each."""
        original = Sequence.__call__

        def call(sequence: Sequence, x: Tensor) -> Tensor:
            y, calls = sequence.one_by_one(x)
            for owner, shape, make in calls:
                span = self._of_native_call(owner)
                if span is None:
                    make()
                    continue
                self._begin(span)
                try:
                    make()
                finally:
                    self._end()
                span.output = torch.empty(shape, device="meta")
            return y

        setattr(Sequence, "__call__", call)  # noqa: B010
        try:
            yield
        finally:
            setattr(Sequence, "__call__", original)  # noqa: B010

    def _of_module(self, module: Any) -> Span | None:
        name = self._names.get(module)
        return None if name is None else Span(name, module, False)

    def _of_native_call(self, owner: Any) -> Span | None:
        # A native call inside another span of native code is a part of it.
        if not self._open or self._open[-1].is_native:
            return None
        for around in self._open:
            around.has_native = True
        return Span(self._open[-1].path, owner, True)

    def _begin(self, span: Span) -> None:
        self._charge()
        self._open.append(span)

    def _end(self) -> None:
        self._charge()
        self.found.append(self._open.pop())

    def _charge(self) -> None:
        """Add the time since the last event to the innermost span."""
        now = self._clock()
        if self._open:
            self._open[-1].seconds += now - self._last
        self._last = now


def native_callers() -> list[type]:
    """Return the classes whose instances make one native call when they are called."""
    # Names that begin with an underscore are not Python modules: the native library is one of them.
    names = [found.name for found in pkgutil.iter_modules(cpu.__path__) if not found.name.startswith("_")]
    modules = [importlib.import_module(f"{cpu.__name__}.{name}") for name in names]
    return [
        kind
        for module in modules
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if kind.__module__ == module.__name__ and "__call__" in vars(kind) and kind is not Sequence
    ]
