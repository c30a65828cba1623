"""Backends with fused operators for branches, made of the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tests.ops.cases import Case
from widekernel import ops
from widekernel.ops import reference
from widekernel.ops.problem import Problem

Anchors = Sequence[tuple[int, int]]
BRANCHES, SUM_OF_BRANCHES = "depthwise_branches", "depthwise_sum_of_branches"


class Fused:
    """The reference, with both fused operators; `received` lists the arguments of each call of one of them."""

    def __init__(self, name: str = "fused", reasons: Sequence[str] = (), against: Sequence[str] = ()) -> None:
        self.name, self.reasons, self.against = name, list(reasons), against
        self.received: list[tuple[Any, ...]] = []

    def reasons_against(self, problem: Problem) -> list[str]:
        return self.reasons if problem.op in self.against else []

    def can_run(self, problem: Problem) -> bool:
        return not self.reasons_against(problem)

    depthwise_sum = staticmethod(reference.depthwise_sum)
    depthwise_weight_grad = staticmethod(reference.depthwise_weight_grad)

    def depthwise_branches(self, x: Tensor, kernels: Sequence[Tensor], anchors: Anchors) -> list[Tensor]:
        self.received.append((BRANCHES, x, kernels, anchors))
        return [reference.depthwise_sum(x, [kernel], [anchor], None) for kernel, anchor in zip(kernels, anchors)]

    def depthwise_sum_of_branches(self, xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Anchors) -> Tensor:
        self.received.append((SUM_OF_BRANCHES, xs, kernels, anchors))
        parts = [reference.depthwise_sum(x, [k], [a], None) for x, k, a in zip(xs, kernels, anchors)]
        return sum(parts[1:], parts[0])


class OnlyForward(Fused):
    """Has no sum of branches."""

    depthwise_sum_of_branches = property()


class OnlyBackward(Fused):
    """Has no branches."""

    depthwise_branches = property()


class Prepared(Fused):
    """Gives its operators out prepared."""

    def prepare(self, problem: Problem) -> Any:
        return getattr(self, problem.op)

    def describe(self, problem: Problem) -> str:
        return f"{len(problem.kernels)} at once"


@contextmanager
def registered(backend: Fused, before: str | None = None) -> Iterator[Fused]:
    ops.register(backend, before)
    try:
        yield backend
    finally:
        ops.unregister(backend.name)


def several(case: Case) -> Case:
    """Add branches to those of a case, so that none has only one."""
    return Case(case.name, case.shape, (*case.rects, (3, 2, (1, 1)), (1, 5, None)))
