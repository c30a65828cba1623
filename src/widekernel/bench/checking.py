"""Checks before any timing: the operator against its definition in float64, and implementations against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from widekernel import ops
from widekernel.bench.errors import BenchmarkError
from widekernel.bench.precision import FLOAT32, Precision
from widekernel.ops.problem import Anchor, flipped, mirror_anchors
from widekernel.ops.reference import relative_error

AGREEMENT_TOLERANCE = 1e-4
"""Largest allowed difference of implementations, relative to the largest number."""

_COMPUTED = ("depthwise_sum", "depthwise_sum (an input gradient)", "depthwise_weight_grad")


class BackendRequest(TypedDict):
    """The backend and algorithm that a call asks for, as arguments of the operators."""

    backend: str | None
    algorithm: str | None


Shape = tuple[int, int, int, int]

# (N, C, H, W), kernels and their anchors: squares, strips, kernels larger than the image, even ones, several in one call,
# and numbers of channels and images that are not multiples of a vector or a tile.
_SMALL: tuple[tuple[Shape, list[tuple[Anchor, Anchor]]], ...] = (
    ((1, 19, 33, 37), [((31, 31), (15, 15)), ((5, 5), (2, 2))]),
    ((1, 33, 14, 14), [((27, 27), (13, 13))]),
    ((3, 8, 7, 7), [((13, 13), (6, 6))]),
    ((2, 5, 20, 41), [((51, 5), (25, 2)), ((5, 51), (2, 25)), ((5, 5), (2, 2))]),
    ((2, 16, 28, 28), [((7, 7), (3, 3))]),
    ((1, 17, 9, 12), [((4, 6), (0, 5)), ((1, 1), (0, 0))]),
)


Rects = Sequence[tuple[tuple[int, int], Anchor]]
"""Kernel sizes with their anchors."""


def check_operator(
    backend: str | None = None,
    algorithm: str | None = None,
    problems: Sequence[tuple[Shape, Rects]] = _SMALL,
    precision: Precision = FLOAT32,
) -> None:
    """Compare both operators with their definition, on small problems in both layouts.

    Args:
        backend: the backend to check, on the problems that it can compute; by default the one selected for each problem.
        algorithm: the algorithm that it must use; by default the fastest.
        problems: (N, C, H, W) and the rectangles of each problem.
        precision: type of the tensors, and the accuracy that it requires.

    Raises:
        BenchmarkError: if a number is wrong.
        NoBackendError: if the backend can compute none of the problems.
    """
    generator = torch.Generator().manual_seed(0)
    refusals, checked = [], 0
    for shape, rects in problems:
        problem = _Problem.random(shape, rects, generator, precision.dtype)
        wanted = problem.computed(torch.float64, torch.contiguous_format, "reference", None)
        for layout in (torch.contiguous_format, torch.channels_last):
            try:
                with ops.trace() as ran:
                    got = problem.computed(precision.dtype, layout, backend, algorithm)
            except ops.NoBackendError as refusal:
                refusals.append(refusal)
                continue
            checked += 1
            for what, output, exact, name in zip(_COMPUTED, got, wanted, ran.backends()):
                _compare(output, exact, name, f"{what} of {shape} with {[size for size, _ in rects]}", precision.tolerance)
    if not checked:
        raise refusals[0]


def check_agreement(
    outputs: Mapping[str, Tensor], reference: str, what: str, tolerance: float = AGREEMENT_TOLERANCE
) -> float:
    """Compare outputs with one of them; return the largest difference, relative to the largest number.

    Args:
        outputs: the output of every implementation, by name.
        reference: name of the output with which the others are compared.
        what: description of the computation, for the message.
        tolerance: largest allowed difference.

    Raises:
        BenchmarkError: if an output differs by more.
    """
    largest = 0.0
    for name, output in outputs.items():
        error = relative_error(output, outputs[reference])
        # Written so that NaN is an error as well.
        if not error <= tolerance:
            raise BenchmarkError(
                f"{what}: {name} and {reference} differ by {error:.2g} of the largest number, more than {tolerance:g}. "
                "Nothing is reported, because times of wrong results are meaningless: find out which one is wrong, or "
                "leave the case out."
            )
        largest = max(largest, error)
    return largest


class _Problem(NamedTuple):
    """Tensors for the three passes."""

    x: Tensor
    grad: Tensor
    kernels: list[Tensor]
    anchors: list[Anchor]
    bias: Tensor

    @classmethod
    def random(cls, shape: Shape, rects: Rects, generator: torch.Generator, dtype: torch.dtype) -> _Problem:
        """Draw random tensors for rectangles of (size, anchor)."""
        x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        kernels = [torch.randn(shape[1], 1, *size, generator=generator).to(dtype) for size, _ in rects]
        bias = torch.randn(shape[1], generator=generator).to(dtype)
        return cls(x, grad, kernels, [anchor for _, anchor in rects], bias)

    @torch.no_grad()
    def computed(
        self, dtype: torch.dtype, layout: torch.memory_format, backend: str | None, algorithm: str | None
    ) -> list[Tensor]:
        """Compute the outputs listed in `_COMPUTED`."""
        request: BackendRequest = {"backend": backend, "algorithm": algorithm}
        x, grad = (image.to(dtype=dtype, memory_format=layout) for image in (self.x, self.grad))
        kernels = [kernel.to(dtype) for kernel in self.kernels]
        size = (kernels[0].shape[2], kernels[0].shape[3])
        return [
            ops.depthwise_sum(x, kernels, self.anchors, self.bias.to(dtype), **request),
            ops.depthwise_sum(grad, flipped(kernels), mirror_anchors(kernels, self.anchors), **request),
            ops.depthwise_weight_grad(x, grad, size, self.anchors[0], **request),
        ]


def _compare(got: Tensor, wanted: Tensor, backend: str, what: str, tolerance: float) -> None:
    error = relative_error(got.double(), wanted)
    if not error <= tolerance:
        raise BenchmarkError(
            f"{backend} computes {what} wrongly: it differs from the definition by {error:.2g} of the largest number, more "
            f"than {tolerance:g}. Nothing is timed: run the tests of widekernel.ops, or choose another backend."
        )
