"""The three passes of depthwise convolutions: our operator compared with PyTorch's and those of inference engines.

Every row is yielded as soon as it is measured. On a CPU, the first call that fails or computes wrong results raises. On a
device and in a sweep, such a call has no times, its row says why, and the run continues.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from widekernel import ops
from widekernel.bench import engines
from widekernel.bench.calls import PYTORCH, Call, Tensors, engine_calls, implementations, our_call, pytorch_call
from widekernel.bench.cases import FORWARD, PASSES, WEIGHT_GRAD, Case
from widekernel.bench.checking import BackendRequest, check_agreement
from widekernel.bench.errors import BenchmarkError, DeviceLostError
from widekernel.bench.fewer_images import MOST, affordable_images
from widekernel.bench.memory import return_freed_memory
from widekernel.bench.platforms import Limits, Platform
from widekernel.bench.precision import FLOAT32, Precision, in_force
from widekernel.bench.rows import DeviceOperatorRow, OperatorRow, SweepRow
from widekernel.bench.time_budget import TimeBudget
from widekernel.bench.timing import NO_TIMES, SETTLING, Timing, first_calls, interleave
from widekernel.errors import in_short
from widekernel.ops.problem import LAYOUTS
from widekernel.ops.reference import relative_error

_TWIN = "twin"


@dataclass(frozen=True)
class OperatorPlan:
    """The convolutions to measure, and how.

    Attributes:
        cases: the convolutions.
        precisions: precisions, in all of which each case is computed.
        passes: the passes to time.
        backend: backend that our operator must use; None for the selected one.
        algorithm: algorithm that our operator must use; None for the fastest.
        seconds: time to spend on each implementation of each pass.
        rounds: number of timed calls of each implementation, instead of `seconds`.
        longest: for a sweep on a CPU, which yields `SweepRow`s: calls of PyTorch that would take more than this number of
            seconds are timed on fewer images, inference engines are left out, and an implementation that fails only loses
            its own times.
    """

    cases: Sequence[Case]
    precisions: Sequence[Precision] = (FLOAT32,)
    passes: Sequence[str] = PASSES
    backend: str | None = None
    algorithm: str | None = None
    seconds: float = 0.1
    rounds: int | None = None
    longest: float | None = None

    @property
    def request(self) -> BackendRequest:
        """The backend and algorithm that our calls ask for."""
        return {"backend": self.backend, "algorithm": self.algorithm}


def measure_operators(
    plan: OperatorPlan,
    platform: Platform,
    budget: TimeBudget,
    advance: Callable[[str, int], None] = lambda what, steps: None,
) -> Iterator[OperatorRow]:
    """Time all cases; yield two rows for each precision, case and pass: our operator in NCHW and in NHWC.

    Args:
        plan: what to time.
        platform: where to time it.
        budget: tells when the time is over, and collects notes on cases without times.
        advance: called with a description of the next step, and the number of cases that were finished.

    Raises:
        BenchmarkError: on a CPU, if implementations disagree.
        NoBackendError: on a CPU, if the requested backend cannot compute a case.
    """
    names = Counter(case.name for case in plan.cases)
    for precision in plan.precisions:
        for case in plan.cases:
            label = case.name if names[case.name] == 1 else str(case)
            draw = cache(partial(Tensors.random, case, precision, platform.device))
            limits = cache(partial(platform.limits, case, precision))
            for direction in plan.passes:
                if not budget.has_time():
                    budget.leave_out(precision.name, label, direction)
                    continue
                advance(f"{precision.name} {label} {direction}", 0)
                trial = _Trial(case, direction, precision, plan, platform)
                try:
                    # Nothing is yielded in here, so that the consumer of the rows sees PyTorch's settings unchanged.
                    with in_force(precision), torch.no_grad():
                        trial.run(draw)
                except DeviceLostError as error:
                    budget.lose_device(str(error))
                    trial.fail(in_short(error))
                yield from trial.rows(limits())
                budget.wrong += trial.wrong
            draw.cache_clear()
            return_freed_memory()
            advance("", 1)


@dataclass
class _Trial:
    """One pass of one case in one precision, from the first call to its rows."""

    case: Case
    direction: str
    precision: Precision
    plan: OperatorPlan
    platform: Platform
    wrong: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    algorithms: dict[str, str] = field(default_factory=dict)
    reference_errors: dict[str, float] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)  # of implementations that may get fewer than the case has
    error: float = math.nan
    twin_ratio: float = math.nan

    @property
    def continues(self) -> bool:
        """Whether an implementation that fails or computes wrong results only loses its own times."""
        return self.platform.is_device or self.plan.longest is not None

    def run(self, draw: Callable[[], Tensors]) -> None:
        """Call, check and time; on a device and in a sweep, record failures.

        Args:
            draw: returns the tensors; it may already run out of memory.

        Raises:
            DeviceLostError: if the device accepts no more calls.
            Exception: on a CPU, outside a sweep, any error that a call raises.
        """
        try:
            self._measure(draw())
            return
        except DeviceLostError:
            raise
        except Exception as error:
            if not self.continues:
                raise
            self.fail(in_short(error))
        self.platform.stopwatch.recover()

    def fail(self, why: str) -> None:
        """Discard all times and record the reason."""
        self.timings.clear()
        self.failures[self.direction] = why

    def rows(self, limits: Limits) -> Iterator[OperatorRow]:
        """Yield the two rows: our operator in NCHW and in NHWC."""
        computing, moving = limits.seconds(self.case.macs)
        for layout in LAYOUTS:
            fields = self._fields(layout, limits)
            if not self.continues:
                yield OperatorRow(**fields)
                continue
            name = f"ours {layout}"
            failed = [who for who in (self.direction, name, *PYTORCH) if who in self.failures]
            if self.plan.longest is not None:
                yield SweepRow(
                    **fields,
                    times_same=fields[f"torch_{layout.lower()}_ms"] / fields["ours_ms"],
                    torch_nchw_images=self.images.get("PyTorch NCHW", self.case.batch),
                    torch_nhwc_images=self.images.get("PyTorch NHWC", self.case.batch),
                    twin_ratio=self.twin_ratio,
                    remark="; ".join(f"{who}: {self.failures[who]}" for who in failed),
                )
                continue
            yield DeviceOperatorRow(
                **fields,
                dtype=self.precision.name,
                limited_by="matmul" if computing > moving else "copy",
                reference_error=self.reference_errors.get(name, math.nan),
                remark="; ".join(f"{who}: {self.failures[who]}" for who in failed),
            )

    def _measure(self, tensors: Tensors) -> None:
        calls = implementations(self.direction, *tensors, self.plan.request, self.case.dilation)
        engines: dict[str, Call] = {}
        if self.plan.longest is not None:
            self._shorten(calls, tensors, self.plan.longest)
        elif self.direction == FORWARD and not self.platform.is_device and self.case.dilation == 1:
            engines = engine_calls(tensors.x, tensors.kernel)
            calls |= engines
        outputs, first = self._first_calls(calls)
        self._note_algorithms(tensors)
        if self.platform.is_device:
            self._check_reference(tensors, outputs)
        self._check_agreement(tensors, outputs)
        right = {name: call for name, call in calls.items() if name in outputs}
        # Otherwise large outputs would stay in memory throughout.
        outputs.clear()
        fastest = min(right, key=lambda name: first[name], default="")
        if fastest and self.plan.longest is not None:
            right[_TWIN], first[_TWIN] = right[fastest], first[fastest]
        patience, stopwatch = self.platform.operator_patience, self.platform.stopwatch
        self.timings = interleave(
            right, first, self.plan.seconds, self.plan.rounds, patience, stopwatch, SETTLING if engines else 0.0
        )
        if _TWIN in right:
            self.twin_ratio = self.timings.pop(_TWIN).median / self.timings[fastest].median

    def _shorten(self, calls: dict[str, Call], tensors: Tensors, longest: float) -> None:
        """Replace the calls of PyTorch that would take more than `longest` seconds by calls on fewer images."""
        for layout, memory_format in LAYOUTS.items():

            def call_on(images: int, channels: int, memory_format: torch.memory_format = memory_format) -> Call:
                few = [t[:images, :channels].contiguous(memory_format=memory_format) for t in (tensors.x, tensors.grad)]
                return pytorch_call(self.direction, few[0], few[1], tensors.kernel[:channels], self.case.dilation)

            name = f"PyTorch {layout}"
            images = self.images[name] = affordable_images(call_on, self.case, longest, self.platform.stopwatch)
            if images == 0:
                self.failures[name] = f"a single image would take more than {MOST * longest:g} s"
                del calls[name]
            elif images < self.case.batch:
                calls[name] = call_on(images, self.case.channels)

    def _first_calls(self, calls: dict[str, Call]) -> tuple[dict[str, Tensor], dict[str, float]]:
        failures = self.failures if self.continues else None
        outputs: dict[str, Tensor] = {}
        first: dict[str, float] = {}
        for name, call in calls.items():
            with ops.trace() as ran:
                output, seconds = first_calls({name: call}, self.platform.stopwatch, failures)
            outputs |= output
            first |= seconds
            self.backends[name] = ", ".join(dict.fromkeys(ran.backends()))
        return outputs, first

    def _note_algorithms(self, tensors: Tensors) -> None:
        """Record the algorithm of each backend that ran; backends name it first, followed by further details."""
        for layout, memory_format in LAYOUTS.items():
            image = tensors.x.contiguous(memory_format=memory_format)
            try:
                apart = [self.case.dilation]
                explained = ops.explain(image, [tensors.kernel], dilations=apart, **self.plan.request)
            except ops.NoBackendError:
                # Either all passes are explained or none, and this pass may still have run.
                continue
            details = explained[PASSES.index(self.direction)].details
            self.algorithms[f"ours {layout}"] = details.partition(";")[0]

    def _check_reference(self, tensors: Tensors, outputs: dict[str, Tensor]) -> None:
        """Compare our operator with float64 on the first and the last image of the timed call itself.

        A call with another batch might be computed in another way. The weight gradient is a sum over images; for it, the
        gradient of all other images is set to zero.
        """
        x, grad, kernel = tensors
        chosen = sorted({0, self.case.batch - 1})
        few_images = x[chosen].double(), grad[chosen].double()
        wanted = pytorch_call(self.direction, *few_images, kernel.double(), self.case.dilation)()
        few = torch.zeros_like(grad)
        few[chosen] = grad[chosen]
        for layout, memory_format in LAYOUTS.items():
            name = f"ours {layout}"
            if name not in outputs:
                continue
            if self.direction == WEIGHT_GRAD:
                image, gradient = (tensor.contiguous(memory_format=memory_format) for tensor in (x, few))
                got = our_call(self.direction, image, gradient, kernel, self.plan.request, self.case.dilation)()
            else:
                got = outputs[name][chosen]
            self.reference_errors[name] = relative_error(got.double(), wanted)
            self._refuse(name, self.reference_errors[name], self.precision.tolerance, outputs)

    def _check_agreement(self, tensors: Tensors, outputs: dict[str, Tensor]) -> None:
        """Compare the implementations: those on fewer images with our operator on the same images."""
        batch = self.case.batch
        for images in sorted({self.images.get(name, batch) for name in outputs}):
            chosen = {name: output for name, output in outputs.items() if self.images.get(name, batch) == images}
            few, names = tensors.first(images), list(chosen)
            if images < batch:
                calls = implementations(self.direction, *few, self.plan.request, self.case.dilation)
                chosen |= {name: call() for name, call in calls.items() if name not in PYTORCH}
            self._compare(few, chosen)
            for name in set(names) - set(chosen):
                del outputs[name]

    def _compare(self, tensors: Tensors, outputs: dict[str, Tensor]) -> None:
        """Compare outputs on the same images. On a device and in a sweep, float64 decides which of them are correct."""
        reference = next((name for name in PYTORCH if name in outputs), next(iter(outputs), None))
        if reference is None:
            return
        floats = {name: output.float() for name, output in outputs.items()}
        allowed = self.precision.agreement_tolerance
        what = f"{self.direction} of {self.case}"
        try:
            error = check_agreement(floats, reference, what, allowed)
        except BenchmarkError:
            if not self.continues:
                raise
            x, grad, kernel = (tensor.double() for tensor in tensors)
            wanted = pytorch_call(self.direction, x, grad, kernel, self.case.dilation)()
            errors = {name: relative_error(output.double(), wanted) for name, output in floats.items()}
            for name, difference in errors.items():
                self._refuse(name, difference, allowed, outputs)
            error = max((errors[name] for name in outputs), default=math.nan)
        self.error = error if math.isnan(self.error) else max(self.error, error)

    def _refuse(self, name: str, error: float, allowed: float, outputs: dict[str, Tensor]) -> None:
        # Written so that NaN is an error as well.
        if error <= allowed:
            return
        self.failures[name] = f"differs from float64 by {error:.2g} of the largest number, more than {allowed:g}"
        if name.startswith("ours"):
            what = f"{self.direction} of {self.case.name} {self.case} in {self.precision.name}"
            self.wrong.append(f"{what}, {name} ({self.backends[name]}): {self.failures[name]}")
        del outputs[name]

    def _fields(self, layout: str, limits: Limits) -> dict[str, Any]:
        """Return the fields of an `OperatorRow`; the times of implementations that have no timing are NaN."""
        case, name = self.case, f"ours {layout}"
        ours, nchw, nhwc = (self.timings.get(key, NO_TIMES) for key in (name, "PyTorch NCHW", "PyTorch NHWC"))
        nchw_seconds = nchw.median * self._share("PyTorch NCHW")
        nhwc_seconds = nhwc.median * self._share("PyTorch NHWC")
        seconds, limit = ours.median, max(limits.seconds(case.macs))
        gflops = 2 * case.macs / seconds / 1e9
        return {
            "case": case.name,
            "shape": str(case),
            "batch": case.batch,
            "channels": case.channels,
            "height": case.height,
            "width": case.width,
            "kernel_height": case.kernel[0],
            "kernel_width": case.kernel[1],
            "direction": self.direction,
            "layout": layout,
            "ours_ms": 1e3 * seconds,
            "ours_spread": ours.spread,
            "ours_calls": ours.calls,
            "torch_nchw_ms": 1e3 * nchw_seconds,
            "torch_nchw_calls": nchw.calls,
            "torch_nhwc_ms": 1e3 * nhwc_seconds,
            "torch_nhwc_calls": nhwc.calls,
            **_engine_times(self.timings),
            "times_best": shortest_of(nchw_seconds, nhwc_seconds) / seconds,
            "times_default": nchw_seconds / seconds,
            "gflops": gflops,
            "peak_share": gflops / limits.peak,
            "copy_gbs": limits.copying,
            "limit_ms": 1e3 * limit,
            "limit_share": limit / seconds,
            "intensity": 2 * case.macs / limits.bytes_moved,
            "backend": self.backends.get(name, ""),
            "algorithm": self.algorithms.get(name, ""),
            "error": self.error,
        }

    def _share(self, name: str) -> float:
        """Return the number of images of the case relative to that on which an implementation was timed; NaN for none."""
        images = self.images.get(name, self.case.batch)
        return self.case.batch / images if images else math.nan


def _engine_times(timings: Mapping[str, Timing]) -> dict[str, float | None]:
    return {f"{name}_ms": 1e3 * timings[name].median if name in timings else None for name in engines.ENGINES}


def shortest_of(*medians: float) -> float:
    """Return the shortest of several times, ignoring NaN; NaN if there is none."""
    return min((median for median in medians if not math.isnan(median)), default=math.nan)
