"""The backend of our own kernels for NVIDIA GPUs: float32, bfloat16 and float16, any rectangle, both layouts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from widekernel.ops.gpu.candidates import small, small_channels_last, small_contiguous
from widekernel.ops.gpu.configs import OLDEST, Chip, Config
from widekernel.ops.gpu.images import INTERPRETER, is_interpreted
from widekernel.ops.gpu.plan import INTERPRETED, Plan, plan, ranked
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    DIRECT,
    Anchor,
    Problem,
    memory_format,
)

name = "triton"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_RECTS = 16
"""Of one launch, which is compiled for all of its rectangles."""
MOST_PIXELS = 2**30
"""Of a plane: places in it are counted in 32 bits, and those beyond its end too, before they are masked."""
MOST_TRIED = 8
"""Configurations of which a program may turn out too large for the GPU, before the call fails."""


def reasons_against(problem: Problem) -> list[str]:
    """List why the backend cannot, or should not unasked, compute the problem; empty if it will."""
    reasons = _obstacles(problem)
    if reasons:
        return reasons
    if is_interpreted():
        where = "on a CPU it runs" if problem.device == "cpu" else f"with {INTERPRETER}=1 it runs"
        return [f"{where} in Triton's interpreter, only when asked for with backend={name!r}"]
    better = "" if 0 in problem.shape else _planned(problem).better_in_pytorch
    return [better] if better else []


def can_run(problem: Problem) -> bool:
    """Whether the backend can run when asked for by name."""
    return not _obstacles(problem)


def describe(problem: Problem) -> str:
    """Say how the problem would be computed: the kernel, its configuration, and where that comes from."""
    return "nothing to compute" if 0 in problem.shape else str(_planned(problem))


def prepare(problem: Problem) -> Callable[..., Any]:
    """Decide everything that follows from shapes and the GPU; the result computes calls of that problem."""
    if 0 in problem.shape:
        return _NOTHING[problem.op]
    from widekernel.ops.gpu import launch

    chosen, on = _planned(problem).config, chip()
    others = [config for config in ranked(problem, on)[:MOST_TRIED] if config != chosen]

    def with_config(config: Config) -> Callable[..., Any]:
        if problem.op == DEPTHWISE_WEIGHT_GRAD:
            return launch.PreparedWeightGrad(problem, config, on)
        prepared = launch.PreparedSum(problem, config, on)
        operators: dict[str, Callable[..., Any]] = {
            DEPTHWISE_SUM: prepared,
            DEPTHWISE_BRANCHES: prepared.branches,
            DEPTHWISE_SUM_OF_BRANCHES: prepared.sum_of_branches,
        }
        return operators[problem.op]

    return launch.FirstThatFits(with_config, [chosen, *others])


def depthwise_sum(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor | None) -> Tensor:
    """Compute one call without preparation; see `reference.depthwise_sum`."""
    return prepare(Problem.of_sum(x, kernels, anchors))(x, kernels, anchors, bias)


def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
    """Compute one call without preparation; see `reference.depthwise_weight_grad`."""
    return prepare(Problem.of_weight_grad(x, kernel, anchor))(x, grad, kernel, anchor)


def depthwise_branches(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> list[Tensor]:
    """Compute one call without preparation: an output for each rectangle from one reading of `x`."""
    return prepare(Problem.of_branches(x, kernels, anchors))(x, kernels, anchors)


def depthwise_sum_of_branches(xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> Tensor:
    """Compute one call without preparation: the sum of rectangles, each of an input of its own."""
    return prepare(Problem.of_sum_of_branches(xs[0], kernels, anchors))(xs, kernels, anchors)


def _obstacles(problem: Problem) -> list[str]:
    reasons = []
    interpreted = problem.device == "cpu" and is_interpreted()
    if problem.device != "cuda" and not interpreted:
        reasons.append(f"it runs on NVIDIA GPUs, not on {problem.device}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"it computes float32, bfloat16 and float16, not {problem.dtype}")
    if len(problem.kernels) > MOST_RECTS:
        reasons.append(f"it adds up at most {MOST_RECTS} kernels, not {len(problem.kernels)}")
    if problem.algorithm == DIRECT and not _is_direct(problem):
        reasons.append(
            "its matrix products multiply pixels beside the kernel by zero, which the algorithm 'direct' excludes"
        )
    if problem.op in (DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES) and small_channels_last(problem):
        reasons.append("small kernels on channels_last images are computed one by one")
    if _too_large(problem):
        reasons.append("it computes channels_last images of fewer than 2**31 numbers")
    if problem.shape[2] * problem.shape[3] > MOST_PIXELS:
        reasons.append(f"it computes images of at most {MOST_PIXELS} pixels")
    return reasons or machine_obstacles(problem.device)


def machine_obstacles(device: str) -> list[str]:
    """List what keeps kernels from running on this machine at all, on `cuda`, or on `cpu` interpreted."""
    if importlib.util.find_spec("triton") is None:
        return ["Triton is not installed: pip install triton"]
    if device == "cpu":
        return []
    if torch.version.hip is not None:
        return ["it is written for NVIDIA GPUs and was never tried on AMD's"]
    if not torch.cuda.is_available():
        return ["PyTorch finds no GPU"]
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        wanted, has = (".".join(map(str, version)) for version in (OLDEST, capability))
        return [f"it needs compute capability {wanted} or newer, and {torch.cuda.get_device_name()} has {has}"]
    if is_interpreted():
        return []
    from widekernel.ops.gpu import launch

    return [reason] if (reason := launch.obstacle()) else []


def _is_direct(problem: Problem) -> bool:
    """Whether the problem can be computed by a kernel that sums over the pixels under the rectangle and no others."""
    if problem.op == DEPTHWISE_WEIGHT_GRAD:
        return small(problem)
    return problem.op == DEPTHWISE_SUM and (small_channels_last(problem) or small_contiguous(problem))


def _too_large(problem: Problem) -> bool:
    _, channels, height, width = problem.shape
    return small_channels_last(problem) and channels * height * width >= 2**31


def _planned(problem: Problem) -> Plan:
    return plan(problem, chip() if problem.device == "cuda" else INTERPRETED, device_name())


def chip() -> Chip:
    """Describe the current GPU, or what stands for it in the interpreter."""
    return _chip_of(torch.cuda.current_device()) if torch.cuda.is_available() else INTERPRETED


@lru_cache(maxsize=64)
def _chip_of(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 99 * 1024
    return Chip((properties.major, properties.minor), properties.multi_processor_count, shared)


def device_name() -> str:
    """Give the full name of the current GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"


def _no_sum(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _no_branches(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> list[Tensor]:
    return [_no_sum(x) for _ in kernels]


def _no_sum_of_branches(xs: Sequence[Tensor], *others: Any) -> Tensor:
    return _no_sum(xs[0])


def _no_weight_grad(x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
    return x.new_zeros(x.shape[1], 1, *kernel)


_NOTHING: dict[str, Callable[..., Any]] = {
    DEPTHWISE_SUM: _no_sum,
    DEPTHWISE_WEIGHT_GRAD: _no_weight_grad,
    DEPTHWISE_BRANCHES: _no_branches,
    DEPTHWISE_SUM_OF_BRANCHES: _no_sum_of_branches,
}
