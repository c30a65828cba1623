"""The choices of the cost model for GPUs that are in no table, compiled for them: RTX 30, RTX 40 and L4, RTX 50.

Programs on these GPUs have less than half the shared memory of those in the shipped table, and their tensor cores read from
registers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.gpu.compiling import CHIPS, OTHERS, Compiled, Job, compile_all
from widekernel.ops.gpu.candidates import candidates
from widekernel.ops.gpu.config_choice import ranked_configs
from widekernel.ops.gpu.kernel_configs import DirectNchw, DirectNhwc, DirectNhwcGrad, Flat, KernelConfig
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Problem,
)

TARGETS = {"sm_86": "sm_86", "sm_89": "sm_89", "sm_120": "sm_120a"}
FLOAT32 = torch.float32
MOST_SPILLED = 128
"""Bytes per thread that may spill; they stay in the L1 cache. The cost model does not count registers, but estimates that
every alternative for float32 branches of small images takes twice the time."""
STRIPS = ((51, 5), (5, 51), (5, 5))
SMALL_STRIPS = ((13, 5), (5, 13), (5, 5))


def problem(op: str, extent: int, *kernels: tuple[int, int], **others: object) -> Problem:
    anchors = tuple((kh // 2, kw // 2) for kh, kw in kernels)
    made = Problem(op, "cuda", torch.bfloat16, (64, 128, extent, extent), kernels, anchors)
    return replace(made, **others)  # type: ignore[arg-type]


SOME = {
    "sm_86": [
        problem(DEPTHWISE_SUM, 56, (31, 31)),
        problem(DEPTHWISE_SUM_OF_BRANCHES, 7, (13, 13), (5, 5)),
        problem(DEPTHWISE_WEIGHT_GRAD, 56, (31, 31), dtype=FLOAT32),
    ],
    "sm_89": [problem(DEPTHWISE_SUM, 28, (51, 5)), problem(DEPTHWISE_WEIGHT_GRAD, 28, (5, 51))],
    "sm_120": [
        problem(DEPTHWISE_SUM, 56, (31, 31), dtype=FLOAT32),
        problem(DEPTHWISE_BRANCHES, 7, (13, 13), (5, 5)),
        problem(DEPTHWISE_WEIGHT_GRAD, 14, (27, 27)),
    ],
}
ALL = [
    one
    for op in (DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD)
    for dtype in (torch.bfloat16, FLOAT32)
    for one in (
        *[problem(op, extent, (k, k), dtype=dtype) for extent, k in ((56, 31), (14, 27), (7, 13))],
        *[problem(op, 28, kernel, dtype=dtype) for kernel in ((5, 51), (51, 5))],
        problem(op, 28, (7, 7), dtype=dtype, channels_last=True),
    )
] + [
    problem(DEPTHWISE_SUM, extent, (5, 5), (3, 3), dtype=dtype) for extent in (7, 14) for dtype in (torch.bfloat16, FLOAT32)
]
# UniRepLKNet's dilated block.
ALL += [
    problem(op, extent, (13, 13), (5, 5), (7, 7), (3, 3), (3, 3), (3, 3), dilations=(1, 1, 2, 3, 4, 5))
    for op in (DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES)
    for extent in (28, 7)
]
ALL += [
    one
    for op in (DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES)
    for dtype in (torch.bfloat16, FLOAT32)
    for one in (
        problem(op, 28, *STRIPS, dtype=dtype),
        problem(op, 7, (13, 13), (5, 5), dtype=dtype),
        problem(op, 7, *SMALL_STRIPS, dtype=dtype),
        problem(op, 10, (13, 13), (5, 5), dtype=dtype),
    )
]


def chosen(problems: list[Problem], chip: str) -> list[Job]:
    return [Job(one, ranked_configs(one, OTHERS[chip])[0], chip) for one in problems]


def check(job: Job, kernels: list[Compiled]) -> None:
    assert kernels, job
    for kernel in kernels:
        assert kernel.stack <= MOST_SPILLED and kernel.registers <= 255, (job, kernel)
        assert kernel.target == TARGETS[job.chip] and kernel.shared <= OTHERS[job.chip].shared_bytes, (job, kernel)
    by_multiply_adds = isinstance(job.config, (DirectNchw, DirectNhwc, DirectNhwcGrad))
    assert set(kernels[-1].products) == (set() if by_multiply_adds else {"mma.sync"}), (job, kernels[-1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=pytest.mark.slow) for chip in OTHERS])
def test_choices_for_some_problems(chip: str) -> None:
    jobs = chosen(SOME[chip], chip)
    for job, kernels in zip(jobs, compile_all(jobs), strict=True):
        check(job, kernels)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chip", OTHERS)
def test_choices_for_all_problems(chip: str) -> None:
    jobs = chosen(ALL, chip)
    for job, kernels in zip(jobs, compile_all(jobs)):
        check(job, kernels)


def flat(problem: Problem, chip: str) -> list[KernelConfig]:
    return [config for config in candidates(problem, OTHERS[chip]) if isinstance(config, Flat)]


@pytest.mark.parametrize("chip", OTHERS)
def test_matrices_that_do_not_fit_into_registers_are_no_candidates(chip: str) -> None:
    """With 4 warps and 64 images, those of four branches spill 760 bytes per thread; with 8 and 32, six fit."""
    two, many = (((13, 13), (5, 5)), ((13, 13), (13, 5), (5, 13), (5, 5), (3, 3), (7, 7), (9, 9)))
    assert all(config.warps == 8 for config in flat(problem(DEPTHWISE_BRANCHES, 7, *two), chip))
    assert flat(problem(DEPTHWISE_BRANCHES, 7, *two), chip) and not flat(problem(DEPTHWISE_BRANCHES, 7, *many), chip)
    assert flat(problem(DEPTHWISE_SUM, 7, *many), chip)
    assert {config.images for config in flat(problem(DEPTHWISE_BRANCHES, 7, *many[:6]), chip)} == {16, 32}


def test_many_matrices_are_shared_by_more_warps() -> None:
    """Of six branches, with 4 warps, those of 7x7 images spill more than 1,000 bytes per thread on sm_90 and sm_100."""
    for chip in (CHIPS["sm_90"], CHIPS["sm_100"]):
        for dtype in (torch.bfloat16, FLOAT32):
            of = problem(DEPTHWISE_BRANCHES, 7, *SMALL_STRIPS, (3, 3), (7, 7), (9, 9), dtype=dtype)
            found = [config for config in candidates(of, chip) if isinstance(config, Flat)]
            assert found and all(config.warps == 8 and config.images <= 32 for config in found)
            few = replace(of, kernels=of.kernels[:3], anchors=of.anchors[:3])
            assert any(config.warps == 4 for config in candidates(few, chip) if isinstance(config, Flat))


def test_a_thread_computes_few_outputs_by_multiply_adds() -> None:
    """With 16 outputs, of several planes, the three rectangles of a cross spill 10 KiB."""
    for extent, most in ((7, 4), (14, 8)):
        found = candidates(problem(DEPTHWISE_SUM, extent, (5, 5), (1, 25), (25, 1)), OTHERS["sm_120"])
        planes = [config for config in found if isinstance(config, DirectNchw)]
        assert planes and max(config.planes * config.pixels // (32 * config.warps) for config in planes) == most
