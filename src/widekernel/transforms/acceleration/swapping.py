"""`accelerate`: decide on every layer first, and swap afterwards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from widekernel.errors import ArgumentError, nearest
from widekernel.layers import NativeBatchNorm2d, PointwiseConv2d
from widekernel.transforms.acceleration import timing
from widekernel.transforms.acceleration.blocks import BlockTrial, block_candidates, try_blocks
from widekernel.transforms.acceleration.candidates import (
    ACCELERATED,
    Candidate,
    candidates,
    describe,
    reason_against,
    trains,
)
from widekernel.transforms.acceleration.fusion import chain, fuse, unfuse
from widekernel.transforms.acceleration.fusion.deviation import TOLERANCES
from widekernel.transforms.acceleration.fusion.packing import missing
from widekernel.transforms.acceleration.input_capture import InputSpec, capture_inputs, outputs_of, unmeasurable
from widekernel.transforms.acceleration.outputs import OutputDeviation
from widekernel.transforms.acceleration.replanning import all_unfused, outdated_unfused, with_former_plans
from widekernel.transforms.acceleration.report import AccelerationReport, LayerAcceleration
from widekernel.transforms.acceleration.timing import Timing

ModelT = TypeVar("ModelT", bound=nn.Module)


def accelerate(
    model: ModelT, example_input: Any = None, pointwise: bool = True, blocks: bool = True, precision: str = "float32"
) -> tuple[ModelT, AccelerationReport]:
    """Swap layers and blocks of any network, in place, for the implementation that is fastest on this machine.

    * Depthwise `nn.Conv2d` become `DepthwiseConv2d`, which runs on `ops.depthwise_sum`.
    * On the CPU, `nn.Linear` become `PointwiseLinear` (computed as 1x1 convolutions) and 1x1 `nn.Conv2d` become
      `PointwiseConv2d` (computed as matrix products) or, in training, `PointwiseGradConv2d` (our kernels compute the weight
      gradient), and `nn.BatchNorm2d` in training become `NativeBatchNorm2d` (our kernels compute it), if measurements show
      that this is faster. The backward pass of `PointwiseLinear` has our kernels, too.
    * On the CPU, blocks become fused blocks if that is faster, or completes a chain and costs less than 5 %: in inference,
      one native call computes norm, pointwise layer, activation, second pointwise layer, layer scale and residual, or what
      there is of them. They are found in the block's graph, and compared with its code. If they do not apply, its code runs.

    A layer or block is swapped by changing its class, as PyTorch does with lazy and parametrized modules. It is the same
    object as before, with the same parameters, buffers, hooks and flags. So optimizers that hold its parameters, modules
    that share it and other references stay valid, and the keys of the state dict stay the same. Layers and blocks of which
    it is not certain what they compute are left alone; the report says why. Outdated plans of fused blocks are made anew.

    Everything is measured with the number of threads, the autocast state and the gradient mode of the caller. For layers in
    training mode with gradients enabled, this includes the backward pass. Measurements are cached, so that equal layers and
    later calls are not measured again. Times that differ by less than 5 % count as equal.

    With `precision="bfloat16"` or `"int8"`, the products of fused blocks have factors of that type, on processors with such
    products: nearly twice or up to three times as fast, with results that differ. All else remains float32. The report has
    the deviations of blocks and outputs. A block that deviates by more than 1.6 % (int8: 3.1 %) is left alone.

    Args:
        model: any network; changed, and returned. It must not be compiled yet.
        example_input: input of the network: a tensor, a tuple of arguments or a dict of keyword arguments. It runs on a copy
            (once, or three times in a lower precision, in evaluation mode, without gradients; its state is restored), and
            all is measured with the shapes and layouts of its inputs. Layers that are not called are left alone. Without an
            example, depthwise layers are swapped unmeasured, blocks and batch norms are not, and a pointwise layer is
            swapped if that is faster for each of a few inputs typical of its size: the feature maps of that width in a
            network for 224x224 pixels, for one image and for eight, and for 1x1 convolutions in both layouts.
        pointwise: whether to consider linear layers and 1x1 convolutions, too.
        blocks: whether to consider blocks, too.
        precision: type of the factors of products in fused blocks, `float32`, `bfloat16` or `int8`.

    Returns:
        the model, and a report on each of these layers and blocks.

    Raises:
        ArgumentError: if the model is not a module, is already compiled, or cannot run on the example; or if the precision
            is unknown, unavailable on this machine, or without effect. The model is then unchanged.
    """
    _check(model, example_input)
    _check_precision(precision, example_input is not None and blocks)
    found = candidates(model, pointwise)
    of_blocks: tuple[LayerAcceleration, ...] = ()
    outputs = None
    if example_input is None:
        rows = [_without_example(candidate) for candidate in found]
        _swap(found, rows)
    else:
        rows, of_blocks, outputs = _swap_by_example(model, example_input, found, blocks, precision)
    backward = any(trains(candidate.layer) for candidate in found)
    report = AccelerationReport(tuple(rows), backward, torch.get_num_threads(), of_blocks, precision, outputs)
    return model, replace(report, chains=chain(model))


def swap_layers(model: nn.Module, layers: Mapping[str, str]) -> tuple[str, ...]:
    """Swap layers, in place, as a call of `accelerate` did in an equal network, without measuring.

    Layers that cannot be swapped, such as parametrized ones, are left alone, and unknown names are passed over.

    Args:
        model: the network.
        layers: class of each layer that `accelerate` swapped, by name (`row.name` and `row.after` of `report.swapped`).

    Returns:
        the names of the layers that have these classes now, those that had them before included.
    """
    kinds = {kind.__name__: kind for kind in ACCELERATED}
    swapped = []
    for name, module in model.named_modules():
        kind = kinds.get(layers.get(name, ""))
        if kind is None:
            continue
        if not reason_against(module, kind):
            module.__class__ = kind
        if type(module) is kind:
            swapped.append(name)
    return tuple(swapped)


def _swap_by_example(
    model: nn.Module, example_input: Any, found: list[Candidate], blocks: bool, precision: str
) -> tuple[list[LayerAcceleration], tuple[LayerAcceleration, ...], OutputDeviation | None]:
    owners = block_candidates(model) if blocks else []
    layers = [candidate.layer for candidate in found if candidate.replacement]
    with outdated_unfused(owners, precision) as outdated:
        seen, samples = capture_inputs(model, example_input, layers, [block for _, block in owners])
        before = outputs = None
        if precision != "float32":
            with all_unfused(owners):
                before = outputs_of(model, example_input)
        found, rows = _best([(candidate, seen.get(candidate.layer, Counter())) for candidate in found])
        # Blocks are compared with what they are after their layers have been swapped.
        with _swapped(found, rows):
            trials = try_blocks(owners, seen, samples, precision)
            with _fused(trials):
                trials = with_former_plans(outdated, trials, precision)
                if precision != "float32":
                    outputs = OutputDeviation.of(before, outputs_of(model, example_input))
    return rows, tuple(trial.row for trial in trials), outputs


@contextmanager
def _fused(trials: list[BlockTrial]) -> Iterator[None]:
    """Fuse blocks as decided; undo it if an error is raised inside the `with` statement."""
    chosen = [(trial.block, trial.plan) for trial in trials if trial.plan is not None]
    for block, plan in chosen:
        fuse(block, plan)
    try:
        yield
    except BaseException:
        for block, _ in chosen:
            unfuse(block)
        raise


def _best(inputs: list[tuple[Candidate, Counter[InputSpec | str]]]) -> tuple[list[Candidate], list[LayerAcceleration]]:
    """Choose the fastest implementation of every layer; return the candidates chosen, and the rows of the report."""
    found, rows = [], []
    for candidate, seen in inputs:
        options = [candidate, *candidate.others(trains(candidate.layer))]
        tried = [_with_example(option, seen) for option in options]
        times = [math.inf if row.milliseconds_after is None else row.milliseconds_after for row in tried]
        best = times.index(min(times))
        found.append(options[best])
        rows.append(tried[best])
    return found, rows


@contextmanager
def _swapped(found: list[Candidate], rows: list[LayerAcceleration]) -> Iterator[None]:
    """Swap layers as decided; undo it if an error is raised inside the `with` statement."""
    classes = [type(candidate.layer) for candidate in found]
    _swap(found, rows)
    try:
        yield
    except BaseException:
        for candidate, kind in zip(found, classes):
            candidate.layer.__class__ = kind
        raise


def _swap(found: list[Candidate], rows: list[LayerAcceleration]) -> None:
    for candidate, row in zip(found, rows):
        if row.is_swapped:
            candidate.layer.__class__ = candidate.replacement


def _check(model: Any, example_input: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}: accelerate takes an nn.Module")
    for name, module in model.named_modules():
        # By name: importing the compiler takes seconds.
        if type(module).__name__ == "OptimizedModule":
            raise ArgumentError(f"{name or 'the model'} is compiled: accelerate the network first and then compile it")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy and example_input is not None:
        raise ArgumentError(f"the parameter {lazy[0]} does not exist yet: run the network once before accelerating")


def _check_precision(precision: str, has_blocks: bool) -> None:
    if precision not in TOLERANCES:
        known = ", ".join(TOLERANCES)
        raise ArgumentError(f"precision is {precision!r}.{nearest(precision, TOLERANCES)} It must be one of {known}.")
    if precision == "float32":
        return
    if not has_blocks:
        raise ArgumentError(
            f"precision is {precision!r}, which only fused blocks have, and without an example or with blocks=False none is "
            "fused: give example_input, and leave blocks at True"
        )
    lacking = missing(precision)
    if lacking is not None:
        raise ArgumentError(lacking)


def _without_example(candidate: Candidate) -> LayerAcceleration:
    before = describe(candidate.layer)
    if candidate.replacement is None:
        return LayerAcceleration(candidate.name, before, None, candidate.reason)
    if candidate.replacement is NativeBatchNorm2d:
        return LayerAcceleration(candidate.name, before, None, "no example to measure")
    if not candidate.is_pointwise:
        return LayerAcceleration(candidate.name, before, candidate.replacement.__name__, "by rule: no example to measure")
    total = Timing(0.0, 0.0)
    for spec in _usual_inputs(candidate):
        time = _time(candidate, spec)
        total = Timing(total.before + time.before, total.after + time.after)
        if not time.is_gain:
            return _row(candidate, before, False, f"not faster for {spec.shape}, {spec.layout}", 0, time)
    return _row(candidate, before, True, "faster for every usual input", 0, total)


def _with_example(candidate: Candidate, seen: Counter[InputSpec | str]) -> LayerAcceleration:
    before = describe(candidate.layer)
    if candidate.replacement is None:
        return LayerAcceleration(candidate.name, before, None, candidate.reason)
    calls = seen.total()
    reason = unmeasurable(seen) or _without_variance(candidate, seen)
    if reason:
        return LayerAcceleration(candidate.name, before, None, reason, calls)
    total = Timing(0.0, 0.0)
    for spec, count in seen.items():
        assert isinstance(spec, InputSpec)
        time = _time(candidate, spec)
        total = Timing(total.before + count * time.before, total.after + count * time.after)
    return _row(candidate, before, total.is_gain, "" if total.is_gain else "not faster", calls, total)


def _without_variance(candidate: Candidate, seen: Counter[InputSpec | str]) -> str:
    """Return why a batch norm cannot be trained on what it has seen, in evaluation mode; "" if it can, or is none."""
    if candidate.replacement is NativeBatchNorm2d:
        for spec in seen:
            if isinstance(spec, InputSpec) and math.prod(spec.shape) == spec.shape[1]:
                return "the example gives it one value for each channel, which has no variance"
    return ""


def _row(candidate: Candidate, before: str, swap: bool, reason: str, calls: int, time: Timing) -> LayerAcceleration:
    assert candidate.replacement is not None
    after = candidate.replacement.__name__ if swap else None
    return LayerAcceleration(candidate.name, before, after, reason, calls, time.before, time.after)


def _time(candidate: Candidate, spec: InputSpec) -> Timing:
    assert candidate.replacement is not None
    return timing.compare(candidate.layer, candidate.replacement, spec, trains(candidate.layer))


def _usual_inputs(candidate: Candidate) -> list[InputSpec]:
    """Return the inputs that a pointwise layer of this size is likely to get."""
    layer = candidate.layer
    convolves = candidate.replacement is PointwiseConv2d
    dim_in, dim_out = (layer.in_channels, layer.out_channels) if convolves else (layer.in_features, layer.out_features)
    # Networks halve the side of their feature maps as they double their width: 56x56 pixels at 96 channels, 7x7 at 768. The
    # larger number of channels also limits the map: few channels on one side may be a bottleneck rather than a large map.
    side = min(56, round(56 * 96 / min(dim_in, dim_out)), round(56 * math.sqrt(384 / max(dim_in, dim_out))))
    side = max(7, side)
    inputs = []
    for batch in (1, 8):
        image = torch.empty(batch, side, side, dim_in, dtype=layer.weight.dtype, device="meta")
        nhwc = image.permute(0, 3, 1, 2)
        inputs += [nhwc.contiguous(), nhwc] if convolves else [image]
    return [InputSpec(tuple(x.shape), x.stride(), x.dtype, layer.weight.device) for x in inputs]
