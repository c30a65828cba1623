"""Whole networks in training and inference: ours, and for comparison the same network on PyTorch's convolutions.

On a CPU, the first error raises. On a device, a variant that fails or computes wrong results has no times, and its row says
why.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.bench.agreement import NOISE_FACTOR, check_rivals, check_variants
from widekernel.bench.depthwise_share import depthwise_share
from widekernel.bench.errors import BenchmarkError, DeviceLostError
from widekernel.bench.memory import return_freed_memory
from widekernel.bench.operators import shortest_of
from widekernel.bench.platforms import Platform
from widekernel.bench.precision import FLOAT32, Precision, in_force
from widekernel.bench.rivals import compiles
from widekernel.bench.rows import DeviceNetworkRow, NetworkRow
from widekernel.bench.time_budget import TimeBudget
from widekernel.bench.timing import NO_TIMES, SETTLING, Timing, first_calls, interleave
from widekernel.bench.variants import INFER, MODES, PYTORCH, Conditions, Variant, build_variants, with_visible_blocks
from widekernel.errors import in_short
from widekernel.ops.reference import relative_error
from widekernel.tasks.image_channels import input_channels

CHECKED = 2
"""Number of images on which variants are compared on a device; batch norm needs more than one."""
COMPILED_TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "float16": 5e-2, "bfloat16": 1e-1, "int8": 3e-1}
"""Largest difference of outputs that compiling may cause through different rounding, relative to the largest number."""
DEFAULT_NETWORKS = ("replknet_31b", "slak_tiny", "shiftwise_tiny", "convnext_tiny")
DEFAULT_BATCHES = (64, 128)
_ALL = "all"
_LEARNING_RATE = 1e-6  # so small that the parameters hardly change: only the time of a step matters


@dataclass(frozen=True)
class NetworkPlan:
    """The networks to measure, and how.

    Attributes:
        networks: by name, functions that build the network and return it with the side of its default images.
        batches: numbers of images per call.
        precisions: precisions in which the networks compute.
        modes: modes to time.
        compiled: whether to time variants compiled by `torch.compile` as well.
        size: height and width of the images; None for the network's own.
        seconds: time to spend on each variant.
        rounds: number of timed calls of each variant, instead of `seconds`.
        rivals: other programs to time as well, of `rivals.RIVALS`; inference on a CPU only.
    """

    networks: Mapping[str, Callable[[], tuple[nn.Module, int]]]
    batches: Sequence[int] = DEFAULT_BATCHES
    precisions: Sequence[Precision] = (FLOAT32,)
    modes: Sequence[str] = MODES
    compiled: bool = False
    size: int | None = None
    seconds: float = 1.0
    rounds: int | None = None
    rivals: Sequence[str] = ()


def measure_networks(
    plan: NetworkPlan,
    platform: Platform,
    budget: TimeBudget,
    advance: Callable[[str, int], None] = lambda what, steps: None,
) -> Iterator[NetworkRow]:
    """Time networks, with their variants in turn; yield the rows of each precision, batch and mode once they are measured.

    On a device, compiled variants come last, in a second round in turn with all the others: compiling takes minutes per
    network and must not use up the time of other rows.

    Args:
        plan: what to time.
        platform: where to time it.
        budget: tells when the time is over, and collects notes on variants without times.
        advance: called with a description of the next step, and the number of networks that were finished.

    Raises:
        BenchmarkError: on a CPU, if variants give different outputs or gradients, or the network cannot run.
    """
    failed: set[tuple[object, ...]] = set()
    in_two_rounds = plan.compiled and platform.is_device
    for compiled in (False, True) if in_two_rounds else (plan.compiled,):
        for name, build in plan.networks.items():
            # Built only once there is time for it.
            model = cache(partial(_build, build, platform.device))
            for precision, batch, mode in product(plan.precisions, plan.batches, plan.modes):
                what = f"{name}, {batch} images{', compiled' if compiled else ''}"
                if (name, precision, batch, mode) in failed:
                    continue
                if not budget.has_time():
                    budget.leave_out(precision.name, what, mode)
                    continue
                advance(f"{what}, {mode}, {precision.name}", 0)
                network, usual_size = model()
                trial = _Trial(name, mode, precision, replace(plan, compiled=compiled), platform, budget)
                yield from trial.rows(network, batch, plan.size or usual_size)
                return_freed_memory()
                if trial.failed:
                    failed.add((name, precision, batch, mode))
                if compiled or compiles(plan.rivals):
                    # Compiled programs are not used again; they occupy memory and the few entries of the cache.
                    torch.compiler.reset()
            advance("", 0 if in_two_rounds and compiled else 1)


def example_batch(name: str, model: nn.Module, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Return random images (N, C, size, size) and their classes (N), on the device of the model.

    Raises:
        BenchmarkError: if the network does not run on such images, or is not a classifier.
    """
    images = torch.randn(batch, input_channels(model), size, size, generator=torch.Generator().manual_seed(0))
    device = next((parameter.device for parameter in model.parameters()), images.device)
    images = images.to(device)
    return images, torch.arange(batch, device=device) % _number_of_classes(name, model, images)


