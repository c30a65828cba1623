"""The three passes of depthwise convolutions on a CUDA device, in several types, ours against PyTorch's.

What fails or computes wrongly has no times, and its row says why; everything else goes on. Time on such devices is short,
so that a run has a budget and every row is handed over as soon as it is there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from widekernel import ops
from widekernel.bench.cases import PASSES, WEIGHT_GRAD, Case
from widekernel.bench.checking import Asked, check_agreement
from widekernel.bench.devices import Accelerator
from widekernel.bench.errors import BenchmarkError, DeviceLostError
from widekernel.bench.gpu import Gpu
from widekernel.bench.operators import (
    Call,
    Limits,
    Row,
    ours,
    pytorchs,
    rivals_in_pytorch,
    row_fields,
)
from widekernel.bench.precision import Precision, in_force
from widekernel.bench.time_budget import Course
from widekernel.bench.timing import Stopwatch, Timing, first_calls, interleave
from widekernel.errors import in_short
from widekernel.ops.problem import LAYOUTS
from widekernel.ops.reference import relative_error

PATIENCE = 0.1, 0.2
"""Seconds of one call beyond which there is one more, and none: a gradient of PyTorch's can take longer than all else."""
YARDSTICKS = ("PyTorch NHWC", "PyTorch NCHW")


@dataclass(frozen=True)
class DeviceRow(Row):
    """One pass of one case in one type and layout, on a device.

    `peak_share` and `limit_ms` refer to matrix products in that type, `copy_gbs` and again `limit_ms` to copies of large
    tensors; `error` is NaN if nothing could be compared.

    Attributes:
        dtype: name of the precision.
        limited_by: `copy` or `matmul`, whichever takes the longer part in `limit_ms`.
        reference_error: difference of ours from float64, relative to the largest number.
        remark: what failed, or computed wrongly, and therefore has no times.
    """

    dtype: str
    limited_by: str
    reference_error: float
    remark: str


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long.

    Attributes:
        cases: the convolutions.
        precisions: in which each of them is computed.
        passes: those to time.
        backend: that ours must run on; None for whichever is chosen.
        algorithm: that ours must use; None for the fastest.
        seconds: for each rival of each pass.
        rounds: calls of each rival, instead.
    """

    cases: Sequence[Case]
    precisions: Sequence[Precision]
    passes: Sequence[str] = PASSES
    backend: str | None = None
    algorithm: str | None = None
    seconds: float = 0.1
    rounds: int | None = None

    @property
    def asked(self) -> Asked:
        """What our calls insist on."""
        return {"backend": self.backend, "algorithm": self.algorithm}


def measure_cases(
    plan: Plan,
    accelerator: Accelerator,
    gpu: Gpu,
    course: Course,
    advance: Callable[[str, int], None] = lambda what, steps: None,
) -> Iterator[DeviceRow]:
    """Time all cases, and give two rows for each type and pass: ours in NCHW and in NHWC.

    Args:
        plan: what to time.
        accelerator: where.
        gpu: whose limits the times are compared with.
        course: says when time is over, and takes notes of what has no times.
        advance: is told what comes next, and the number of cases that are done.
    """
    names = Counter(case.name for case in plan.cases)
    for precision in plan.precisions:
        for case in plan.cases:
            label = case.name if names[case.name] == 1 else str(case)
            draw = cache(partial(_Numbers.drawn, case, precision, accelerator.device))
            for direction in plan.passes:
                if not course.has_time():
                    course.leave_out(precision.name, label, direction)
                    continue
                advance(f"{precision.name} {label} {direction}", 0)
                trial = _Trial(case, direction, precision, plan)
                try:
                    # Nothing is yielded in there, so that whoever takes the rows has PyTorch's settings as they were.
                    with in_force(precision), torch.no_grad():
                        trial.run(draw, accelerator.stopwatch)
                except DeviceLostError as error:
                    course.lose_device(str(error))
                    trial.fail(in_short(error))
                yield from trial.rows(gpu)
                course.wrong += trial.wrong
            advance("", 1)


class _Numbers(NamedTuple):
    """Input (N, C, H, W), gradient of the output (N, C, H, W) and kernel (C, 1, kh, kw)."""

    x: Tensor
    grad: Tensor
    kernel: Tensor

    @classmethod
    def drawn(cls, case: Case, precision: Precision, device: torch.device) -> _Numbers:
        """Draw them, the same ones for every precision but for rounding."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = case.shape, case.shape, (case.channels, 1, *case.kernel)
        return cls(*(torch.randn(shape, generator=generator, device=device).to(precision.dtype) for shape in shapes))


