"""Inference of networks on a CPU in bfloat16 or int8 beside float32: times, and what the precision does to the outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from widekernel.bench.agreement import REFERENCE, check_rivals
from widekernel.bench.errors import BenchmarkError
from widekernel.bench.memory import return_freed_memory
from widekernel.bench.networks import COMPILED_TOLERANCE, NetworkPlan, example_batch, network_call, network_fields
from widekernel.bench.platforms import Platform
from widekernel.bench.precision import BFLOAT16, INT8, Precision
from widekernel.bench.rivals import WITH, compiles
from widekernel.bench.rows import PrecisionNetworkRow
from widekernel.bench.tables import Column, network_columns
from widekernel.bench.time_budget import TimeBudget
from widekernel.bench.timing import SETTLING, first_calls, interleave
from widekernel.bench.variants import (
    ACCELERATED,
    FUSED,
    INFER,
    PYTORCH,
    Variant,
    build_variants,
    forward_in,
    with_visible_blocks,
)
from widekernel.errors import in_short
from widekernel.settings import require
from widekernel.transforms.acceleration import AccelerationReport, accelerate
from widekernel.transforms.acceleration.outputs import OutputDeviation
from widekernel.transforms.to_torch import to_torch

CAST, AUTOCAST = "PyTorch, bfloat16", "PyTorch, bfloat16 by autocast"
COMPARED = 8
"""Number of random images on which outputs are compared, rounded up to whole batches."""
NOTES: tuple[str, ...] = (
    "Times are medians of calls made in turn, on the same images, in inference; ± is half the interquartile range. A "
    "number in parentheses is the number of calls, if there were fewer than five.",
    "PyTorch: the network on PyTorch's convolutions in float32, not folded. PyTorch, bfloat16: folded, with all tensors in "
    "bfloat16; by autocast: folded, with parameters in float32. ours, fused: folded, then `widekernel.accelerate`, in "
    'float32, or with `precision="bfloat16"`, where the factors of the products in fused blocks are bfloat16 and all else '
    "is float32. OpenVINO: the folded network, with INFERENCE_PRECISION_HINT f32 and bf16. torch.compile, zentorch: the "
    "folded network, with all tensors in that type.",
    "In int8, the products of fused blocks have weights and pixels in 8 bits, with the scales of pixels from their range at "
    "each call. Blocks that deviate too much are fused in float32. OpenVINO, int8: the folded network, quantized by NNCF "
    "from random images, with INFERENCE_PRECISION_HINT f32 for what is not quantized. PyTorch is not timed in int8.",
    "× best rival: speed-up of ours over the fastest of all rows in that precision that are not ours, in either layout.",
    "onnxruntime is timed in float32 only. What fails in the lower precision, or differs from PyTorch NHWC in float32 by "
    "more than a tenth (int8: three tenths) of the largest output, is left out and named below the table; if it is ours, "
    "nothing is timed.",
    "× PyTorch NHWC, NCHW: speed-up over PyTorch in float32, in either layout.",
    "error, cosine, same class: outputs on random images compared with those of PyTorch NHWC in float32: norm of the "
    "difference relative to the norm, cosine similarity, and images that keep their top class. The weights are random, so "
    "these are no accuracies: evaluate a trained network on its data.",
)


def check_settings(modes: str, compiled: bool, precision: Precision = BFLOAT16) -> None:
    """Check the settings of a run.

    Raises:
        ConfigError: if anything but inference without a compiler is to be timed.
    """
    what = f"with --dtypes {precision.name} on the CPU"
    require(modes == INFER, "modes", modes, f"infer {what}, where only inference has it")
    require(not compiled, "compile", True, f"left out {what}")


def ours_in(precision: Precision) -> str:
    """Return the kind of variant with blocks fused in a precision."""
    return f"{FUSED}, {precision.name}"


def measure_lower_networks(
    plan: NetworkPlan,
    platform: Platform,
    budget: TimeBudget,
    advance: Callable[[str, int], None] = lambda what, steps: None,
    precision: Precision = BFLOAT16,
) -> Iterator[PrecisionNetworkRow]:
    """Time networks in inference on a CPU in float32 and a lower precision; yield the rows of each network once measured.

    Args:
        plan: what to time; its modes and precisions are not used.
        platform: the CPU.
        budget: collects notes on rivals that are left out.
        advance: called with a description of the next step, and the number of networks that were finished.
        precision: `BFLOAT16` or `INT8`.

    Raises:
        BenchmarkError: if variants in float32 give different outputs, ours in the lower precision gives far different ones,
            or the network cannot run.
        ArgumentError: if this machine has no products in that precision.
    """
    for name, build in plan.networks.items():
        model, usual_size = build()
        model = with_visible_blocks(model).eval()
        for batch in plan.batches:
            advance(f"{name}, {batch} images, infer, {precision.name}", 0)
            images, target = example_batch(name, model, batch, plan.size or usual_size)
            exact = _exact_variants(model, images, plan.rivals)
            exact, remarks = check_rivals(name, exact, target)
            budget.remarks += remarks
            lower, deviations, remarks = _compared(name, exact, _lower_variants(exact, plan.rivals, precision), precision)
            budget.remarks += remarks
            variants = [*exact, *lower]
            calls = {variant.name: network_call(variant, INFER, target) for variant in variants}
            first = first_calls(calls)[1]
            pause = SETTLING if plan.rivals else 0.0
            timings = interleave(calls, first, plan.seconds, plan.rounds, platform.network_patience, pause=pause)
            for variant in variants:
                found = deviations[variant.name]
                yield PrecisionNetworkRow(
                    **network_fields(name, INFER, variant, timings),
                    precision=precision.name if variant in lower else "float32",
                    error=found.relative,
                    cosine=found.cosine,
                    images=found.images or 0,
                    same_class=found.same_class or 0,
                )
            return_freed_memory()
            if compiles(plan.rivals):
                torch.compiler.reset()
        advance("", 1)


def precision_columns(rows: Sequence[PrecisionNetworkRow]) -> list[Column]:
    """Return the columns of a table of networks in several precisions."""
    return [
        *network_columns(rows),
        ("error", lambda row: f"{row.error:.1e}"),
        ("cosine", lambda row: f"{row.cosine:.6f}"),
        ("same class", lambda row: f"{row.same_class} of {row.images}"),
    ]


def _exact_variants(model: nn.Module, images: Tensor, rivals: Sequence[str]) -> list[Variant]:
    """Return variants in float32, which those in a lower precision are made of."""
    kinds = (PYTORCH, ACCELERATED, FUSED, *rivals)
    return [variant for variant in build_variants(model, INFER, images, False, rivals=rivals) if variant.kind in kinds]


def _lower_variants(exact: Sequence[Variant], rivals: Sequence[str], precision: Precision) -> list[Variant]:
    """Return variants in a lower precision; of the rivals, those that are among the variants in float32."""
    lower, right = [], {variant.name for variant in exact}
    # Blocks that are not suitable for int8 remain fused in float32.
    base = FUSED if precision is INT8 and any(variant.kind == FUSED for variant in exact) else ACCELERATED
    for variant in exact:
        if variant.kind != base:
            continue
        x = variant.images
        with torch.no_grad():
            ours, report = accelerate(copy.deepcopy(variant.network), x, precision=precision.name)
        _require_blocks(report)
        lower.append(replace(variant, kind=ours_in(precision), network=ours, forward=ours))
        if precision is INT8:
            continue
        plain = to_torch(variant.network)
        lower.append(replace(variant, kind=AUTOCAST, network=plain, forward=partial(_autocast, plain)))
        cast = copy.deepcopy(plain).to(torch.bfloat16)
        lower.append(replace(variant, kind=CAST, network=cast, forward=cast, images=x.to(torch.bfloat16)))
        for rival in rivals:
            if compiles([rival]) and f"{rival} {variant.layout}" in right:
                forward = forward_in(rival, cast, lower[-1].images, BFLOAT16.name)
                lower.append(replace(lower[-1], kind=f"{rival}, bfloat16", forward=forward))
    like = next(variant for variant in exact if variant.kind == ACCELERATED and variant.layout == "NCHW")
    like = replace(like, network=to_torch(like.network))
    for rival in rivals:
        if rival in WITH[precision.name] and not compiles([rival]) and f"{rival} NCHW" in right:
            forward = forward_in(rival, like.network, like.images, precision.name)
            lower.append(replace(like, kind=f"{rival}, {precision.name}", forward=forward))
    return lower


def _require_blocks(report: AccelerationReport) -> None:
    if not report.fused:
        reasons = "; ".join(dict.fromkeys(row.reason for row in report.blocks)) or "it has none"
        raise BenchmarkError(f"no block of the network is fused in {report.precision}: {reasons}. Time it in float32.")


def _autocast(network: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return network(x)  # type: ignore[no-any-return]


@torch.inference_mode()
def _compared(
    name: str, exact: Sequence[Variant], lower: Sequence[Variant], precision: Precision
) -> tuple[list[Variant], dict[str, OutputDeviation], list[str]]:
    """Compare the outputs of all variants with those of `REFERENCE`, on the same random images.

    Returns:
        those in the lower precision whose outputs are similar, the deviations of all variants by name, and a line about each
        one that fails or gives far different outputs and is not ours.

    Raises:
        BenchmarkError: if ours gives far different outputs.
    """
    reference = next(variant for variant in exact if variant.name == REFERENCE)
    shape = reference.images.shape
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(shape, generator=generator) for _ in range(-(-COMPARED // shape[0]))]
    want = _outputs(reference, batches)
    found = {variant.name: OutputDeviation.of(want, _outputs(variant, batches)) for variant in exact}
    right, remarks = [], []
    for variant in lower:
        try:
            deviation = OutputDeviation.of(want, _outputs(variant, batches))
            _require_similar(name, variant, deviation, precision)
        except Exception as error:
            if variant.kind == ours_in(precision):
                raise
            remarks.append(f"{variant.name} is left out for {name}, {shape[0]} images: {in_short(error)}")
            continue
        found[variant.name] = deviation
        right.append(variant)
    return right, found, remarks


def _require_similar(name: str, variant: Variant, deviation: OutputDeviation, precision: Precision) -> None:
    allowed = COMPILED_TOLERANCE[precision.name]
    # Written so that NaN is an error as well.
    if not deviation.largest <= allowed:
        advice = f" Nothing is timed: the network is not suitable for {precision.name}, or a block is wrong."
        raise BenchmarkError(
            f"the output of {name}: {variant.name} differs from {REFERENCE} in float32 by {deviation.largest:.2g} of the "
            f"largest number, more than {allowed:g}.{advice if variant.kind == ours_in(precision) else ''}"
        )


def _outputs(variant: Variant, batches: Sequence[Tensor]) -> Tensor:
    layout = torch.channels_last if variant.layout == "NHWC" else torch.contiguous_format
    inputs = (batch.to(variant.images.dtype).contiguous(memory_format=layout) for batch in batches)
    return torch.cat([variant.forward(x).float() for x in inputs])
