"""Which kernel and configuration computes a problem on a GPU: what was measured if anything was, an estimate otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from widekernel.ops.gpu.candidates import candidates
from widekernel.ops.gpu.configs import Chip, Config, power_of_two
from widekernel.ops.gpu.cost import cycles
from widekernel.ops.gpu.tables import config_of, entry_of
from widekernel.ops.problem import DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, Problem

SLOWER = 1.05
"""How many times PyTorch's time a measured kernel may take before PyTorch is left to do it: measurements are noisy."""

# Stands for a GPU in Triton's interpreter, where speed is no matter.
INTERPRETED = Chip((9, 0), 1, 227 * 1024)


@dataclass(frozen=True)
class Plan:
    """A configuration, where it comes from, and the reason why PyTorch is better, '' if it is not."""

    config: Config
    source: str
    better_in_pytorch: str = ""

    def __str__(self) -> str:
        return f"{self.config}; {self.source}"


def plan(problem: Problem, chip: Chip, device: str) -> Plan:
    """Choose for a problem that is not empty.

    Args:
        problem: what is to be computed.
        chip: on what.
        device: the full name of that GPU.
    """
    found = entry_of(problem, chip, device)
    if found is not None:
        entry, source = found
        config = config_of(entry)
        # A table of another version may hold what this one cannot run.
        if config in candidates(problem, chip):
            measured = "" if entry.get("us") is not None else ", estimated and compiled but not measured"
            return Plan(config, source + measured, _faster_in_pytorch(entry) or _unmeasured(problem, entry))
    # By the magnitude of the batch, as in tables: a smaller last batch shall not have kernels compiled anew.
    rounded = replace(problem, shape=(power_of_two(problem.shape[0]), *problem.shape[1:]))
    return Plan(_cheapest(rounded, chip), "estimated, not measured", _estimated_better(problem))


def ranked(problem: Problem, chip: Chip) -> list[Config]:
    """List the configurations for a problem, the most promising first."""
    # What is equal in cost is ordered by its text, so that the choice never depends on anything else.
    return sorted(candidates(problem, chip), key=lambda config: (cycles(problem, config, chip), str(config)))


@lru_cache(maxsize=1024)
def _cheapest(problem: Problem, chip: Chip) -> Config:
    return ranked(problem, chip)[0]


def _faster_in_pytorch(entry: dict) -> str:
    ours, theirs = entry.get("us"), entry.get("pytorch_us")
    if ours is None or theirs is None or ours <= theirs * SLOWER:
        return ""
    return f"PyTorch takes {theirs:.0f} µs where this backend takes {ours:.0f} µs (measured)"


def _unmeasured(problem: Problem, entry: dict) -> str:
    return _estimated_better(problem) if entry.get("us") is None else ""


def _estimated_better(problem: Problem) -> str:
    largest = max(kh * kw for kh, kw in problem.kernels)
    if problem.op == DEPTHWISE_SUM and len(problem.kernels) == 1 and largest <= 9:
        return f"PyTorch's kernels for {largest} taps are bound by memory already (an estimate; `widekernel tune` measures)"
    if problem.op == DEPTHWISE_WEIGHT_GRAD and largest == 1:
        return "PyTorch computes the gradient of one tap at the speed of memory (an estimate; `widekernel tune` measures)"
    return ""
