"""The choice of kernel and configuration for a problem: by measurements where there are any, otherwise by the cost model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from widekernel.ops.gpu.candidates import candidates
from widekernel.ops.gpu.cost_model import estimated_cycles
from widekernel.ops.gpu.kernel_configs import Chip, KernelConfig
from widekernel.ops.gpu.launch_geometry import next_power_of_two
from widekernel.ops.gpu.tuning_tables import Entry, entry_config, find_entry
from widekernel.ops.problem import DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, Problem

TOLERATED_SLOWDOWN = 1.05
"""A measured kernel is used unless it takes longer than this many times PyTorch's time: measurements are noisy."""

# Stands in for a GPU in Triton's interpreter, where speed does not matter.
INTERPRETED_CHIP = Chip((9, 0), 1, 227 * 1024)


@dataclass(frozen=True)
class ConfigChoice:
    """A configuration, where it comes from, and why PyTorch would be faster ('' if it would not)."""

    config: KernelConfig
    source: str
    better_in_pytorch: str = ""

    def __str__(self) -> str:
        return f"{self.config}; {self.source}"


def choose_config(problem: Problem, chip: Chip, device: str) -> ConfigChoice:
    """Choose the configuration for a problem that is not empty.

    Args:
        problem: the problem to compute.
        chip: the GPU that computes it.
        device: the full name of that GPU.
    """
    found = find_entry(problem, chip, device)
    if found is not None:
        entry, source = found
        config = entry_config(entry)
        # A table written by another version may hold a configuration that this version cannot run.
        if config in candidates(problem, chip):
            measured = "" if entry.get("us") is not None else ", estimated and compiled but not measured"
            return ConfigChoice(config, source + measured, _faster_in_pytorch(entry) or _unmeasured(problem, entry))
    # The batch is rounded as in tables, so that a smaller last batch does not compile other kernels.
    rounded = replace(problem, shape=(next_power_of_two(problem.shape[0]), *problem.shape[1:]))
    return ConfigChoice(_cheapest(rounded, chip), "estimated, not measured", _estimated_better(problem))


def ranked_configs(problem: Problem, chip: Chip) -> list[KernelConfig]:
    """Return the configurations for a problem, the most promising first."""
    # Equal costs are ordered by text, so that the ranking is deterministic.
    return sorted(candidates(problem, chip), key=lambda config: (estimated_cycles(problem, config, chip), str(config)))


@lru_cache(maxsize=1024)
def _cheapest(problem: Problem, chip: Chip) -> KernelConfig:
    return ranked_configs(problem, chip)[0]


def _faster_in_pytorch(entry: Entry) -> str:
    ours, theirs = entry.get("us"), entry.get("pytorch_us")
    if ours is None or theirs is None or ours <= theirs * TOLERATED_SLOWDOWN:
        return ""
    return f"PyTorch takes {theirs:.0f} µs where this backend takes {ours:.0f} µs (measured)"


def _unmeasured(problem: Problem, entry: Entry) -> str:
    return _estimated_better(problem) if entry.get("us") is None else ""


def _estimated_better(problem: Problem) -> str:
    largest = max(kh * kw for kh, kw in problem.kernels)
    if problem.op == DEPTHWISE_SUM and len(problem.kernels) == 1 and largest <= 9:
        return f"PyTorch's kernels for {largest} taps are bound by memory already (an estimate; `widekernel tune` measures)"
    if problem.op == DEPTHWISE_WEIGHT_GRAD and largest == 1:
        return "PyTorch computes the gradient of one tap at the speed of memory (an estimate; `widekernel tune` measures)"
    return ""
