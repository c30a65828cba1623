"""Dispatch: the registry of backends, the choice of a backend for a call, and a cache of earlier choices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from widekernel.errors import ArgumentError, WidekernelError, nearest
from widekernel.ops import call_trace, recording
from widekernel.ops.backends.base import Backend, Operator
from widekernel.ops.backends.native import NativeBackend
from widekernel.ops.backends.reference import ReferenceBackend
from widekernel.ops.backends.torch_conv import TorchConvBackend
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.cpu import library
from widekernel.ops.problem import DEPTHWISE_BRANCHES, DEPTHWISE_WEIGHT_GRAD, Problem, allows_tf32, in_layout

MOST_CHOICES = 4096
"""Number of choices that are cached. Programs with more shapes repeat some choices."""


class NoBackendError(WidekernelError, RuntimeError):
    """No backend can compute the call; the message lists every reason."""


class BackendChoice:
    """The backend and the operator chosen for a problem. Calling it computes the problem and records it in open traces.

    Attributes:
        backend: name of the chosen backend.
        problem: the problem that it computes.
        operator: the operator that the backend has prepared.
    """

    __slots__ = ("backend", "operator", "problem")

    def __init__(self, backend: Backend, problem: Problem) -> None:
        operator = backend.prepare(problem)
        self.backend, self.problem = backend.name, problem
        self.operator = _isolated(operator, problem) if backend.calls_pytorch else operator

    def __call__(self, *arguments: Any) -> Any:
        """Compute one call; the arguments are those of `backends.base.Operator`."""
        if call_trace.OPEN_TRACES:
            call_trace.record(self.backend, self.problem)
        if recording.OPEN:
            recording.note_event(partial(call_trace.record, self.backend, self.problem))
        return self.operator(*arguments)


class Registry:
    """The backends in order of preference, and the choices made among them.

    Only the choices change: registering a backend makes a new registry, so that no choice outlives the list of backends
    that it was made from.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.backends = tuple(backends)
        self.choices: dict[Hashable, Any] = {}

    def remember(self, key: Hashable, choice: Any) -> None:
        """Keep a choice under the key that `dispatch_key` made."""
        if len(self.choices) >= MOST_CHOICES:
            self.choices.clear()
        self.choices[key] = choice


registry = Registry([NativeBackend(), TritonBackend(), TorchConvBackend(), ReferenceBackend()])
_LOCK = threading.Lock()


def register(backend: Backend, before: str | None = None) -> None:
    """Add a backend in front of the one named `before`, by default in front of all.

    Raises:
        ArgumentError: if `backend` is not an instance of `Backend`, if its name is taken, or if no backend has the name
            `before`.
    """
    global registry
    if not isinstance(backend, Backend):
        but = ", not the class itself" if isinstance(backend, type) else ""
        raise ArgumentError(f"{backend!r} is not a backend: pass an instance of a subclass of widekernel.ops.Backend{but}")
    with _LOCK:
        names = backends()
        if backend.name in names:
            raise ArgumentError(f"a backend named {backend.name!r} is already registered: choose another name")
        if before is not None and before not in names:
            raise ArgumentError(f"no backend is named {before!r}: the backends are {', '.join(names)}")
        place = 0 if before is None else names.index(before)
        registry = Registry([*registry.backends[:place], backend, *registry.backends[place:]])


def unregister(name: str) -> None:
    """Remove the registered backend of that name."""
    global registry
    with _LOCK:
        registry = Registry([backend for backend in registry.backends if backend.name != name])


def backends() -> tuple[str, ...]:
    """Return the names of the backends, the preferred one first."""
    return tuple(backend.name for backend in registry.backends)


def dispatch_key(op: str, x: Tensor, *details: Hashable) -> tuple[Hashable, ...]:
    """Return everything that the choice for a call depends on; equal keys mean equal problems.

    Args:
        op: the operator.
        x: its first image.
        details: kernel sizes, anchors, backend and algorithm.
    """
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if x.is_cuda:  # a machine may have several kinds of GPU
        return op, x.shape, x.dtype, last, x.device, allows_tf32(x), *details
    return op, x.shape, x.dtype, last, x.device, torch.get_num_threads(), library.load().isa, *details


