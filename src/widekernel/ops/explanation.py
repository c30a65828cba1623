"""Explanations: which backend would compute a call, forward and backward, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from widekernel.ops import dispatch
from widekernel.ops.backends.base import Backend
from widekernel.ops.checks import check_algorithm, check_dilations, check_sum
from widekernel.ops.problem import Anchor, Problem, center_anchors, mirror_anchors
from widekernel.ops.registration import CallOptions, autocast, on_gpu_of


@dataclass(frozen=True)
class Explanation:
    """The backend chosen for a problem, how it computes the problem, and why the other backends were not chosen."""

    problem: Problem
    backend: str
    reasons: dict[str, list[str]]
    details: str = ""

    def __str__(self) -> str:
        lines = [f"{self.problem}", f"  runs on: {self.backend}{f' ({self.details})' if self.details else ''}"]
        lines += [f"  not on {name}: {'; '.join(reasons)}" for name, reasons in self.reasons.items()]
        return "\n".join(lines)


def explain(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None = None,
    *,
    branches: bool = False,
    backend: str | None = None,
    algorithm: str | None = None,
    dilations: Sequence[int] | None = None,
) -> list[Explanation]:
    """Explain which backend computes a call of `depthwise_sum`, its input gradient and its weight gradients, and why.

    Takes the arguments of `depthwise_sum`; nothing is computed. The first explanation is for the forward pass, the second
    for the input gradient, the others for the weight gradient of each rectangle. Under autocast, they hold for the autocast
    type.

    Args:
        x: the input of the call, (N, C, H, W).
        kernels: its rectangles, (C, 1, kh, kw).
        anchors: the anchors of the rectangles, by default the middle taps.
        branches: whether to explain `depthwise_branches` instead. If no backend computes the forward pass or the input
            gradient fused, that pass gets one explanation per branch, whose details say why.
        backend: name of the requested backend.
        algorithm: the requested algorithm.
        dilations: the dilations of the rectangles, by default 1.

    Raises:
        ValueError: if shapes, types, anchors or dilations do not fit together.
        NoBackendError: if no backend can compute the call, or the requested one cannot.
    """
    anchors = center_anchors(kernels) if anchors is None else anchors
    x, kernels = autocast(x, kernels)
    check_sum(x, kernels, anchors, None)
    options = CallOptions(backend, check_algorithm(algorithm), check_dilations(dilations, len(kernels)))
    with on_gpu_of(x):
        return _explanations(x, kernels, list(anchors), options, branches)


def _explanations(
    x: Tensor, kernels: Sequence[Tensor], anchors: list[Anchor], options: CallOptions, branches: bool
) -> list[Explanation]:
    backend, *rest = options
    mirrored = mirror_anchors(kernels, anchors)
    if branches and len(kernels) > 1:
        explanations = [
            *explain_branches(Problem.of_branches(x, kernels, anchors, *rest), backend),
            *explain_branches(Problem.of_sum_of_branches(x, kernels, mirrored, *rest), backend),
        ]
    else:
        explanations = [explain_problem(Problem.of_sum(x, kernels, of, *rest), backend) for of in (anchors, mirrored)]
    for b, (kernel, anchor) in enumerate(zip(kernels, anchors)):
        problem = Problem.of_weight_grad(x, (kernel.shape[2], kernel.shape[3]), anchor, *options.of([b])[1:])
        explanations.append(explain_problem(problem, backend))
    return explanations


def explain_problem(problem: Problem, backend: str | None = None) -> Explanation:
    """Explain which backend would compute `problem` and why the others would not."""
    return _explanation(dispatch.select(problem, backend), problem, backend)


def explain_branches(problem: Problem, backend: str | None = None) -> list[Explanation]:
    """Explain a problem of several branches: one explanation if a backend computes them fused, else one per branch."""
    fused = dispatch.select_fused(problem, backend)
    if fused is not None:
        return [_explanation(fused, problem, backend)]
    details = [f"one branch of {problem.op}"]
    for other in dispatch.registry.backends:
        if problem.op in other.operators and backend in (None, other.name):
            reasons = dispatch.reasons_against(other, problem) or ["a preferred backend accepts every branch"]
            details.append(f"not fused on {other.name}: {', '.join(reasons)}")
    alone = [explain_problem(branch, backend) for branch in problem.branches()]
    return [replace(e, details="; ".join([*([e.details] if e.details else []), *details])) for e in alone]


def _explanation(chosen: Backend, problem: Problem, backend: str | None) -> Explanation:
    reasons = {}
    for other in dispatch.registry.backends:
        if other is not chosen:
            reasons[other.name] = dispatch.reasons_against(other, problem) or [
                f"{chosen.name} comes first" if backend is None else f"{backend} was asked for"
            ]
    return Explanation(problem, chosen.name, reasons, chosen.describe(problem))
