"""Shipped configurations compiled for their architectures, and others for all: tensor cores, registers, shared memory.

By default one configuration of each kind is compiled for one of the architectures; a slow test compiles all of them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from tests.ops.gpu.compiling import CHIPS, Compiled, Job, compile_all
from widekernel.ops.gpu.config_choice import ranked_configs
from widekernel.ops.gpu.kernel_configs import (
    DirectNchw,
    DirectNhwc,
    DirectNhwcGrad,
    KernelConfig,
    Toeplitz,
    ToeplitzGrad,
    config_from_entry,
)
from widekernel.ops.gpu.launch_geometry import itemsize
from widekernel.ops.gpu.tuning_tables import SHIPPED, read, table_key
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Problem,
)

BY_MULTIPLY_ADDS = (DirectNchw, DirectNhwc, DirectNhwcGrad)
CROSS = ((51, 5), (5, 51), (5, 5))
# UniRepLKNet's dilated block.
BLOCK, GAPS = ((13, 13), (5, 5), (7, 7), (3, 3), (3, 3), (3, 3)), (1, 1, 2, 3, 4, 5)
_KEY = re.compile(r"(\w+) (\w+)( tf32)? (NCHW|NHWC) N(\d+) C(\d+) (\d+)x(\d+) (\S+)")


def problem_of(key: str) -> Problem:
    """Return the problem of a table key; batch and channels are the powers of two in the key."""
    found = _KEY.fullmatch(key)
    assert found is not None, key
    op, dtype, tf32, layout, *sizes, rects = found.groups()
    numbers = [tuple(map(int, re.split(r"[x@,]", rect))) for rect in rects.split("+")]
    kernels, anchors = tuple(n[:2] for n in numbers), tuple(n[2:] for n in numbers)
    n, c, h, w = map(int, sizes)
    return Problem(op, "cuda", getattr(torch, dtype), (n, c, h, w), kernels, anchors, layout == "NHWC", None, bool(tf32))


def shipped() -> list[Job]:
    jobs = []
    for chip, entries in read(SHIPPED).items():
        jobs += [Job(problem_of(key), config_from_entry(entry["config"]), chip) for key, entry in entries.items()]
    return jobs


def problem(op: str, extent: int, *kernels: tuple[int, int], **others: object) -> Problem:
    anchors = tuple((kh // 2, kw // 2) for kh, kw in kernels)
    made = Problem(op, "cuda", torch.float32, (64, 128, extent, extent), kernels, anchors)
    return replace(made, **others)  # type: ignore[arg-type]


def more() -> list[Job]:
    """Return problems whose configurations are estimated: float32, channels_last, other methods, one image."""
    asked = [
        problem(DEPTHWISE_SUM, 56, (31, 31)),
        problem(DEPTHWISE_SUM, 56, (31, 31), tf32=True),
        problem(DEPTHWISE_SUM, 56, (31, 31), dtype=torch.bfloat16, shape=(1, 128, 56, 56)),
        problem(DEPTHWISE_SUM, 7, (13, 13), tf32=True),
        problem(DEPTHWISE_SUM, 28, (3, 3), dtype=torch.bfloat16),
        problem(DEPTHWISE_SUM, 28, (7, 7), dtype=torch.bfloat16, channels_last=True),
        problem(DEPTHWISE_SUM_OF_BRANCHES, 56, *CROSS, dtype=torch.bfloat16),
        problem(DEPTHWISE_BRANCHES, 28, *CROSS),
        problem(DEPTHWISE_WEIGHT_GRAD, 56, (31, 31)),
        problem(DEPTHWISE_WEIGHT_GRAD, 56, (31, 31), tf32=True),
        problem(DEPTHWISE_WEIGHT_GRAD, 28, (7, 7), dtype=torch.bfloat16, channels_last=True),
    ]
    jobs = [Job(one, ranked_configs(one, CHIPS["sm_90"])[0], "sm_90") for one in asked]
    jobs += [
        Job(one, ranked_configs(one, CHIPS[name])[0], name) for one in (asked[0], asked[8]) for name in ("sm_80", "sm_100")
    ]
    tall = problem(DEPTHWISE_SUM, 56, (51, 5), dtype=torch.bfloat16)
    jobs.append(Job(tall, Toeplitz(8, 4, 1, 64, 32, 4, 16, transposed=1), "sm_90"))
    narrow = problem(DEPTHWISE_WEIGHT_GRAD, 7, (13, 13), dtype=torch.bfloat16)
    jobs.append(Job(narrow, ToeplitzGrad(4, 3, 8, 16, 16, 64), "sm_90"))
    grad = problem(DEPTHWISE_WEIGHT_GRAD, 56, (51, 5), dtype=torch.bfloat16)
    jobs.append(Job(grad, ToeplitzGrad(8, 3, 2, 64, 64, 32, transposed=1), "sm_90"))
    apart = problem(DEPTHWISE_SUM, 56, (7, 7), dtype=torch.bfloat16, dilations=(3,))
    jobs.append(Job(apart, Toeplitz(4, 4, 4, 16, 1, 64, 16), "sm_90"))
    return jobs


def dilated() -> list[Job]:
    """Return the problems of UniRepLKNet's dilated block, with estimated configurations, for every architecture."""
    asked = [
        problem(op, extent, *BLOCK, dtype=torch.bfloat16, shape=(64, channels, extent, extent), dilations=GAPS)
        for op in (DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES)
        for channels, extent in ((160, 28), (640, 7))
    ]
    for kernel, gap in (((7, 7), 2), ((3, 3), 5)):
        for extent, dtype in ((28, torch.bfloat16), (28, torch.float32), (7, torch.bfloat16)):
            asked.append(problem(DEPTHWISE_WEIGHT_GRAD, extent, kernel, dtype=dtype, dilations=(gap,)))
        asked.append(problem(DEPTHWISE_SUM, 28, kernel, dtype=torch.bfloat16, channels_last=True, dilations=(gap,)))
        asked.append(problem(DEPTHWISE_WEIGHT_GRAD, 28, kernel, dtype=torch.bfloat16, channels_last=True, dilations=(gap,)))
    return [Job(one, ranked_configs(one, CHIPS[name])[0], name) for one in asked for name in CHIPS]


