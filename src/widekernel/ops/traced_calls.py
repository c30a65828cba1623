"""Calls under `torch.jit.trace`: they record PyTorch's own convolutions (see `plain`), with sizes that are integers.

A recorded graph is read by other programs: ONNX and OpenVINO, counters, TensorBoard, libtorch. None of them knows our
operators, and `autograd.Function` cannot be recorded. So while a graph is recorded, calls run the equivalent convolutions.
`ops.trace()` records them under the name `plain`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from widekernel.ops import call_trace, plain, torch_conv
from widekernel.ops.checks import check_epilogue, check_sum, check_weight_grad
from widekernel.ops.dispatch import NoBackendError
from widekernel.ops.jit_trace import tracing_paused
from widekernel.ops.problem import DEPTHWISE_BRANCHES, Anchor, Problem, center_anchors
from widekernel.ops.registration import CallOptions, autocast

NAME = "plain"


def depthwise_sum(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None,
    bias: Tensor | None,
    scale: Tensor | None,
    relu: bool,
    options: CallOptions,
) -> Tensor:
    """Record `ops.depthwise_sum`; the checks run now and are not part of the graph."""
    x, kernels, bias, scale = autocast(x, kernels, bias, scale)
    with tracing_paused():
        anchors = center_anchors(kernels) if anchors is None else anchors
        check_sum(x, kernels, anchors, bias)
        check_epilogue(x, scale, relu)
        anchors, options = _integers(anchors), _with_integers(options)
        _note(Problem.of_sum(x, kernels, anchors, *options[1:]), options.backend)
    return plain.depthwise_sum(x, list(kernels), anchors, bias, scale, relu, options.dilations or None)


def depthwise_branches(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor] | None, options: CallOptions
) -> list[Tensor]:
    """Record `ops.depthwise_branches`."""
    x, kernels = autocast(x, kernels)
    with tracing_paused():
        anchors = center_anchors(kernels) if anchors is None else anchors
        check_sum(x, kernels, anchors, None, DEPTHWISE_BRANCHES)
        anchors, options = _integers(anchors), _with_integers(options)
        _note(Problem.of_branches(x, kernels, anchors, *options[1:]), options.backend)
    return plain.depthwise_branches(x, list(kernels), anchors, options.dilations or None)


def depthwise_weight_grad(
    x: Tensor, grad: Tensor, kernel_size: tuple[int, int], anchor: Anchor | None, options: CallOptions
) -> Tensor:
    """Record `ops.depthwise_weight_grad`."""
    with tracing_paused():
        anchor = (kernel_size[0] // 2, kernel_size[-1] // 2) if anchor is None else anchor
        check_weight_grad(x, grad, kernel_size, anchor)
        (size, anchor), options = _integers([kernel_size, anchor]), _with_integers(options)
        _note(Problem.of_weight_grad(x, size, anchor, *options[1:]), options.backend)
    return plain.depthwise_weight_grad(x, grad, size, anchor, *options.dilations)


def _integers(pairs: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Convert pairs of numbers, some of which may be traced values such as sizes, to their current integer values."""
    return [(int(pair[0]), int(pair[1])) for pair in pairs]


def _with_integers(options: CallOptions) -> CallOptions:
    return options._replace(dilations=tuple(map(int, options.dilations))) if options.dilations else options


def _note(problem: Problem, backend: str | None) -> None:
    if backend not in (None, torch_conv.NAME):
        raise NoBackendError(
            f"backend {backend!r} was asked for, but torch.jit.trace records PyTorch's own convolutions, so that other "
            "programs can read the graph: leave the backend out while a graph is recorded, or use torch.export"
        )
    call_trace.record(NAME, problem)
