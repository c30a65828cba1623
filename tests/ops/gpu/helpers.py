"""Helpers of the tests of the GPU kernels: the device to run on, problems, and exact results.

Without a GPU the kernels run in Triton's interpreter on CPU tensors, which the top-level conftest switches on before Triton
is imported. On a GPU the same tests run the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.ops.cases import TOLERANCE, Case, definition, relative_error
from widekernel.ops import reference
from widekernel.ops.gpu import machine
from widekernel.ops.gpu.kernel_configs import Chip, KernelConfig
from widekernel.ops.gpu.launch import PreparedSum, PreparedWeightGrad
from widekernel.ops.problem import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
H200 = Chip((9, 0), 132, 227 * 1024)


def limit(dtype: torch.dtype) -> float:
    """Return the largest error allowed; weight gradients are also rounded to the type of the input."""
    # Three products of TF32 are slightly less exact than float32.
    return {torch.float32: 4 * TOLERANCE[torch.float32]}.get(dtype, TOLERANCE[dtype])


def assert_exact(got: Tensor, want: Tensor) -> None:
    error = relative_error(got.cpu(), want.cpu())
    assert error <= limit(got.dtype), f"relative error {error:.3g} of {got.dtype}"


def poison(problem: Problem) -> None:
    """Fill memory with NaN that the allocator is likely to reuse for outputs."""
    for _ in range(4):
        torch.full(problem.shape, float("nan"), dtype=problem.dtype, device=DEVICE)


def draw(
    case: Case, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, list[Tensor]]:
    """Return random images and kernels, on the device under test."""
    x, kernels, _ = case.tensors(dtype, bias=False)
    return x.to(DEVICE).contiguous(memory_format=layout), [kernel.to(DEVICE) for kernel in kernels]


def exact(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[tuple[int, int]], dilations: tuple[int, ...] = ()
) -> Tensor:
    """Compute the sum of rectangles in float64."""
    doubles = [kernel.double() for kernel in kernels]
    if any(dilation > 1 for dilation in dilations):
        return reference.depthwise_sum(x.double(), doubles, anchors, dilations=dilations)
    return definition(x.double(), doubles, anchors)


def prepared_sum(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[tuple[int, int]], config: KernelConfig
) -> PreparedSum:
    problem = Problem.of_sum(x, kernels, anchors)
    poison(problem)
    return PreparedSum(problem, config, chip())


def prepared_grad(x: Tensor, size: tuple[int, int], anchor: tuple[int, int], config: KernelConfig) -> PreparedWeightGrad:
    problem = Problem.of_weight_grad(x, size, anchor)
    return PreparedWeightGrad(problem, config, chip())


def chip() -> Chip:
    return machine.chip()
