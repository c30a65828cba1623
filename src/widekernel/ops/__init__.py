"""The operators that every large kernel here runs on: a sum of rectangular depthwise convolutions, or its branches."""

from widekernel.ops import counting  # noqa: F401 - what FlopCounterMode counts
from widekernel.ops.branches import depthwise_branches
from widekernel.ops.decomposing import decompositions
from widekernel.ops.depthwise import depthwise_sum, depthwise_weight_grad
from widekernel.ops.explaining import explain
from widekernel.ops.problem import Problem
from widekernel.ops.select import Explanation, NoBackendError, backends, register, trace, unregister

__all__ = [
    "Explanation",
    "NoBackendError",
    "Problem",
    "backends",
    "decompositions",
    "depthwise_branches",
    "depthwise_sum",
    "depthwise_weight_grad",
    "explain",
    "register",
    "trace",
    "unregister",
]
