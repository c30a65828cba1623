"""The backend of PyTorch's own convolutions, which runs wherever PyTorch does."""

from __future__ import annotations

from typing import final

from widekernel.ops import torch_conv
from widekernel.ops.backends.base import Backend, Operator
from widekernel.ops.backends.reference import with_dilations
from widekernel.ops.problem import DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, Problem

_OPERATORS: dict[str, Operator] = {
    DEPTHWISE_SUM: torch_conv.depthwise_sum,
    DEPTHWISE_WEIGHT_GRAD: torch_conv.depthwise_weight_grad,
}


@final
class TorchConvBackend(Backend):
    """PyTorch's convolutions, called only in forms that are not pathologically slow."""

    name = torch_conv.NAME
    computes_dilated = True

    def reasons_against(self, problem: Problem) -> list[str]:
        """List why the backend cannot compute `problem`; empty if it can."""
        return [] if problem.dtype.is_floating_point else [f"{problem.dtype} is not a floating-point type"]

    def prepare(self, problem: Problem) -> Operator:
        """Return the operator; nothing is decided in advance."""
        return with_dilations(_OPERATORS[problem.op], problem)
