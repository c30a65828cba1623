"""Backends for tests, all based on the reference: a minimal one, and some with fused operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from tests.ops.cases import Case
from widekernel import ops
from widekernel.ops import dispatch, reference
from widekernel.ops.backends.base import Backend, Operator
from widekernel.ops.backends.reference import ReferenceBackend, with_dilations
from widekernel.ops.backends.torch_conv import TorchConvBackend
from widekernel.ops.problem import DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, Problem

Anchors = Sequence[tuple[int, int]]
BRANCHES, SUM_OF_BRANCHES = "depthwise_branches", "depthwise_sum_of_branches"


class TestBackend(Backend):
    """The reference under another name, with given reasons against itself."""

    __test__ = False
    computes_dilated = True

    def __init__(self, name: str = "test", *reasons: str, only: str | None = None) -> None:
        self._name, self.reasons, self.only = name, list(reasons), only
        self.compute: dict[str, Operator] = {
            DEPTHWISE_SUM: reference.depthwise_sum,
            DEPTHWISE_WEIGHT_GRAD: reference.depthwise_weight_grad,
        }

    @property
    def name(self) -> str:
        return self._name

    def reasons_against(self, problem: Problem) -> list[str]:
        wrong = [f"{problem.op} is not {self.only}"] if self.only not in (None, problem.op) else []
        return [*self.reasons, *wrong]

    def prepare(self, problem: Problem) -> Operator:
        return with_dilations(self.compute[problem.op], problem)


class Fused(TestBackend):
    """Backend with both fused operators; `received` lists the arguments of each call to them."""

    operators = frozenset({DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, BRANCHES, SUM_OF_BRANCHES})

    def __init__(self, name: str = "fused", reasons: Sequence[str] = (), against: Sequence[str] = ()) -> None:
        super().__init__(name, *reasons)
        self.against = against
        self.received: list[tuple[Any, ...]] = []
        self.compute |= {BRANCHES: self.branches, SUM_OF_BRANCHES: self.sum_of_branches}

    def reasons_against(self, problem: Problem) -> list[str]:
        return self.reasons if problem.op in self.against else []

    def branches(
        self, x: Tensor, kernels: Sequence[Tensor], anchors: Anchors, dilations: Sequence[int] | None = None
    ) -> list[Tensor]:
        self.received.append((BRANCHES, x, kernels, anchors))
        return self.separately([x] * len(kernels), kernels, anchors, dilations)

    def sum_of_branches(
        self, xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Anchors, dilations: Sequence[int] | None = None
    ) -> Tensor:
        self.received.append((SUM_OF_BRANCHES, xs, kernels, anchors))
        parts = self.separately(xs, kernels, anchors, dilations)
        return sum(parts[1:], parts[0])

    def separately(
        self, xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Anchors, dilations: Sequence[int] | None
    ) -> list[Tensor]:
        rects = zip(xs, kernels, anchors, dilations or [1] * len(kernels))
        return [reference.depthwise_sum(x, [k], [a], dilations=(d,)) for x, k, a, d in rects]


class OnlyForward(Fused):
    """Backend without the sum of branches."""

    operators = Fused.operators - {SUM_OF_BRANCHES}


class OnlyBackward(Fused):
    """Backend without the branches."""

    operators = Fused.operators - {BRANCHES}


class Kernels(Fused):
    """Backend whose operators run unchanged, as those with real kernels do."""

    calls_pytorch = False

    def describe(self, problem: Problem) -> str:
        return f"{len(problem.kernels)} fused"


@contextmanager
def registered(backend: Fused, before: str | None = None) -> Iterator[Fused]:
    """Register a backend inside the block."""
    ops.register(backend, before)
    try:
        yield backend
    finally:
        ops.unregister(backend.name)


def use_only(monkeypatch: pytest.MonkeyPatch, *backends: Backend) -> None:
    """Make these the only backends until the end of the test."""
    monkeypatch.setattr(dispatch, "registry", dispatch.Registry(backends))


def use_portable_and_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep only the backends that run everywhere, on which the rules of selection are tested."""
    use_only(monkeypatch, TorchConvBackend(), ReferenceBackend())


def several(case: Case) -> Case:
    """Add branches to those of a case, so that there are always several."""
    dilations = None if case.dilations is None else (*case.dilations, 2, 1)
    return Case(case.name, case.shape, (*case.rects, (3, 2, (1, 1)), (1, 5, None)), dilations)
