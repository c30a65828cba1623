"""Time a training step of two processes by options of DistributedDataParallel, on CPUs with gloo.

    python benchmarks/gradient_averaging.py [ROUNDS]

A network of 25 million parameters; the variants take turns, and each is compared with the first in the same round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from widekernel.engine.joining import joined_processes
from widekernel.launch.local import environments

VARIANTS = {
    "PyTorch's defaults": {"gradient_as_bucket_view": False},
    "gradient_as_bucket_view": {},
    "gradient_as_bucket_view, static_graph": {"static_graph": True},
    "gradient_as_bucket_view, buckets of 50 MB": {"bucket_cap_mb": 50},
    "gradient_as_bucket_view, buckets of 100 MB": {"bucket_cap_mb": 100},
    "gradient_as_bucket_view, buckets of 10 MB": {"bucket_cap_mb": 10},
}
WARM_UP = 2  # the buckets are rebuilt after the first step


def step(network: nn.Module, images: torch.Tensor) -> float:
    """Time the forward and backward pass."""
    network.zero_grad(set_to_none=True)
    start = time.perf_counter()
    network(images).square().mean().backward()
    return time.perf_counter() - start


def measure(rounds: int) -> None:
    """Measure in this process, and print the table in process 0."""
    with joined_processes("cpu") as processes:
        networks = {}
        for name, options in VARIANTS.items():
            torch.manual_seed(0)
            layers = [layer for _ in range(24) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
            networks[name] = processes.wrap(nn.Sequential(*layers), **options)
        images = torch.randn(16, 1024)
        seconds: dict[str, list[float]] = {name: [] for name in networks}
        for number in range(WARM_UP + rounds):
            for name in list(networks) if number % 2 else reversed(networks):
                processes.barrier("the next variant")
                took = step(networks[name], images)
                if number >= WARM_UP:
                    seconds[name].append(took)
        if processes.is_main:
            first = seconds[next(iter(seconds))]
            for name, times in seconds.items():
                ratios = [a / b for a, b in zip(times, first)]
                print(f"{name:45} {statistics.median(times) * 1e3:7.1f} ms  ×{statistics.median(ratios):.3f}")


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    if "RANK" in os.environ:
        measure(count)
    else:
        started = [subprocess.Popen([sys.executable, *sys.argv], env=env) for env in environments(2, os.environ)]
        sys.exit(max(process.wait() for process in started))