@dataclass
class _Trial:
    """One pass of one case in one precision, from the first call to its rows."""

    case: Case
    direction: str
    precision: Precision
    plan: Plan
    wrong: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    algorithms: dict[str, str] = field(default_factory=dict)
    reference_errors: dict[str, float] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    error: float = math.nan

    def run(self, draw: Callable[[], _Numbers], stopwatch: Stopwatch) -> None:
        """Call, check and time; what fails is noted.

        Args:
            draw: gives the numbers, for which there may be no memory either.
            stopwatch: what times the calls.

        Raises:
            DeviceLostError: if nothing works any more.
        """
        try:
            numbers = draw()
            rivals = rivals_in_pytorch(self.direction, *numbers, self.plan.asked)
            outputs, first = self._first_calls(rivals, stopwatch)
            self._explain(numbers)
            self._check_reference(numbers, outputs)
            self._check_rivals(numbers, outputs)
            right = {name: call for name, call in rivals.items() if name in outputs}
            # Large outputs would otherwise be held throughout.
            outputs.clear()
            self.timings = interleave(right, first, self.plan.seconds, self.plan.rounds, PATIENCE, stopwatch)
            return
        except DeviceLostError:
            raise
        except Exception as error:
            self.fail(in_short(error))
        stopwatch.recover()

    def fail(self, why: str) -> None:
        """Have no times of anything."""
        self.timings.clear()
        self.failures[self.direction] = why

    def rows(self, gpu: Gpu) -> Iterator[DeviceRow]:
        """Give what was measured: ours in NCHW and in NHWC."""
        moved = self.case.bytes_moved_in(self.precision.bytes)
        limits = Limits(gpu.peak(self.precision), gpu.bandwidth, moved)
        computing, moving = limits.seconds(self.case.macs)
        for layout in LAYOUTS:
            name = f"ours {layout}"
            about = [who for who in (self.direction, name, *YARDSTICKS) if who in self.failures]
            ran = self.backends.get(name, ""), self.algorithms.get(name, ""), self.error
            yield DeviceRow(
                **row_fields(self.case, self.direction, layout, self.timings, limits, ran),
                dtype=self.precision.name,
                limited_by="matmul" if computing > moving else "copy",
                reference_error=self.reference_errors.get(name, math.nan),
                remark="; ".join(f"{who}: {self.failures[who]}" for who in about),
            )

    def _first_calls(self, rivals: dict[str, Call], stopwatch: Stopwatch) -> tuple[dict[str, Tensor], dict[str, float]]:
        outputs: dict[str, Tensor] = {}
        first: dict[str, float] = {}
        for name, call in rivals.items():
            with ops.trace() as ran:
                output, seconds = first_calls({name: call}, stopwatch, self.failures)
            outputs |= output
            first |= seconds
            self.backends[name] = ", ".join(dict.fromkeys(ran.backends()))
        return outputs, first

    def _explain(self, numbers: _Numbers) -> None:
        """Ask each backend that ran how it computed; the first thing that it says is that, what follows are its means."""
        for layout, memory_format in LAYOUTS.items():
            image = numbers.x.contiguous(memory_format=memory_format)
            try:
                explained = ops.explain(image, [numbers.kernel], **self.plan.asked)[PASSES.index(self.direction)]
            except ops.NoBackendError:
                # It explains all passes or none, and this one may have run all the same.
                continue
            self.algorithms[f"ours {layout}"] = explained.details.partition(";")[0]

    def _check_reference(self, numbers: _Numbers, outputs: dict[str, Tensor]) -> None:
        """Compare ours with float64 on the first and the last image: of the very call that is timed, since another batch
        may be computed another way. For the weight gradient, a sum over images, the gradient of all others is zero.
        """
        x, grad, kernel = numbers
        chosen = sorted({0, self.case.batch - 1})
        wanted = pytorchs(self.direction, x[chosen].double(), grad[chosen].double(), kernel.double())()
        few = torch.zeros_like(grad)
        few[chosen] = grad[chosen]
        for layout, memory_format in LAYOUTS.items():
            name = f"ours {layout}"
            if name not in outputs:
                continue
            if self.direction == WEIGHT_GRAD:
                image, gradient = (tensor.contiguous(memory_format=memory_format) for tensor in (x, few))
                got = ours(self.direction, image, gradient, kernel, self.plan.asked)()
            else:
                got = outputs[name][chosen]
            self.reference_errors[name] = relative_error(got.double(), wanted)
            self._refuse(name, self.reference_errors[name], self.precision.tolerance, outputs)

    def _check_rivals(self, numbers: _Numbers, outputs: dict[str, Tensor]) -> None:
        """Compare the rivals on the whole batch; where they differ, float64 tells who is right."""
        yardstick = next((name for name in YARDSTICKS if name in outputs), next(iter(outputs), None))
        if yardstick is None:
            return
        floats = {name: output.float() for name, output in outputs.items()}
        allowed = self.precision.rivals_tolerance
        try:
            self.error = check_agreement(floats, yardstick, self.direction, allowed)
        except BenchmarkError:
            wanted = pytorchs(self.direction, *(tensor.double() for tensor in numbers))()
            errors = {name: relative_error(output.double(), wanted) for name, output in floats.items()}
            for name, error in errors.items():
                self._refuse(name, error, allowed, outputs)
            self.error = max((errors[name] for name in outputs), default=math.nan)

    def _refuse(self, name: str, error: float, allowed: float, outputs: dict[str, Tensor]) -> None:
        # Written so that NaN is an error as well.
        if error <= allowed:
            return
        self.failures[name] = f"differs from float64 by {error:.2g} of the largest number, more than {allowed:g}"
        if name.startswith("ours"):
            what = f"{self.direction} of {self.case.name} {self.case} in {self.precision.name}"
            self.wrong.append(f"{what}, {name} ({self.backends[name]}): {self.failures[name]}")
        del outputs[name]
