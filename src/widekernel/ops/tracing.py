"""What `torch.jit.trace` records of a call: convolutions of PyTorch's, see `plain`, with sizes that are whole numbers.

A recorded graph is read by other programs: ONNX and OpenVINO, counters, TensorBoard, libtorch. None of them knows our
operators, and the rules of `autograd.Function` cannot be recorded at all. So while a graph is recorded the operators are
what they are made of. `ops.trace()` names this `plain`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from widekernel.ops import plain, portable
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    Anchor,
    Problem,
    check_algorithm,
    check_epilogue,
    check_sum,
    check_weight_grad,
    middles,
    unrecorded,
)
from widekernel.ops.registration import autocast
from widekernel.ops.select import NoBackendError, record

NAME = "plain"


def depthwise_sum(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None,
    bias: Tensor | None,
    scale: Tensor | None,
    relu: bool,
    backend: str | None,
    algorithm: str | None,
) -> Tensor:
    """Record `ops.depthwise_sum`; checks are made now and are no part of the graph."""
    x, kernels, bias, scale = autocast(x, kernels, bias, scale)
    with unrecorded():
        check_algorithm(algorithm or "")
        anchors = middles(kernels) if anchors is None else anchors
        check_sum(x, kernels, anchors, bias)
        check_epilogue(x, scale, relu)
        anchors = _whole(anchors)
        _note(Problem.of_sum(x, kernels, anchors, algorithm or ""), backend)
    return plain.depthwise_sum(x, list(kernels), anchors, bias, scale, relu)


def depthwise_branches(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor] | None, backend: str | None, algorithm: str | None
) -> list[Tensor]:
    """Record `ops.depthwise_branches`."""
    x, kernels = autocast(x, kernels)
    with unrecorded():
        check_algorithm(algorithm or "")
        anchors = middles(kernels) if anchors is None else anchors
        check_sum(x, kernels, anchors, None, DEPTHWISE_BRANCHES)
        anchors = _whole(anchors)
        _note(Problem.of_branches(x, kernels, anchors, algorithm or ""), backend)
    return plain.depthwise_branches(x, list(kernels), anchors)


def depthwise_weight_grad(
    x: Tensor, grad: Tensor, kernel_size: tuple[int, int], anchor: Anchor | None, backend: str | None, algorithm: str | None
) -> Tensor:
    """Record `ops.depthwise_weight_grad`."""
    with unrecorded():
        check_algorithm(algorithm or "")
        anchor = (kernel_size[0] // 2, kernel_size[-1] // 2) if anchor is None else anchor
        check_weight_grad(x, grad, kernel_size, anchor)
        (size, place) = _whole([kernel_size, anchor])
        _note(Problem.of_weight_grad(x, size, place, algorithm or ""), backend)
    return plain.depthwise_weight_grad(x, grad, size, place)


def _whole(pairs: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Give pairs of numbers that may come out of the graph, as sizes do, as what they are now."""
    return [(int(pair[0]), int(pair[1])) for pair in pairs]


def _note(problem: Problem, backend: str | None) -> None:
    if backend not in (None, portable.name):
        raise NoBackendError(
            f"backend {backend!r} was asked for, but torch.jit.trace records PyTorch's own convolutions, so that other "
            "programs can read the graph: leave the backend out while a graph is recorded, or use torch.export"
        )
    record(NAME, problem)
