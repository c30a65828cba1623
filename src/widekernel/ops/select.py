"""Which backend computes an operator call, why not the others, and a record of what ran.

A backend is a module or an object with `name`, `reasons_against(problem)`, `can_run(problem)` and the two operators. It
answers with the list of its reasons instead of a yes or no, so that an error, or `explain`, can say what to change. It may
also have `prepare(problem)`, which gives the operator with all that follows from the problem decided, and
`describe(problem)`, which says in words what was decided. A prepared `depthwise_sum` is called with a scale and a rectifier
too, `(x, kernels, anchors, bias, scale, relu)`; after one that is not, both are applied here.

A backend may have the fused operators `depthwise_branches(x, kernels, anchors) -> list of Tensors` and
`depthwise_sum_of_branches(xs, kernels, anchors) -> Tensor`, either or both. It is asked about such a problem only if it has
the operator. What no backend computes fused is computed branch by branch, each an ordinary problem of `depthwise_sum`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from widekernel.errors import ArgumentError, WidekernelError, nearest
from widekernel.ops import portable, reference
from widekernel.ops.cpu import native
from widekernel.ops.gpu import backend as gpu
from widekernel.ops.problem import DEPTHWISE_BRANCHES, DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, Anchor, Problem, in_layout


class Backend(Protocol):
    """What `select` asks of a backend."""

    name: str

    def reasons_against(self, problem: Problem) -> list[str]:
        """List why the backend cannot, or should not unasked, compute `problem`; empty if it will."""

    def can_run(self, problem: Problem) -> bool:
        """Whether the backend can compute `problem` when it is asked for by name."""

    def depthwise_sum(self, x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor | None) -> Tensor:
        """Compute the sum of the rectangles, in the layout of `x`."""

    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
        """Compute the gradient of one rectangle, (C, 1, kh, kw)."""


class NoBackendError(WidekernelError, RuntimeError):
    """No backend takes the call; the message lists every reason."""


@dataclass(frozen=True)
class Explanation:
    """The backend chosen for a problem, how it computes it, and the reasons that the others gave against themselves."""

    problem: Problem
    backend: str
    reasons: dict[str, list[str]]
    details: str = ""

    def __str__(self) -> str:
        lines = [f"{self.problem}", f"  runs on: {self.backend}{f' ({self.details})' if self.details else ''}"]
        lines += [f"  not on {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        return "\n".join(lines)


@dataclass
class Trace:
    """The calls that ran inside a `trace()` block, in order."""

    calls: list[tuple[str, Problem]] = field(default_factory=list)

    def backends(self, op: str | None = None) -> list[str]:
        """Name the backend of every recorded call, or of those of one operator."""
        return [backend for backend, problem in self.calls if op in (None, problem.op)]


# In the order of preference.
_BACKENDS: list[Any] = [native, gpu, portable, reference]
# Choices made for a call, by what they depend on: shapes, types, layout, threads, and the list of backends.
_PREPARED: dict[Any, Any] = {}
_MOST_PREPARED = 4096
_TRACES: list[Trace] = []
_LOCK = threading.Lock()


def register(backend: Any, before: str | None = None) -> None:
    """Add a backend in front of the one named `before`, by default in front of all.

    Raises:
        ArgumentError: if its name is taken, or there is no backend `before`.
    """
    names = backends()
    if backend.name in names:
        raise ArgumentError(f"there is a backend {backend.name!r} already: choose another name")
    if before is not None and before not in names:
        raise ArgumentError(f"there is no backend {before!r}: the backends are {', '.join(names)}")
    with _LOCK:
        _BACKENDS.insert(0 if before is None else names.index(before), backend)


def unregister(name: str) -> None:
    """Remove a backend that was registered."""
    with _LOCK:
        _BACKENDS[:] = [backend for backend in _BACKENDS if backend.name != name]


def backends() -> tuple[str, ...]:
    """Name the backends, the preferred one first."""
    return tuple(backend.name for backend in _BACKENDS)


def select(problem: Problem, backend: str | None = None) -> Any:
    """Give the first backend without a reason against `problem`, or the one asked for by name.

    Raises:
        NoBackendError: if none, or not the one asked for, can compute it; the message lists every reason.
    """
    if backend is not None:
        return _by_name(problem, backend)
    for candidate in _BACKENDS:
        if not candidate.reasons_against(problem):
            return candidate
    reasons = "\n".join(f"  {b.name}: {'; '.join(b.reasons_against(problem))}" for b in _BACKENDS)
    raise NoBackendError(f"no backend can compute {problem}:\n{reasons}")


def fused(problem: Problem, backend: str | None = None) -> Any | None:
    """Give the backend that computes a problem of several branches at once, or None if they are computed one by one.

    It is the first that has the operator and no reason against the problem, or the one asked for by name if that has it and
    can. A backend further down than one that takes every branch alone is not asked: the order of preference holds.

    Raises:
        NoBackendError: if there is no backend of the name asked for.
    """
    if backend is not None:
        candidate = _named(backend)
        return candidate if hasattr(candidate, problem.op) and candidate.can_run(problem) else None
    for candidate in _BACKENDS:
        if hasattr(candidate, problem.op) and not candidate.reasons_against(problem):
            return candidate
        if not any(candidate.reasons_against(alone) for alone in problem.branches()):
            return None
    return None


def prepared(key: tuple[Any, ...]) -> Any:
    """Give what was remembered by the same key, None if there is nothing or what it depends on has changed since."""
    return _PREPARED.get((key, torch.get_num_threads(), *_BACKENDS))


def remember(key: tuple[Any, ...], value: Any) -> Any:
    """Keep `value` for `prepared`, and give it."""
    if len(_PREPARED) >= _MOST_PREPARED:
        _PREPARED.clear()
    # The backends themselves and not their ids, which others may get once an object is gone.
    _PREPARED[(key, torch.get_num_threads(), *_BACKENDS)] = value
    return value


def prepare(
    key: tuple[Any, ...], problem: Problem, backend: str, one_by_one: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Choose the backend of `problem` and give an operator that records its calls and computes them.

    Args:
        key: what the caller knows the problem by; equal keys must stand for equal problems.
        problem: what is to be computed.
        backend: the name of the one asked for, or "".
        one_by_one: for a problem of several branches the operator that calls `depthwise_sum` for each; it is given where no
            backend is `fused`.

    Raises:
        NoBackendError: as `select`.
    """
    chosen = select(problem, backend or None) if one_by_one is None else fused(problem, backend or None)
    if chosen is None:
        return remember(key, one_by_one)
    operator = chosen.prepare(problem) if hasattr(chosen, "prepare") else _in_pytorch(chosen, problem)

    def run(*arguments: Any) -> Any:
        record(chosen.name, problem)
        return operator(*arguments)

    return remember(key, run)


