"""Training steps of layers with several branches: ours, ours with zeros in the gaps of dilated kernels, and PyTorch's.

A step is the forward pass of all branches and, given the gradient of each, the gradients of the input and of all kernels.
Each part is timed alone, through automatic differentiation, on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel import ops
from widekernel.bench.cases import BLOCK_BRANCHES, BLOCK_SHAPES, FORWARD, INPUT_GRAD, WEIGHT_GRAD
from widekernel.bench.checking import check_agreement
from widekernel.bench.platforms import Platform
from widekernel.bench.precision import FLOAT32, Precision, in_force
from widekernel.bench.rows import BranchesRow
from widekernel.bench.time_budget import TimeBudget
from widekernel.bench.timing import Timing, first_calls, interleave
from widekernel.errors import ArgumentError, nearest
from widekernel.layers import Rect
from widekernel.ops.problem import LAYOUTS

PARTS = (FORWARD, INPUT_GRAD, WEIGHT_GRAD)
STEP = "all three"
OURS, FILLED, PYTORCH = "ours", "zeros in the gaps", "PyTorch"

Branches = Callable[[Tensor, list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class BranchesCase:
    """A layer with several branches.

    Attributes:
        name: short name.
        shape: (N, C, H, W).
        branches: (kh, kw, dilation) of each branch, with odd kh and kw.
    """

    name: str
    shape: tuple[int, int, int, int]
    branches: tuple[tuple[int, int, int], ...]

    @property
    def dilations(self) -> list[int]:
        """The dilation of each branch."""
        return [dilation for _, _, dilation in self.branches]

    def __str__(self) -> str:
        kernels = [f"{kh}x{kw}" + (f"d{dilation}" if dilation > 1 else "") for kh, kw, dilation in self.branches]
        return f"{'x'.join(map(str, self.shape))} {' + '.join(kernels)}"


_DILATED = [
    BranchesCase(name, shape, tuple((side, side, dilation) for side, dilation in BLOCK_BRANCHES))
    for name, shape in BLOCK_SHAPES.items()
]
_CASES = {
    case.name: case
    for case in (
        *_DILATED,
        BranchesCase("replknet-3", (8, 512, 14, 14), ((27, 27, 1), (5, 5, 1))),
        BranchesCase("slak-3", (8, 499, 14, 14), ((47, 5, 1), (5, 47, 1), (5, 5, 1))),
    )
}


def choose_branches(names: Sequence[str], batch: int | None = None) -> list[BranchesCase]:
    """Return the named cases; without names, those with dilations.

    Args:
        names: names of cases.
        batch: N of all cases.

    Raises:
        ArgumentError: if a name is unknown.
    """
    for name in names:
        if name not in _CASES:
            raise ArgumentError(f"unknown case {name!r}.{nearest(name, _CASES)} Cases: {', '.join(_CASES)}.")
    chosen = [_CASES[name] for name in names] or _DILATED
    return [case if batch is None else replace(case, shape=(batch, *case.shape[1:])) for case in chosen]


def measure_branches(
    cases: Sequence[BranchesCase],
    platform: Platform,
    budget: TimeBudget,
    advance: Callable[[str, int], None] = lambda what, steps: None,
    *,
    precisions: Sequence[Precision] = (FLOAT32,),
    seconds: float = 0.1,
    rounds: int | None = None,
) -> Iterator[BranchesRow]:
    """Time all cases; yield a row for each precision, case, layout of ours and part of the step, and one for the step.

    Args:
        cases: what to time.
        platform: where to time it.
        budget: tells when the time is over.
        advance: called with a description of the next step, and the number of cases that were finished.
        precisions: precisions, in all of which each case is computed.
        seconds: time to spend on each implementation of each part.
        rounds: number of timed calls of each implementation, instead of `seconds`.

    Raises:
        BenchmarkError: if implementations disagree.
    """
    for precision in precisions:
        for case in cases:
            measured: dict[str, _Part] = {}
            for part in PARTS:
                if not budget.has_time():
                    budget.leave_out(precision.name, case.name, part)
                    continue
                advance(f"{precision.name} {case.name} {part}", 0)
                with in_force(precision):
                    measured[part] = _measure(case, part, precision, platform, seconds, rounds)
            for layout in LAYOUTS:
                yield from _rows(case, precision, layout, measured)
            advance("", 1)


class _Part(NamedTuple):
    """The timing of every implementation by name, the backends that ran, and the largest difference between results."""

    timings: Mapping[str, Timing]
    backends: Mapping[str, str]
    error: float


def _measure(
    case: BranchesCase, part: str, precision: Precision, platform: Platform, seconds: float, rounds: int | None
) -> _Part:
    calls, backends = _calls(case, part, precision, platform.device), {}
    outputs: dict[str, Tensor] = {}
    first: dict[str, float] = {}
    for name, call in calls.items():
        with ops.trace() as ran:
            output, took = first_calls({name: call}, platform.stopwatch)
        outputs[name] = torch.cat([tensor.detach().float().flatten() for tensor in output[name]])
        backends[name] = ", ".join(dict.fromkeys(ran.backends()))
        first |= took
    what = f"{part} of {case}"
    error = check_agreement(outputs, f"{PYTORCH} NHWC", what, precision.agreement_tolerance)
    outputs.clear()
    timings = interleave(calls, first, seconds, rounds, platform.operator_patience, platform.stopwatch)
    return _Part(timings, backends, error)


def _calls(case: BranchesCase, part: str, precision: Precision, device: torch.device) -> dict[str, Callable[[], Sequence]]:
    """Return the calls of all implementations in both layouts."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(precision.dtype)

    x, grads = draw(*case.shape), [draw(*case.shape) for _ in case.branches]
    kernels = [draw(case.shape[1], 1, kh, kw) for kh, kw, _ in case.branches]
    calls: dict[str, Callable[[], Sequence]] = {}
    for layout, memory_format in LAYOUTS.items():
        image, *gradients = (tensor.contiguous(memory_format=memory_format) for tensor in (x, *grads))
        for kind, compute in _implementations(case).items():
            calls[f"{kind} {layout}"] = _call(compute, part, image, gradients, kernels)
    return calls


