"""The backend of our own kernels for NVIDIA GPUs: float32, bfloat16 and float16, any rectangle, both layouts."""

from __future__ import annotations

from typing import final

import torch

from widekernel.ops.backends.base import Backend, Operator
from widekernel.ops.empty import EMPTY
from widekernel.ops.gpu import machine
from widekernel.ops.gpu.candidates import small, small_channels_last, small_contiguous
from widekernel.ops.gpu.config_choice import INTERPRETED_CHIP, ConfigChoice, choose_config, ranked_configs
from widekernel.ops.gpu.interpreter import INTERPRETER, is_interpreted
from widekernel.ops.gpu.kernel_configs import KernelConfig
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    DIRECT,
    Problem,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_RECTS = 16
"""Largest number of kernels in one launch, which is compiled for all of its rectangles."""
MOST_PIXELS = 2**30
"""Largest number of pixels of a plane: offsets, including those beyond its end before masking, are 32-bit integers."""
MOST_SPANNED = 1024
"""Largest distance from the first to the last tap of a dilated kernel: padded rows of kernels and compiled loops span it."""
MOST_TRIED = 8
"""Number of alternatives that are tried if the chosen configuration does not fit on the GPU."""


@final
class TritonBackend(Backend):
    """The Triton kernels."""

    name = "triton"
    operators = frozenset({DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES})
    calls_pytorch = False
    computes_dilated = True

    def reasons_against(self, problem: Problem) -> list[str]:
        """List why the kernels cannot compute the problem, or why PyTorch's are better; empty if neither applies."""
        obstacles = self._obstacles(problem)
        if obstacles:
            return obstacles
        if is_interpreted():
            where = "on a CPU it runs" if problem.device == "cpu" else f"with {INTERPRETER}=1 it runs"
            return [f"{where} in Triton's interpreter, only when asked for with backend={self.name!r}"]
        better = "" if 0 in problem.shape else planned(problem).better_in_pytorch
        return [better] if better else []

    def can_run(self, problem: Problem) -> bool:
        """Return whether the kernels can compute the problem, even if interpreted or slower than PyTorch's."""
        return not self._obstacles(problem)

    def describe(self, problem: Problem) -> str:
        """Describe the kernel, its configuration, where that comes from, and what is computed between the taps."""
        if 0 in problem.shape:
            return "nothing to compute"
        plan = planned(problem)
        gaps = plan.config.gaps if problem.dilated else ""
        return f"{plan}; {gaps}" if gaps else str(plan)

    def prepare(self, problem: Problem) -> Operator:
        """Choose the kernel and its configuration for the current GPU."""
        if 0 in problem.shape:
            return EMPTY[problem.op]
        from widekernel.ops.gpu import launch

        chosen, chip = planned(problem).config, machine.chip()
        others = [config for config in ranked_configs(problem, chip)[:MOST_TRIED] if config != chosen]

        def with_config(config: KernelConfig) -> Operator:
            if problem.op == DEPTHWISE_WEIGHT_GRAD:
                return launch.PreparedWeightGrad(problem, config, chip)
            prepared = launch.PreparedSum(problem, config, chip)
            operators: dict[str, Operator] = {
                DEPTHWISE_SUM: prepared,
                DEPTHWISE_BRANCHES: prepared.branches,
                DEPTHWISE_SUM_OF_BRANCHES: prepared.sum_of_branches,
            }
            return operators[problem.op]

        return launch.FirstThatFits(with_config, [chosen, *others])

    def _obstacles(self, problem: Problem) -> list[str]:
        obstacles = _limits(problem)
        if obstacles:
            return obstacles
        obstacles = machine.obstacles(problem.device)
        if obstacles and problem.device == "cuda":
            machine.warn_once_if_software_is_missing()
        return obstacles


def planned(problem: Problem) -> ConfigChoice:
    """Return the plan for a nonempty problem on the current GPU."""
    return choose_config(problem, machine.chip() if problem.device == "cuda" else INTERPRETED_CHIP, machine.device_name())


def _limits(problem: Problem) -> list[str]:
    """List why the kernels cannot compute a problem on any machine."""
    limits = []
    interpreted = problem.device == "cpu" and is_interpreted()
    if problem.device != "cuda" and not interpreted:
        limits.append(f"it runs on NVIDIA GPUs, not on {problem.device}")
    if problem.dtype not in DTYPES:
        limits.append(f"it computes float32, bfloat16 and float16, not {problem.dtype}")
    if len(problem.kernels) > MOST_RECTS:
        limits.append(f"it adds up at most {MOST_RECTS} kernels, not {len(problem.kernels)}")
    if problem.algorithm == DIRECT and not _is_direct(problem):
        limits.append("its matrix products multiply pixels outside the kernel by zero, which algorithm 'direct' excludes")
    if problem.op in (DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES) and small_channels_last(problem):
        limits.append("small kernels on channels_last images are computed one by one")
    if _is_too_large(problem):
        limits.append("it computes channels_last images of fewer than 2**31 numbers")
    if problem.shape[2] * problem.shape[3] > MOST_PIXELS:
        limits.append(f"it computes images of at most {MOST_PIXELS} pixels")
    spanned = _spanned(problem)
    if spanned > MOST_SPANNED:
        limits.append(f"it computes dilated kernels whose taps span at most {MOST_SPANNED} pixels, not {spanned}")
    return limits


def _spanned(problem: Problem) -> int:
    """Return the largest distance between two taps of a dilated kernel along an axis; 0 if none is dilated."""
    rects = zip(problem.kernels, problem.dilations)
    return max(((max(size) - 1) * dilation for size, dilation in rects if dilation > 1), default=0)


def _is_direct(problem: Problem) -> bool:
    """Return whether a GPU kernel for the problem sums over the pixels under the rectangle and no others."""
    if problem.op == DEPTHWISE_WEIGHT_GRAD:
        return small(problem)
    return problem.op == DEPTHWISE_SUM and (small_channels_last(problem) or small_contiguous(problem))


def _is_too_large(problem: Problem) -> bool:
    _, channels, height, width = problem.shape
    return small_channels_last(problem) and channels * height * width >= 2**31
