"""What would compute a call, forward and backward, before it is made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from widekernel.ops.problem import Anchor, Problem, check_algorithm, check_sum, middles, mirror
from widekernel.ops.registration import autocast, chosen_for
from widekernel.ops.select import Explanation, explain_branches, explain_problem


def explain(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None = None,
    *,
    branches: bool = False,
    backend: str | None = None,
    algorithm: str | None = None,
) -> list[Explanation]:
    """Say which backend computes a call of `depthwise_sum`, its input gradient and its weight gradients, and why.

    Takes the arguments of `depthwise_sum`; nothing is computed. The first explanation is for the forward pass, the second
    for the input gradient, the others for the weight gradient of each rectangle. Under autocast they speak of its type.

    Args:
        x: as all that follow, an argument of the call.
        kernels: rectangles.
        anchors: of the rectangles.
        branches: whether to explain `depthwise_branches` instead. What no backend computes fused, the forward pass or the
            input gradient, then has one explanation a branch, whose details say why.
        backend: asked for by name.
        algorithm: asked for.
    """
    anchors = middles(kernels) if anchors is None else anchors
    x, kernels = autocast(x, kernels)
    algorithm = algorithm or ""
    check_algorithm(algorithm)
    check_sum(x, kernels, anchors, None)
    with chosen_for(x):
        return _explained(x, kernels, list(anchors), backend, algorithm, branches)


def _explained(
    x: Tensor, kernels: Sequence[Tensor], anchors: list[Anchor], backend: str | None, algorithm: str, branches: bool
) -> list[Explanation]:
    mirrored = [mirror(kernel.shape[2:], anchor) for kernel, anchor in zip(kernels, anchors)]
    if branches and len(kernels) > 1:
        forward = explain_branches(Problem.of_branches(x, kernels, anchors, algorithm), backend)
        explained = [*forward, *explain_branches(Problem.of_sum_of_branches(x, kernels, mirrored, algorithm), backend)]
    else:
        explained = [explain_problem(Problem.of_sum(x, kernels, of, algorithm), backend) for of in (anchors, mirrored)]
    for kernel, anchor in zip(kernels, anchors):
        problem = Problem.of_weight_grad(x, (kernel.shape[2], kernel.shape[3]), anchor, algorithm)
        explained.append(explain_problem(problem, backend))
    return explained