def choose(key: Hashable, problem: Problem, backend: str | None) -> BackendChoice:
    """Choose a backend for a problem, prepare the operator and remember the choice.

    Args:
        key: from `dispatch_key`.
        problem: the problem to compute.
        backend: name of the backend that the call asks for, or None.

    Raises:
        NoBackendError: as `select`.
    """
    known = registry
    choice = BackendChoice(select(problem, backend), problem)
    known.remember(key, choice)
    return choice


def choose_fused(
    key: Hashable, problem: Problem, backend: str | None, branch_by_branch: Operator
) -> BackendChoice | Operator:
    """Choose a backend that computes all branches of a problem in one call; if there is none, choose `branch_by_branch`.

    Raises:
        NoBackendError: if no backend has the requested name.
    """
    known = registry
    fused = select_fused(problem, backend)
    choice = branch_by_branch if fused is None else BackendChoice(fused, problem)
    known.remember(key, choice)
    return choice


def select(problem: Problem, backend: str | None = None) -> Backend:
    """Return the first backend without a reason against `problem`, or the backend named `backend`.

    Raises:
        NoBackendError: if no backend can compute it, or the named one cannot; the message lists every reason.
    """
    if backend is not None:
        named = _named(backend)
        if not _can_run(named, problem):
            raise NoBackendError(f"{backend} cannot compute {problem}: {'; '.join(reasons_against(named, problem))}")
        return named
    for candidate in registry.backends:
        if not reasons_against(candidate, problem):
            return candidate
    reasons = "\n".join(f"  {b.name}: {'; '.join(reasons_against(b, problem))}" for b in registry.backends)
    raise NoBackendError(f"no backend can compute {problem}:\n{reasons}")


def select_fused(problem: Problem, backend: str | None = None) -> Backend | None:
    """Return the backend that computes a problem of several branches in one call, or None if they need separate calls.

    This is the first backend that has the operator and no reason against the problem, or the named one if it has the
    operator and can run it. To keep the order of preference, backends after one that accepts every single branch are not
    considered.

    Raises:
        NoBackendError: if no backend has that name.
    """
    if backend is not None:
        named = _named(backend)
        return named if _can_run(named, problem) else None
    for candidate in registry.backends:
        if not reasons_against(candidate, problem):
            return candidate
        if not any(reasons_against(candidate, branch) for branch in problem.branches()):
            return None
    return None


def reasons_against(backend: Backend, problem: Problem) -> list[str]:
    """List the reasons of a backend against a problem, including that it lacks the operator or dilations."""
    if problem.op not in backend.operators:
        return [f"it does not implement {problem.op}"]
    if problem.dilated and not backend.computes_dilated:
        return [f"it computes kernels without gaps between the taps, not with dilations {problem.dilations}"]
    return backend.reasons_against(problem)


def _can_run(backend: Backend, problem: Problem) -> bool:
    if problem.op not in backend.operators or (problem.dilated and not backend.computes_dilated):
        return False
    return backend.can_run(problem)


def _named(name: str) -> Backend:
    for candidate in registry.backends:
        if candidate.name == name:
            return candidate
    raise NoBackendError(f"unknown backend {name!r}: the backends are {', '.join(backends())}.{nearest(name, backends())}")


def _isolated(operator: Operator, problem: Problem) -> Callable[..., Any]:
    """Wrap an operator that calls PyTorch's: autocast off, and results in the layout of the input."""
    is_nhwc = problem.channels_last and problem.op != DEPTHWISE_WEIGHT_GRAD
    layout = torch.channels_last if is_nhwc else torch.contiguous_format

    def run(*arguments: Any) -> Any:
        with torch.autocast(problem.device, enabled=False):
            result = operator(*arguments)
            return [in_layout(y, layout) for y in result] if problem.op == DEPTHWISE_BRANCHES else in_layout(result, layout)

    return run