def _in_pytorch(chosen: Any, problem: Problem) -> Callable[..., Any]:
    """Wrap the operator of a backend that is written in PyTorch's."""
    operator = getattr(chosen, problem.op)
    is_nhwc = problem.channels_last and problem.op != DEPTHWISE_WEIGHT_GRAD
    layout = torch.channels_last if is_nhwc else torch.contiguous_format

    def run(*arguments: Any) -> Any:
        # The arguments have the type to compute in; PyTorch's convolutions must not convert them once more.
        with torch.autocast(problem.device, enabled=False):
            if problem.op == DEPTHWISE_SUM:
                return in_layout(_with_epilogue(operator, *arguments), layout)
            result = operator(*arguments)
            return [in_layout(y, layout) for y in result] if problem.op == DEPTHWISE_BRANCHES else in_layout(result, layout)

    return run


def _with_epilogue(
    operator: Any, x: Tensor, kernels: Any, anchors: Any, bias: Tensor | None, scale: Tensor | None, relu: bool
) -> Tensor:
    if scale is None:
        return reference.epilogue(operator(x, kernels, anchors, bias), None, None, relu)
    return reference.epilogue(operator(x, kernels, anchors, None), scale, bias, relu)


def explain_problem(problem: Problem, backend: str | None = None) -> Explanation:
    """Say which backend would compute `problem` and why the others would not."""
    return _explanation(select(problem, backend), problem, backend)


def explain_branches(problem: Problem, backend: str | None = None) -> list[Explanation]:
    """Say the same of a problem of several branches: one explanation if a backend is `fused`, else one a branch."""
    chosen = fused(problem, backend)
    if chosen is not None:
        return [_explanation(chosen, problem, backend)]
    why = [f"one branch of {problem.op}"]
    for other in _BACKENDS:
        if hasattr(other, problem.op) and backend in (None, other.name):
            reasons = other.reasons_against(problem) or ["a backend in front of it takes every branch"]
            why.append(f"not fused on {other.name}: {', '.join(reasons)}")
    alone = [explain_problem(branch, backend) for branch in problem.branches()]
    return [replace(e, details="; ".join([*([e.details] if e.details else []), *why])) for e in alone]


def _explanation(chosen: Any, problem: Problem, backend: str | None) -> Explanation:
    reasons = {}
    for other in _BACKENDS:
        if other is not chosen:
            why = other.reasons_against(problem) if hasattr(other, problem.op) else [f"it has no {problem.op}"]
            reasons[other.name] = why or [f"{chosen.name} comes first" if backend is None else f"{backend} was asked for"]
    describe = getattr(chosen, "describe", None)
    return Explanation(problem, chosen.name, reasons, describe(problem) if describe else "")


def record(backend: str, problem: Problem) -> None:
    """Tell the open traces that `backend` computes `problem`."""
    if _TRACES:
        with _LOCK:
            for trace_ in _TRACES:
                trace_.calls.append((backend, problem))


@contextmanager
def trace() -> Iterator[Trace]:
    """Record every operator call made inside the block, on any thread, with the backend that computed it."""
    recorded = Trace()
    with _LOCK:
        _TRACES.append(recorded)
    try:
        yield recorded
    finally:
        with _LOCK:
            _TRACES[:] = [open_trace for open_trace in _TRACES if open_trace is not recorded]


def _by_name(problem: Problem, name: str) -> Any:
    candidate = _named(name)
    if not candidate.can_run(problem):
        raise NoBackendError(f"{name} cannot compute {problem}: {'; '.join(candidate.reasons_against(problem))}")
    return candidate


def _named(name: str) -> Any:
    for candidate in _BACKENDS:
        if candidate.name == name:
            return candidate
    raise NoBackendError(f"unknown backend {name!r}: the backends are {', '.join(backends())}.{nearest(name, backends())}")