def network_call(variant: Variant, mode: str, target: Tensor, conditions: Conditions = nullcontext) -> Callable[[], None]:
    """Return the call to time: inference, or a training step."""
    forward, x = variant.forward, variant.images
    if mode == INFER:

        def infer() -> None:
            with torch.inference_mode(), conditions():
                forward(x)

        return infer
    optimizer = torch.optim.SGD(variant.network.parameters(), lr=_LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        with conditions():
            loss = F.cross_entropy(forward(x), target)
        loss.backward()
        optimizer.step()

    return step


def _build(build: Callable[[], tuple[nn.Module, int]], device: torch.device) -> tuple[nn.Module, int]:
    model, usual_size = build()
    return with_visible_blocks(model).to(device), usual_size


def _number_of_classes(name: str, model: nn.Module, images: Tensor) -> int:
    """Return the number of classes, from a run on one image, which also shows whether the network accepts this size."""
    try:
        with torch.inference_mode():
            output = copy.deepcopy(model).eval()(images[:1])
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = tuple(images.shape[1:])
        raise BenchmarkError(f"{name} does not run on images of {shape}: {error}. Give another size.") from error
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise BenchmarkError(
            f"{name} does not return a tensor (N, classes) but {type(output).__name__}: only classifiers are timed."
        )
    return output.shape[1]


class _Trial:
    """The variants of one network in one mode, precision and batch."""

    def __init__(
        self, name: str, mode: str, precision: Precision, plan: NetworkPlan, platform: Platform, budget: TimeBudget
    ) -> None:
        self.name, self.mode, self.precision, self.plan = name, mode, precision, plan
        self.platform, self.budget = platform, budget
        self.failed = False
        self.failures: dict[str, str] = {}
        self.timings: dict[str, Timing] = {}
        self.shares: dict[str, float] = {}

    def rows(self, model: nn.Module, batch: int, size: int) -> list[NetworkRow]:
        """Check and time the variants; return a row for each, or a single row if none could be timed.

        Raises:
            Exception: on a CPU, any error.
        """
        failure, device_lost = "", False
        try:
            return self._measure(model, batch, size)
        except DeviceLostError as error:
            failure, device_lost = str(error), True
        except Exception as error:
            if not self.platform.is_device:
                raise
            failure = str(error) if isinstance(error, BenchmarkError) else in_short(error)
            if isinstance(error, BenchmarkError):
                self.budget.wrong.append(f"{self.name}, {self.mode}, {self.precision.name}, {batch} images: {error}")
        # Outside the handler: the error keeps the tensors of its traceback's frames alive.
        if device_lost:
            self.budget.lose_device(failure)
        else:
            self._recover()
        self.failed = True
        self.timings.clear()
        everything = Variant(_ALL, "", False, model, model, torch.empty(batch, 0, size, size, device="meta"))
        self.failures[everything.name] = failure
        return [self._row(everything)]

    def _measure(self, model: nn.Module, batch: int, size: int) -> list[NetworkRow]:
        # PyTorch's settings are restored before the consumer gets a row.
        with in_force(self.precision):
            images, target = example_batch(self.name, model, batch, size)
            plan = self.plan
            variants = build_variants(model, self.mode, images, plan.compiled, self._conditions, plan.rivals)
        right = self._checked(variants, target)
        with in_force(self.precision):
            self._time(right, target)
        # On a device, the uncompiled variants had their rows in the first round.
        shown = [v for v in right if not self.platform.is_device or v.compiled == self.plan.compiled]
        return [self._row(variant) for variant in shown]

    def _conditions(self) -> AbstractContextManager[object]:
        return self.precision.autocasting(self.platform.device)

    def _recover(self) -> None:
        try:
            self.platform.stopwatch.recover()
        except DeviceLostError as error:
            self.budget.lose_device(str(error))

    def _checked(self, variants: Sequence[Variant], target: Tensor) -> Sequence[Variant]:
        """Compare the variants in strict float32, where differences are meaningful; return those to time.

        On a device, a few images suffice, and compiled variants are checked when they are timed. Rivals that fail or give
        another output are left out.
        """
        checked = list(variants)
        if self.platform.is_device:
            checked = [replace(v, images=v.images[:CHECKED]) for v in variants if not v.compiled]
            target = target[:CHECKED]
        with in_force(FLOAT32, search=False):
            if self.plan.rivals and self.mode == INFER:
                variants, remarks = check_rivals(self.name, checked, target)
                self.budget.remarks += remarks
            else:
                check_variants(self.name, checked, self.mode, target)
        for variant in variants:
            variant.network.zero_grad()
        return variants

    def _time(self, variants: Sequence[Variant], target: Tensor) -> None:
        calls = {v.name: network_call(v, self.mode, target, self._conditions) for v in variants}
        stopwatch, failures = self.platform.stopwatch, self.failures if self.platform.is_device else None
        first: dict[str, float] = {}
        for variant in variants:
            if variant.compiled and not self.budget.has_time():
                self.failures[variant.name] = "no time was left to compile it"
            else:
                first |= first_calls({variant.name: calls[variant.name]}, stopwatch, failures)[1]
        if self.platform.is_device:
            self._check_compiled([variant for variant in variants if variant.name in first])
        right = {name: call for name, call in calls.items() if name in first and name not in self.failures}
        patience = self.platform.network_patience
        pause = SETTLING if self.plan.rivals and self.mode == INFER else 0.0
        self.timings = interleave(right, first, self.plan.seconds, self.plan.rounds, patience, stopwatch, pause)
        for variant in variants:
            if variant.name in right and variant.is_observed:
                self.shares[variant.name] = depthwise_share(calls[variant.name], self.platform.device)

    def _check_compiled(self, variants: Sequence[Variant]) -> None:
        """Compare the outputs of compiled variants with those of the uncompiled ones, in the precision that is timed.

        Compiled code rounds differently, and an untrained network may magnify the difference. The difference between
        PyTorch's two layouts shows by how much.
        """
        uncompiled = {variant.name: variant for variant in variants if not variant.compiled}
        pairs = [(v, uncompiled.get(replace(v, compiled=False).name)) for v in variants if v.compiled]
        if not pairs:
            return
        layouts = [self._output(variant) for variant in uncompiled.values() if variant.kind == PYTORCH]
        noise = relative_error(*layouts) if len(layouts) == 2 else 0.0
        allowed = max(COMPILED_TOLERANCE[self.precision.name], NOISE_FACTOR * noise)
        for variant, twin in pairs:
            error = math.nan if twin is None else relative_error(self._output(variant), self._output(twin))
            # Written so that NaN is an error as well.
            if not error <= allowed:
                why = f"compiling changes its output by {error:.2g} of the largest number, more than {allowed:.2g}"
                self.failures[variant.name] = why
                self.budget.wrong.append(f"{self.name}, {self.mode}, {variant.name}: {why}")

    def _output(self, variant: Variant) -> Tensor:
        torch.manual_seed(0)  # for networks with dropout or stochastic depth
        # The same mode as in the timed calls: another mode would compile the network once more.
        mode = torch.inference_mode() if self.mode == INFER else nullcontext()
        with mode, self._conditions():
            return variant.forward(variant.images).detach().float()

    def _row(self, variant: Variant) -> NetworkRow:
        fields = network_fields(self.name, self.mode, variant, self.timings)
        fields["depthwise_share"] = self.shares.get(variant.name)
        if not self.platform.is_device:
            return NetworkRow(**fields)
        pytorch = [timing.median for name, timing in self.timings.items() if name.startswith(PYTORCH)]
        return DeviceNetworkRow(
            **fields,
            dtype=self.precision.name,
            times_best=1e3 * shortest_of(*pytorch) / fields["ms"],
            remark=self.failures.get(variant.name, ""),
        )


def network_fields(name: str, mode: str, variant: Variant, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Return the fields of a `NetworkRow`, without a depthwise share; the times of a variant that has no timing are NaN."""
    timing = timings.get(variant.name, NO_TIMES)
    batch, size = variant.images.shape[0], variant.images.shape[2]
    return {
        "model": name,
        "mode": mode,
        "batch": batch,
        "size": size,
        "variant": variant.kind,
        "layout": variant.layout,
        "compiled": variant.compiled,
        "ms": 1e3 * timing.median,
        "spread": timing.spread,
        "calls": timing.calls,
        "times_nhwc": timings.get(f"{PYTORCH} NHWC", NO_TIMES).median / timing.median,
        "times_default": timings.get(f"{PYTORCH} NCHW", NO_TIMES).median / timing.median,
        "images_per_second": batch / timing.median,
        "depthwise_share": None,
    }
