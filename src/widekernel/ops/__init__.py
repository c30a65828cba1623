"""The operator that every large kernel here runs on: a sum of rectangular depthwise convolutions."""

from widekernel.ops.depthwise import depthwise_sum, depthwise_weight_grad, explain
from widekernel.ops.problem import Problem
from widekernel.ops.select import Explanation, NoBackendError, backends, register, trace, unregister

__all__ = [
    "Explanation",
    "NoBackendError",
    "Problem",
    "backends",
    "depthwise_sum",
    "depthwise_weight_grad",
    "explain",
    "register",
    "trace",
    "unregister",
]