def _implementations(case: BranchesCase) -> dict[str, Branches]:
    def ours(x: Tensor, kernels: list[Tensor]) -> list[Tensor]:
        return ops.depthwise_branches(x, kernels, dilations=case.dilations)

    def filled(x: Tensor, kernels: list[Tensor]) -> list[Tensor]:
        return ops.depthwise_branches(x, [Rect.centered(k, d).dense().kernel for k, d in zip(kernels, case.dilations)])

    def pytorch(x: Tensor, kernels: list[Tensor]) -> list[Tensor]:
        rects = [Rect.centered(kernel, dilation) for kernel, dilation in zip(kernels, case.dilations)]
        return [
            F.conv2d(x, rect.kernel, padding=(rect.reach[0], rect.reach[2]), dilation=rect.dilation, groups=x.shape[1])
            for rect in rects
        ]

    dilated = max(case.dilations) > 1
    return {OURS: ours, **({FILLED: filled} if dilated else {}), PYTORCH: pytorch}


def _call(
    compute: Branches, part: str, x: Tensor, grads: list[Tensor], kernels: list[Tensor]
) -> Callable[[], Sequence[Tensor]]:
    """Return the call of one part; those of gradients repeat only the backward pass."""
    if part == FORWARD:

        @torch.no_grad()
        def forward() -> list[Tensor]:
            return compute(x, kernels)

        return forward
    image = x.detach().requires_grad_(part == INPUT_GRAD)
    taps = [kernel.detach().requires_grad_(part == WEIGHT_GRAD) for kernel in kernels]
    outputs, wanted = compute(image, taps), [image] if part == INPUT_GRAD else taps
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def _rows(case: BranchesCase, precision: Precision, layout: str, measured: Mapping[str, _Part]) -> Iterator[BranchesRow]:
    """Yield the rows of a layout: the parts, and their sum if all were measured."""
    own = f"{OURS} {layout}"
    sums: dict[str, float] = {}
    for part, (timings, backends, error) in measured.items():
        medians = {name: 1e3 * timing.median for name, timing in timings.items()}
        sums = {name: sums.get(name, 0.0) + ms for name, ms in medians.items()}
        yield _row(case, precision, part, layout, medians, timings[own].spread, backends[own], error)
    if len(measured) == len(PARTS):
        ran = ", ".join(dict.fromkeys(part.backends[own] for part in measured.values()))
        yield _row(case, precision, STEP, layout, sums, math.nan, ran, max(part.error for part in measured.values()))


def _row(
    case: BranchesCase,
    precision: Precision,
    part: str,
    layout: str,
    medians: Mapping[str, float],
    spread: float,
    backend: str,
    error: float,
) -> BranchesRow:
    ours, filled = medians[f"{OURS} {layout}"], medians.get(f"{FILLED} {layout}", math.nan)
    nchw, nhwc = medians[f"{PYTORCH} NCHW"], medians[f"{PYTORCH} NHWC"]
    return BranchesRow(
        case=case.name,
        shape=str(case),
        dtype=precision.name,
        part=part,
        layout=layout,
        ours_ms=ours,
        ours_spread=spread,
        filled_ms=filled,
        torch_nchw_ms=nchw,
        torch_nhwc_ms=nhwc,
        times_filled=filled / ours,
        times_best=min(nchw, nhwc) / ours,
        backend=backend,
        error=error,
    )
