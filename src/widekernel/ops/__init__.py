"""The operators that every large kernel here runs on: a sum of rectangular depthwise convolutions, or its branches."""

from widekernel.ops import flops  # noqa: F401 - what FlopCounterMode counts
from widekernel.ops.backends.base import Backend
from widekernel.ops.branches import depthwise_branches
from widekernel.ops.call_trace import trace
from widekernel.ops.decompositions import decompositions
from widekernel.ops.depthwise import depthwise_sum, depthwise_weight_grad

# `ops.backends` is this function. To import from the package of that name, use `from widekernel.ops.backends.… import …`.
from widekernel.ops.dispatch import NoBackendError, backends, register, unregister
from widekernel.ops.explanation import Explanation, explain
from widekernel.ops.problem import Problem

__all__ = [
    "Backend",
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
