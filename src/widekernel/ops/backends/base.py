"""The interface of backends: a backend accepts problems, or says why not, and prepares operators for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from widekernel.ops.problem import DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, Problem

Operator = Callable[..., Any]
"""An operator that a backend has prepared for one problem. All are called with positional arguments:

    depthwise_sum                (x, kernels, anchors, bias, scale, relu) -> Tensor
    depthwise_weight_grad        (x, grad, kernel_size, anchor) -> Tensor
    depthwise_branches           (x, kernels, anchors) -> list of Tensors
    depthwise_sum_of_branches    (xs, kernels, anchors) -> Tensor

`widekernel.ops.reference` defines what they return. Dilations are those of the problem.
"""


class Backend(ABC):
    """An implementation of the operators.

    Implement `name`, `reasons_against` and `prepare`, and pass an instance to `widekernel.ops.register`.

    Attributes:
        operators: names of the operators that the backend computes. The two branch operators are optional: if no backend
            computes one fused, it runs branch by branch, each branch as a `depthwise_sum`.
        calls_pytorch: whether prepared operators call PyTorch's own operators. If so, autocast is off while they run (the
            arguments are already converted), and results are converted to the layout of the input. A backend with its own
            kernels sets this to False and returns tensors with the strides of `torch.empty` in that layout.
        computes_dilated: whether the backend computes kernels with gaps between their taps, `Problem.dilations`. If not, it
            is never asked about a problem with such a kernel.
    """

    operators: frozenset[str] = frozenset({DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD})
    calls_pytorch: bool = True
    computes_dilated: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The name by which a call can ask for the backend; a class attribute is enough."""

    @abstractmethod
    def reasons_against(self, problem: Problem) -> list[str]:
        """List the reasons not to compute `problem` with this backend, unless a call asks for it; empty if there are none.

        Called only for problems whose operator is in `operators`, and for dilated ones only if `computes_dilated`.
        """

    def can_run(self, problem: Problem) -> bool:
        """Return whether the backend can compute `problem` when a call asks for it by name."""
        return not self.reasons_against(problem)

    @abstractmethod
    def prepare(self, problem: Problem) -> Operator:
        """Make, once, all decisions that depend only on shapes, and return the operator that computes `problem`."""

    def describe(self, problem: Problem) -> str:
        """Describe how the backend computes `problem`, for `explain`; empty if there is nothing to say."""
        return ""
