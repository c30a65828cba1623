"""Fits the constants of the native backend's cost model to timings on this machine (src/widekernel/ops/cpu/costs.py).

    python benchmarks/cpu_costs.py avx2

Times every algorithm on square kernels and strips, maps of 7 to 56 pixels, forward pass and weight gradient, on one thread,
with the named instruction set. Prints the fitted constants, and how far the choices by them and by the present ones fall
behind the fastest algorithm. Takes some 20 seconds on an idle machine, and needs SciPy.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from scipy.optimize import minimize

from widekernel.ops.cpu import library
from widekernel.ops.cpu.costs import Costs, costs_of
from widekernel.ops.cpu.plan import METHODS, Pass, Piece, Plan, estimate
from widekernel.ops.cpu.prepared import PreparedSum, PreparedWeightGrad
from widekernel.ops.problem import Problem

SIZES = [(3, 3), (5, 5), (7, 7), (9, 9), (13, 13), (21, 21), (31, 31), (5, 31), (51, 5), (5, 51)]
MAPS, IMAGES, BLOCKS = (7, 14, 28, 56), 4, 4
FITTED = [
    *("direct_rate", "direct_tile", "dilated_rate", "dilated_tile", "complex_rate", "complex_tile"),
    *("transform_rate", "transform_tile", "packing", "fetching"),
]


@dataclass
class Timing:
    problem: Problem
    step: Pass
    cycles: float  # for one block of channels of one image

    def estimated(self, costs: Costs) -> float:
        height, width = self.problem.shape[2:]
        return estimate(self.step, self.problem, costs) + 2 * costs.packing * height * width


def cases(channels: int) -> Iterator[tuple[Problem, list[Pass]]]:
    for side in MAPS:
        for size in SIZES:
            if max(size) > 2 * side + 3:
                continue
            x, anchor = torch.empty(IMAGES, channels, side, side), (size[0] // 2, size[1] // 2)
            for problem in (
                Problem.of_sum(x, [torch.empty(channels, 1, *size)], [anchor]),
                Problem.of_weight_grad(x, size, anchor),
            ):
                yield problem, [Pass(Piece(*size, *anchor), method) for method in METHODS]
        for size, dilation in [((3, 3), 3), ((7, 7), 2), ((5, 5), 3)]:
            x, anchor = torch.empty(IMAGES, channels, side, side), (size[0] // 2, size[1] // 2)
            if dilation * anchor[0] < side:
                problem = Problem.of_sum(x, [torch.empty(channels, 1, *size)], [anchor], dilations=(dilation,))
                yield problem, [Pass(Piece(*size, *anchor, dilation), library.DIRECT)]


def seconds(problem: Problem, step: Pass) -> float:
    chosen = Plan((step,), (0,), 1, 0.0)
    x, grad = torch.randn(problem.shape), torch.randn(problem.shape)
    size, anchor = problem.kernels[0], problem.anchors[0]
    kernel = torch.randn(problem.shape[1], 1, *size)
    if problem.op == "depthwise_sum":
        prepared = PreparedSum(problem, chosen)
        call = lambda: prepared(x, [kernel], [anchor])  # noqa: E731
    else:
        for_weight = PreparedWeightGrad(problem, chosen)
        call = lambda: for_weight(x, grad, size, anchor)  # noqa: E731
    call()
    best, end = math.inf, time.perf_counter() + 0.03
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def shortfall(timings: list[Timing], costs: Costs) -> tuple[float, float]:
    """Return the mean and the largest ratio of the time of the chosen algorithm to that of the fastest."""
    ratios = []
    for problem in {timing.problem for timing in timings}:
        options = [timing for timing in timings if timing.problem == problem]
        chosen = min(options, key=lambda timing: timing.estimated(costs))
        ratios.append(chosen.cycles / min(timing.cycles for timing in options))
    return sum(ratios) / len(ratios), max(ratios)


def fitted(timings: list[Timing], start: Costs, most: int) -> Costs:
    def costs_at(logarithms: list[float]) -> Costs:
        return replace(start, **{name: math.exp(value) for name, value in zip(FITTED, logarithms)})

    def badness(logarithms: list[float]) -> float:
        costs = costs_at(logarithms)
        errors = sum(abs(math.log(timing.estimated(costs) / timing.cycles)) for timing in timings)
        # The timings hardly tell some constants apart, so those should stay near where they are.
        return errors + 2 * sum((value - before) ** 2 for value, before in zip(logarithms, first))

    first = [math.log(getattr(start, name)) for name in FITTED]
    bounds = [(most / 4, most) if name.endswith("rate") else (0.5, 1000) for name in FITTED]
    bounds = [(math.log(least), math.log(greatest)) for least, greatest in bounds]
    return costs_at(list(minimize(badness, first, method="Powell", bounds=bounds, options={"maxiter": 3}).x))


def main(isa: str) -> None:
    torch.set_num_threads(1)
    native = library.load()
    native.use_isa(isa)
    before = costs_of(isa, native.processor)
    # The vector multiply-adds that a processor finishes in a cycle.
    most = 1 if (isa, native.processor) == ("avx512", "zen4") else 2
    clock = native.calls.wk_fma_peak(1, 0.2) / (2 * most * native.lanes)
    timings = []
    for problem, steps in cases(BLOCKS * native.lanes):
        for step in steps:
            timings.append(Timing(problem, step, seconds(problem, step) * clock / (IMAGES * BLOCKS)))
    after = fitted(timings, before, most)
    print(f"{len(timings)} timings with {isa}, {clock / 1e9:.2f} GHz by the peak of multiply-adds")
    for costs in (before, after):
        errors = sorted(abs(math.log(timing.estimated(costs) / timing.cycles)) for timing in timings)
        mean, largest = shortfall(timings, costs)
        print(costs)
        error = math.exp(errors[len(errors) // 2]) - 1
        print(f"  median error {error:.0%}; time of the choices {mean:.3f} of the fastest, at most {largest:.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
