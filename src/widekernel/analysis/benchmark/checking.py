"""No times of what is wrong: the operator against its definition in float64, and the rivals against each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from widekernel import ops
from widekernel.analysis.benchmark.errors import BenchmarkError
from widekernel.ops.problem import mirror
from widekernel.ops.select import Trace

OPERATOR_TOLERANCE = 1e-5
RIVALS_TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest number."""

# (N, C, H, W), kernels and their anchors: squares, strips, kernels larger than the image, even ones, several in one call,
# and numbers of channels and images that fill no vector and no tile.
_SMALL = (
    ((2, 19, 33, 37), [((31, 31), (15, 15)), ((5, 5), (2, 2))]),
    ((1, 33, 14, 14), [((27, 27), (13, 13))]),
    ((3, 8, 7, 7), [((13, 13), (6, 6))]),
    ((2, 5, 20, 41), [((51, 5), (25, 2)), ((5, 51), (2, 25)), ((5, 5), (2, 2))]),
    ((2, 16, 28, 28), [((7, 7), (3, 3))]),
    ((1, 17, 9, 12), [((4, 6), (0, 5)), ((1, 1), (0, 0))]),
)


def check_operator(backend: str | None = None) -> None:
    """Compare both primitives with their definition, on small problems in both layouts.

    Args:
        backend: the one to check, on those of the problems that it takes; by default whichever is chosen for each of them.

    Raises:
        BenchmarkError: if a number is wrong.
        NoBackendError: if the backend asked for takes none of the problems.
    """
    generator = torch.Generator().manual_seed(0)
    refusals, checked = [], 0
    for shape, rects in _SMALL:
        for layout in (torch.contiguous_format, torch.channels_last):
            try:
                _check_problem(shape, rects, layout, generator, backend)
                checked += 1
            except ops.NoBackendError as refusal:
                refusals.append(refusal)
    if not checked:
        raise refusals[0]


def check_agreement(outputs: Mapping[str, Tensor], yardstick: str, what: str, tolerance: float = RIVALS_TOLERANCE) -> float:
    """Compare what rivals returned, and give the largest difference relative to the largest number.

    Args:
        outputs: of every rival, one of which is `yardstick`.
        yardstick: the rival that the others are compared with.
        what: was computed, for the message.
        tolerance: largest difference allowed.

    Raises:
        BenchmarkError: if two of them differ by more.
    """
    largest = 0.0
    for name, output in outputs.items():
        error = difference(output, outputs[yardstick])
        # Written so that NaN is an error as well.
        if not error <= tolerance:
            raise BenchmarkError(
                f"{what}: {name} and {yardstick} differ by {error:.2g} of the largest number, more than {tolerance:g}. "
                "Nothing is reported, because times of wrong results mean nothing: find out which of the two is wrong, or "
                "leave the case out."
            )
        largest = max(largest, error)
    return largest


def difference(output: Tensor, wanted: Tensor) -> float:
    """Give the largest difference of two tensors relative to the largest number of `wanted`; infinity if shapes differ."""
    if output.shape != wanted.shape:
        return float("inf")
    scale = wanted.abs().max().item()
    return ((output - wanted).abs().max() / (scale or 1.0)).item()


def _check_problem(
    shape: tuple[int, ...], rects: list, layout: torch.memory_format, generator: torch.Generator, backend: str | None
) -> None:
    x, grad = (torch.randn(shape, generator=generator).contiguous(memory_format=layout) for _ in range(2))
    kernels = [torch.randn(shape[1], 1, *size, generator=generator) for size, _ in rects]
    bias = torch.randn(shape[1], generator=generator)
    _check_sum(x, kernels, [anchor for _, anchor in rects], bias, backend)
    mirrored = [mirror(size, anchor) for size, anchor in rects]
    _check_sum(grad, [kernel.flip(-1, -2) for kernel in kernels], mirrored, None, backend)
    _check_weight_grad(x, grad, rects[0], backend)


def _check_sum(x: Tensor, kernels: list[Tensor], anchors: list, bias: Tensor | None, backend: str | None) -> None:
    with torch.no_grad(), ops.trace() as ran:
        got = ops.depthwise_sum(x, kernels, anchors, bias, backend=backend)
    exact = None if bias is None else bias.double()
    wanted = ops.depthwise_sum(x.double(), [k.double() for k in kernels], anchors, exact, backend="reference")
    _compare(got, wanted, ran, f"depthwise_sum of {tuple(x.shape)} with {[tuple(k.shape[2:]) for k in kernels]}")


def _check_weight_grad(x: Tensor, grad: Tensor, rect: tuple, backend: str | None) -> None:
    size, anchor = rect
    with torch.no_grad(), ops.trace() as ran:
        got = ops.depthwise_weight_grad(x, grad, size, anchor, backend=backend)
    wanted = ops.depthwise_weight_grad(x.double(), grad.double(), size, anchor, backend="reference")
    _compare(got, wanted, ran, f"depthwise_weight_grad of {tuple(x.shape)} with {size}")


def _compare(got: Tensor, wanted: Tensor, ran: Trace, what: str) -> None:
    error = difference(got.double(), wanted)
    if not error <= OPERATOR_TOLERANCE:
        name = ran.backends()[0] if ran.backends() else "a backend"
        raise BenchmarkError(
            f"{name} computes {what} wrongly: it differs from the definition by {error:.2g} of the largest number, more "
            f"than {OPERATOR_TOLERANCE:g}. Nothing is timed: run the tests of widekernel.ops, or ask for another backend."
        )
