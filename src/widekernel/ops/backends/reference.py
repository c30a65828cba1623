"""The backend that runs the definition."""

from __future__ import annotations

from functools import partial
from typing import final

from widekernel.ops import reference
from widekernel.ops.backends.base import Backend, Operator
from widekernel.ops.problem import DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, Problem

_OPERATORS: dict[str, Operator] = {
    DEPTHWISE_SUM: reference.depthwise_sum,
    DEPTHWISE_WEIGHT_GRAD: reference.depthwise_weight_grad,
}


@final
class ReferenceBackend(Backend):
    """The definition, tap by tap; it runs only when a call asks for it."""

    name = "reference"
    computes_dilated = True

    def reasons_against(self, problem: Problem) -> list[str]:
        """Return the reason why the definition never runs unless asked for."""
        return ["it is the slow definition, run only when asked for with backend='reference'"]

    def can_run(self, problem: Problem) -> bool:
        """Return True: the definition computes everything."""
        return True

    def prepare(self, problem: Problem) -> Operator:
        """Return the definition of the operator."""
        return with_dilations(_OPERATORS[problem.op], problem)


def with_dilations(operator: Operator, problem: Problem) -> Operator:
    """Return `operator` with the dilations of `problem`, which it takes as its last argument."""
    if not problem.dilated:
        return operator
    if problem.op == DEPTHWISE_WEIGHT_GRAD:
        return partial(operator, dilation=problem.dilations[0])
    return partial(operator, dilations=problem.dilations)
