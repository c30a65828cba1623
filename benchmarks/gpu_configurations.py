"""Write the tuning table that ships with the package, for the layers of RepLKNet and SLaK.

    python -m benchmarks.gpu_configurations

Needs no GPU: for each architecture, the configuration that the cost model ranks first among those that compile without
spilling registers is chosen. Entries measured on a GPU (`widekernel tune --table`) take precedence and are kept.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)

from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.progress import track
from tests.ops.gpu.compiling import CHIPS, Job, compile_job

from widekernel.ops.gpu.config_choice import ranked_configs
from widekernel.ops.gpu.kernel_configs import KernelConfig
from widekernel.ops.gpu.tuning_tables import SHIPPED, read, table_key, write
from widekernel.ops.problem import DEPTHWISE_BRANCHES, DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, Problem

BATCH = 64
MOST_TRIED = 8
REPLKNET = [(128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13)]
SLAK = [(124, 56, 51), (249, 28, 49), (499, 14, 47), (998, 7, 13)]

Size = tuple[int, int]


def problem(op: str, channels: int, extent: int, *kernels: Size) -> Problem:
    anchors = tuple((kh // 2, kw // 2) for kh, kw in kernels)
    return Problem(op, "cuda", torch.bfloat16, (BATCH, channels, extent, extent), kernels, anchors)


def problems() -> Iterator[Problem]:
    """Yield the problems of a training step and of a folded forward pass of the networks."""
    for channels, extent, k in REPLKNET:
        yield problem(DEPTHWISE_SUM, channels, extent, (k, k))
        yield problem(DEPTHWISE_BRANCHES, channels, extent, (k, k), (5, 5))
        yield problem(DEPTHWISE_WEIGHT_GRAD, channels, extent, (k, k))
    for channels, extent, k in SLAK:
        yield problem(DEPTHWISE_SUM, channels, extent, (k, 5), (5, k))
        yield problem(DEPTHWISE_BRANCHES, channels, extent, (k, 5), (5, k), (5, 5))
        for kernel in ((k, 5), (5, k)):
            yield problem(DEPTHWISE_WEIGHT_GRAD, channels, extent, kernel)


def screened(asked: Problem, chip: str) -> KernelConfig | None:
    for config in ranked_configs(asked, CHIPS[chip])[:MOST_TRIED]:
        compiled = compile_job(Job(asked, config, chip))
        if all(kernel.stack == 0 and kernel.shared <= CHIPS[chip].shared_bytes for kernel in compiled):
            return config
    return None


def main() -> None:
    gpus = read(SHIPPED) if SHIPPED.exists() else {}
    jobs = [(asked, chip) for chip in CHIPS for asked in problems()]
    for asked, chip in track(jobs, "compiling"):
        config = screened(asked, chip)
        for dtype in (torch.bfloat16, torch.float16):
            key = table_key(replace(asked, dtype=dtype))
            entries = gpus.setdefault(chip, {})
            measured = entries.get(key, {}).get("us") is not None
            if config is not None and not measured:
                entries[key] = {"config": config.to_entry(), "us": None, "pytorch_us": None}
    write(SHIPPED, gpus)


if __name__ == "__main__":
    main()