def of_each_kind(jobs: list[Job]) -> list[Job]:
    """Return a job for each operator, type and kind of configuration: the one with the largest kernel.

    They are for the architectures in turn.
    """
    size = lambda job: max(kh * kw for kh, kw in job.problem.kernels)  # noqa: E731
    chosen: dict[tuple, dict[str, Job]] = {}
    for job in sorted(jobs, key=size):
        kind = job.problem.op, job.problem.dtype, type(job.config), getattr(job.config, "transposed", 0)
        chosen.setdefault(kind, {})[job.chip] = job
    return [list(by_chip.values())[i % len(by_chip)] for i, by_chip in enumerate(chosen.values())]


@lru_cache(maxsize=1)
def _compiled(every: bool) -> dict[Job, list[Compiled]]:
    """Compile everything at once. Configurations of float16 equal those of bfloat16; some of them are compiled too."""
    short = [job for job in shipped() if job.problem.dtype == torch.float16 and job.problem.op == DEPTHWISE_SUM]
    others = [job for job in shipped() if job.problem.dtype != torch.float16]
    jobs = (others + short[::4] + dilated() if every else of_each_kind(others) + short[:1]) + more()
    return dict(zip(jobs, compile_all(jobs)))


Kernels = dict[Job, list[Compiled]]


@pytest.fixture(params=[pytest.param(False, id="of-each-kind"), pytest.param(True, id="every", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest) -> Kernels:
    return _compiled(request.param)


def main_kernel(kernels: list[Compiled]) -> Compiled:
    assert [kernel.kernel for kernel in kernels[:-1]] == ["expand"] * (len(kernels) - 1)
    return kernels[-1]


def kernel_rows(config: KernelConfig) -> int:
    """Return the rows of the accumulators, which determine the instructions that can compute them."""
    if isinstance(config, Toeplitz):
        return config.rows * config.columns
    return config.kernel_rows * config.inputs if isinstance(config, ToeplitzGrad) else 64


def test_the_table_has_the_same_problems_for_every_architecture() -> None:
    keys = {chip: set(entries) for chip, entries in read(SHIPPED).items()}
    assert set(keys) == set(CHIPS) and len(set(map(frozenset, keys.values()))) == 1
    assert all(table_key(problem_of(key)) == key for key in keys["sm_90"])


def test_short_types_share_their_configurations() -> None:
    for entries in read(SHIPPED).values():
        for key, entry in entries.items():
            twin = entries[key.replace(" bfloat16 ", " float16 ")]
            assert twin["config"] == entry["config"] or entry["us"] is not None


@pytest.mark.timeout(600)
def test_tensor_cores_multiply(compiled: Kernels) -> None:
    wanted = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
    for job in compiled:
        products = main_kernel(compiled[job]).products
        if isinstance(job.config, BY_MULTIPLY_ADDS):
            assert products == {}, job
        elif kernel_rows(job.config) < 64:
            assert products, job
        else:
            assert set(products) == {wanted[job.chip]}, job


def test_kernels_are_compiled_for_the_exact_architecture(compiled: Kernels) -> None:
    targets = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a"}
    assert all(kernel.target == targets[job.chip] for job, kernels in compiled.items() for kernel in kernels)


def test_nothing_spills_and_everything_fits(compiled: Kernels) -> None:
    for job, kernels in compiled.items():
        for kernel in kernels:
            # Some compilers spill a pair of registers, or a few more if there are many matrices.
            assert kernel.stack <= (32 if len(job.problem.kernels) > 3 else 16), (job, kernel)
            assert kernel.registers <= 255 and kernel.shared <= CHIPS[job.chip].shared_bytes, (job, kernel)


def test_images_and_kernels_are_copied_asynchronously_and_in_large_pieces(compiled: Kernels) -> None:
    seen = 0
    for job in compiled:
        width = job.problem.shape[3] * itemsize(job.problem.dtype)
        if not isinstance(job.config, (Toeplitz, ToeplitzGrad)) or job.config.transposed or job.config.stages < 2:
            continue
        copies = {int(size) for size in main_kernel(compiled[job]).copies}
        if width % 16 == 0:
            # A block of the kernel may have less than 16 bytes per thread.
            if job.problem.tf32 and isinstance(job.config, ToeplitzGrad):
                # Products of TF32 require K to be contiguous, which it is not in memory here.
                continue
            each = kernel_rows(job.config) * job.config.depth * itemsize(job.problem.dtype) // (32 * job.config.warps)
            assert 16 in copies or each in copies, job
            seen += 16 in copies
        elif width % 4 == 0:
            assert copies, job
    assert seen > len(compiled) // 6


def test_odd_rows_cannot_be_copied_asynchronously(compiled: Kernels) -> None:
    """This checks the checks: rows of 7 numbers of two bytes are not aligned."""
    narrow = [job for job in compiled if job.problem.shape[3] == 7 and isinstance(job.config, ToeplitzGrad)]
    assert narrow and all(not main_kernel(compiled[job]).copies for job in narrow if job.problem.dtype == torch.bfloat16)
