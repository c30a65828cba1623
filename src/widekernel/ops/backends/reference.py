"""The backend that runs the definition."""

from __future__ import annotations

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

    def reasons_against(self, problem: Problem) -> list[str]:
        """Return the reason why the definition never runs unless asked for."""
        return ["it is the slow definition, run only when asked for with backend='reference'"]

    def can_run(self, problem: Problem) -> bool:
        """Return True: the definition computes everything."""
        return True

    def prepare(self, problem: Problem) -> Operator:
        """Return the definition of the operator."""
        return _OPERATORS[problem.op]
