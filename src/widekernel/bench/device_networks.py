"""Whole networks on a CUDA device, in several types: ours against the same network on PyTorch's convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

import torch
from torch import Tensor, nn

from widekernel.bench.agreement import NOISE_FACTOR, check_rivals
from widekernel.bench.baselines import (
    INFER,
    MODES,
    PYTORCH,
    Rival,
    build_rivals,
    with_visible_blocks,
)
from widekernel.bench.depthwise_share import depthwise_share
from widekernel.bench.devices import Accelerator
from widekernel.bench.errors import BenchmarkError, DeviceLostError
from widekernel.bench.networks import NetworkRow, call_of, examples, row_fields
from widekernel.bench.operators import best_of
from widekernel.bench.precision import BFLOAT16, FLOAT32, Precision, in_force
from widekernel.bench.time_budget import Course
from widekernel.bench.timing import Timing, first_calls, interleave
from widekernel.errors import in_short
from widekernel.ops.reference import relative_error

PATIENCE = 2.0, 10.0
"""Seconds of one call beyond which there is one more, and none."""
CHECKED = 2
"""Images on which the rivals are compared in float32; batch norm cannot do with one."""
COMPILED_TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "float16": 5e-2, "bfloat16": 1e-1}
"""Largest difference of outputs that compiling may make, relative to the largest number: it rounds elsewhere."""
DEFAULT_NETWORKS = ("replknet_31b", "slak_tiny", "shiftwise_tiny", "convnext_tiny")
DEFAULT_BATCHES = (64, 128)
_ALL = "all"


@dataclass(frozen=True)
class DeviceNetworkRow(NetworkRow):
    """One rival in one mode, type and layout, on a device.

    Attributes:
        dtype: name of the precision; float16 and bfloat16 by autocast.
        times_best: how many times faster it is than the fastest of PyTorch's, folded ones included, and for what is
            compiled, compiled ones too.
        remark: what failed, or computed wrongly, and therefore has no times.
    """

    dtype: str
    times_best: float
    remark: str


@dataclass(frozen=True)
class NetworkPlan:
    """What is measured, and how long.

    Attributes:
        networks: for each name what builds the network and gives its usual size of images.
        batches: numbers of images in a call.
        precisions: in which it computes.
        modes: those to time.
        compiled: whether `torch.compile` takes part.
        size: height and width of the images; None for the network's own.
        seconds: for each rival.
        rounds: calls of each rival, instead.
    """

    networks: Mapping[str, Callable[[], tuple[nn.Module, int]]]
    batches: Sequence[int] = DEFAULT_BATCHES
    precisions: Sequence[Precision] = (BFLOAT16,)
    modes: Sequence[str] = MODES
    compiled: bool = False
    size: int | None = None
    seconds: float = 1.0
    rounds: int | None = None


def measure_networks(
    plan: NetworkPlan,
    accelerator: Accelerator,
    course: Course,
    advance: Callable[[str, int], None] = lambda what, steps: None,
) -> Iterator[DeviceNetworkRow]:
    """Time networks, all rivals in turns, and give the rows of each precision, batch and mode as soon as they are there.

    What is compiled comes last, in a second round with all the others once more, since compiling takes minutes a network:
    it must cost no row of anything else.

    Args:
        plan: what to time.
        accelerator: where.
        course: says when time is over, and takes notes of what has no times.
        advance: is told what comes next, and the number of networks that are done.
    """
    failed: set[tuple[object, ...]] = set()
    for compiled in (False, True) if plan.compiled else (False,):
        for name, build in plan.networks.items():
            # Not before there is time for it.
            model = cache(partial(_built, build, accelerator.device))
            for precision, batch, mode in product(plan.precisions, plan.batches, plan.modes):
                what = f"{name}, {batch} images{', compiled' if compiled else ''}"
                if (name, precision, batch, mode) in failed:
                    continue
                if not course.has_time():
                    course.leave_out(precision.name, what, mode)
                    continue
                advance(f"{what}, {mode}, {precision.name}", 0)
                network, usual = model()
                trial = _Trial(name, mode, precision, replace(plan, compiled=compiled), accelerator, course)
                yield from trial.rows(network, batch, plan.size or usual)
                if trial.failed:
                    failed.add((name, precision, batch, mode))
                if compiled:
                    # What has been compiled is of no further use, and takes memory and places among the few forms kept.
                    torch.compiler.reset()
            advance("", 0 if compiled else 1)


def _built(build: Callable[[], tuple[nn.Module, int]], device: torch.device) -> tuple[nn.Module, int]:
    model, usual = build()
    return with_visible_blocks(model).to(device), usual


class _Trial:
    """The rivals of one network in one mode, precision and batch."""

    def __init__(
        self, name: str, mode: str, precision: Precision, plan: NetworkPlan, accelerator: Accelerator, course: Course
    ) -> None:
        self.name, self.mode, self.precision, self.plan = name, mode, precision, plan
        self.device, self.stopwatch, self.course = accelerator.device, accelerator.stopwatch, course
        self.failed = False
        self.failures: dict[str, str] = {}
        self.timings: dict[str, Timing] = {}
        self.shares: dict[str, float] = {}

    def rows(self, model: nn.Module, batch: int, size: int) -> list[DeviceNetworkRow]:
        """Check, time, and give a row a rival; one row for all of them if nothing can be said of any."""
        rivals: list[Rival] = []
        failure, lost = "", False
        try:
            # Settings are put back before anybody sees a row.
            with in_force(self.precision):
                images, target = examples(self.name, model, batch, size)
                rivals = build_rivals(model, self.mode, images, self.plan.compiled, self.conditions)
            self._check(rivals, target)
            with in_force(self.precision):
                self._time(rivals, target)
        except DeviceLostError as error:
            failure, lost = str(error), True
        except BenchmarkError as error:
            failure = str(error)
            self.course.wrong.append(f"{self.name}, {self.mode}, {self.precision.name}, {batch} images: {error}")
        except Exception as error:
            failure = in_short(error)
        if not failure:
            # The others had theirs in the first round.
            return [self._row(rival) for rival in rivals if rival.compiled == self.plan.compiled]
        if lost:
            self.course.lose_device(failure)
        else:
            self._recover()
        self.failed = True
        self.timings.clear()
        all_of_them = Rival(_ALL, "", False, model, model, torch.empty(batch, 0, size, size, device="meta"))
        self.failures[all_of_them.name] = failure
        return [self._row(all_of_them)]

    def conditions(self) -> AbstractContextManager[object]:
        """Make the context in which the rivals are timed."""
        dtype = self.precision.autocast
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _recover(self) -> None:
        try:
            self.stopwatch.recover()
        except DeviceLostError as error:
            self.course.lose_device(str(error))

    def _check(self, rivals: Sequence[Rival], target: Tensor) -> None:
        """Compare those that are not compiled, on few images and in float32, where differences mean something."""
        few = [replace(rival, images=rival.images[:CHECKED]) for rival in rivals if not rival.compiled]
        with in_force(FLOAT32, search=False):
            check_rivals(self.name, few, self.mode, target[:CHECKED])
        for rival in rivals:
            rival.network.zero_grad()

    def _time(self, rivals: Sequence[Rival], target: Tensor) -> None:
        calls = {rival.name: call_of(rival, self.mode, target, self.conditions) for rival in rivals}
        first: dict[str, float] = {}
        for rival in rivals:
            if rival.compiled and not self.course.has_time():
                self.failures[rival.name] = "no time was left to compile it"
            else:
                first |= first_calls({rival.name: calls[rival.name]}, self.stopwatch, self.failures)[1]
        self._check_compiled([rival for rival in rivals if rival.name in first])
        right = {name: call for name, call in calls.items() if name in first and name not in self.failures}
        self.timings = interleave(right, first, self.plan.seconds, self.plan.rounds, PATIENCE, self.stopwatch)
        for rival in rivals:
            if rival.name in right and not rival.compiled:
                self.shares[rival.name] = depthwise_share(calls[rival.name], self.device)

    def _check_compiled(self, rivals: Sequence[Rival]) -> None:
        """Compare what compiled networks put out with what they do before compiling, as they are timed.

        Compiling rounds elsewhere, and a network that has not been trained may magnify that: what PyTorch's two layouts
        differ by tells how much.
        """
        plain = {rival.name: rival for rival in rivals if not rival.compiled}
        pairs = [(r, plain.get(replace(r, compiled=False).name)) for r in rivals if r.compiled]
        if not pairs:
            return
        layouts = [self._output(rival) for rival in plain.values() if rival.rival == PYTORCH]
        noise = relative_error(*layouts) if len(layouts) == 2 else 0.0
        allowed = max(COMPILED_TOLERANCE[self.precision.name], NOISE_FACTOR * noise)
        for rival, twin in pairs:
            error = math.nan if twin is None else relative_error(self._output(rival), self._output(twin))
            # Written so that NaN is an error as well.
            if not error <= allowed:
                why = f"its output is off by {error:.2g} of what it is without compiling, more than {allowed:.2g}"
                self.failures[rival.name] = why
                self.course.wrong.append(f"{self.name}, {self.mode}, {rival.name}: {why}")

    def _output(self, rival: Rival) -> Tensor:
        torch.manual_seed(0)  # for networks that drop something at random
        # The same modes as in the calls that are timed: in others it would be compiled once more.
        mode = torch.inference_mode() if self.mode == INFER else nullcontext()
        with mode, self.conditions():
            return rival.forward(rival.images).detach().float()

    def _row(self, rival: Rival) -> DeviceNetworkRow:
        theirs = [timing.median for name, timing in self.timings.items() if name.startswith(PYTORCH)]
        fields = row_fields(self.name, self.mode, rival, self.timings, self.shares.get(rival.name))
        return DeviceNetworkRow(
            **fields,
            dtype=self.precision.name,
            times_best=1e3 * best_of(*theirs) / fields["ms"],
            remark=self.failures.get(rival.name, ""),
        )
