"""Where the time of a folded and accelerated network goes, piece by piece: stem, depthwise layers, products and others."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widekernel.bench.networks import example_batch
from widekernel.bench.precision import FLOAT32, Precision
from widekernel.bench.spans import Span, Spans
from widekernel.bench.tables import Column, significant
from widekernel.bench.timing import SHORT, Stopwatch, WallClock
from widekernel.bench.variants import with_visible_blocks
from widekernel.layers import FoldedLargeKernel
from widekernel.layers.sides import sides
from widekernel.ops.cpu.depthwise_conv import PackedDepthwiseConv
from widekernel.ops.cpu.pointwise import PackedBlock
from widekernel.ops.cpu.prepared import PreparedSum
from widekernel.ops.problem import LAYOUTS, Problem
from widekernel.transforms.acceleration import accelerate
from widekernel.transforms.fold import fold

STEM, DOWN, DEPTHWISE, FUSED, PRODUCTS, NORMS, ACTIVATIONS, HEAD, NATIVE, OTHER = PIECES = (
    "stem",
    "downsampling",
    "depthwise",
    "fused products",
    "other products",
    "norms",
    "activations",
    "head",
    "other native calls",
    "copies, additions, calls",
)
WHOLE = "all pieces"
NOTES: tuple[str, ...] = (
    "The network is folded and accelerated. A clock observes every module and every native call; the time of a piece is "
    "that of its modules and native calls, without what is inside others: the mean over the middle half of the calls, "
    "ordered by their time.",
    "stem, downsampling, head: everything in modules of these names, whatever it is. fused products: native calls of fused "
    "blocks, which include norm, activation and residual. other products: linear layers and 1×1 convolutions that are not "
    "fused. copies, additions, calls: what modules do outside of the modules inside them, and the Python code around all.",
    "GFLOP: two operations for each multiply-accumulate of products, convolutions and depthwise layers, without taps "
    "outside of the image. of peak: their speed relative to the FMA peak of the machine. In a lower precision, fused "
    "layers, with or without patches, are compared with the peak of that precision, and the rest, which is float32, with "
    "that of float32.",
    "all pieces: their sum; of peak: the time that all operations would take at these peaks, relative to it. unobserved: "
    "the whole call without observation; the difference is what observing costs.",
)
_NORMS = ("Norm", "Affine")
_FEWEST, _LARGEST = 5, 3  # observed calls, at least; parts that are named


@dataclass(frozen=True)
class PieceRow:
    """One piece of a network in one layout; the piece `all pieces` is the sum of the others.

    Attributes:
        model: name of the network.
        batch: images per call.
        size: height and width of the images.
        layout: layout of the images.
        precision: that of the products in fused layers.
        piece: one of `PIECES`, or `WHOLE`.
        calls: number of modules and native calls.
        ms: time in milliseconds.
        share: share of the time of all pieces.
        gflop: floating-point operations, in units of 10⁹; those of convolutions as far as taps lie on pixels.
        gflops: `gflop` by time, in GFLOP/s.
        peak_share: the time that the operations would take at the peak, relative to the time of the piece.
        unobserved_ms: median time of the whole network without observation.
        largest: the three parts that take most of the time, with their milliseconds.
    """

    model: str
    batch: int
    size: int
    layout: str
    precision: str
    piece: str
    calls: int
    ms: float
    share: float
    gflop: float
    gflops: float
    peak_share: float
    unobserved_ms: float
    largest: str


_COLUMNS: Sequence[Column] = (
    ("model", lambda row: row.model),
    ("images", lambda row: str(row.batch)),
    ("layout", lambda row: row.layout),
    ("products in", lambda row: row.precision),
    ("piece", lambda row: row.piece),
    ("calls", lambda row: str(row.calls)),
    ("ms", lambda row: significant(row.ms)),
    ("share", lambda row: f"{100 * row.share:.0f} %"),
    ("GFLOP", lambda row: f"{row.gflop:.2f}" if row.gflop else ""),
    ("GFLOP/s", lambda row: f"{row.gflops:.0f}" if row.gflop else ""),
    ("of peak", lambda row: f"{row.peak_share:.2f}" if row.gflop else ""),
    ("unobserved, ms", lambda row: significant(row.unobserved_ms) if row.piece == WHOLE else ""),
    ("largest parts, ms", lambda row: row.largest),
)


class _Part(NamedTuple):
    """What a span contributes to the table."""

    piece: str
    label: str
    seconds: float
    flop: float
    packed: bool = False  # whether it is computed in the precision of products

    @classmethod
    def of(cls, span: Span) -> _Part:
        packed = span.is_native and isinstance(span.owner, PackedBlock)
        return cls(piece_of(span), _label(span), span.seconds, flop_of(span), packed)


class Calls(NamedTuple):
    """The parts of each observed call that counts, and the median time of the whole without observation, in seconds."""

    observed: list[list[_Part]]
    unobserved: float


def columns(rows: Sequence[PieceRow]) -> list[Column]:
    """Return the columns of the table: the number of images if it varies, and the precision unless it is float32."""
    alike = {
        "images": len({row.batch for row in rows}) <= 1,
        "products in": {row.precision for row in rows} <= {FLOAT32.name},
    }
    return [column for column in _COLUMNS if not alike.get(column[0], False)]


def measure_pieces(
    networks: Mapping[str, Callable[[], tuple[nn.Module, int]]],
    batches: Sequence[int],
    size: int | None,
    precisions: Sequence[Precision],
    peaks: Mapping[Precision, float],
    seconds: float,
    advance: Callable[[str, int], None] = lambda what, steps: None,
    stopwatch: Stopwatch = WallClock(),  # noqa: B008 - it has no state
) -> Iterator[PieceRow]:
    """Observe networks piece by piece; yield the rows of each network, batch and layout as soon as it is measured.

    Args:
        networks: by name, functions that build the network and return it with the side of its default images.
        batches: numbers of images per call.
        size: height and width of the images; None for the network's own.
        precisions: those of the products in fused layers.
        peaks: FMA peak of the machine with the current number of threads, in each precision and in float32, in GFLOP/s.
        seconds: time to spend on each network, layout and precision.
        advance: called with a description of the next step, and the number of networks that were finished.
        stopwatch: times the unobserved calls.
    """
    for name, build in networks.items():
        network, usual = build()
        network = with_visible_blocks(network)
        for batch in batches:
            images, _ = example_batch(name, network, batch, size or usual)
            for precision, layout in itertools.product(precisions, LAYOUTS):
                advance(f"{name}, {batch} images, {layout}, {precision.name}", 0)
                x = images.contiguous(memory_format=LAYOUTS[layout])
                calls = observe(accelerated(network, x, layout, precision), x, seconds, stopwatch)
                fields = {"model": name, "batch": batch, "size": x.shape[2], "layout": layout, "precision": precision.name}
                yield from rows_of(calls, peaks[precision], peaks[FLOAT32], **fields)
        advance("", 1)


def accelerated(network: nn.Module, images: Tensor, layout: str, precision: Precision = FLOAT32) -> nn.Module:
    """Return a folded and accelerated copy of a network, for images in a layout and products in a precision."""
    with warnings.catch_warnings():
        # The warnings are about layers that cannot be folded.
        warnings.simplefilter("ignore")
        folded = fold(copy.deepcopy(network).eval())
    folded = folded.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    result, _ = accelerate(folded, images, precision=precision.name)
    return result  # type: ignore[no-any-return]


def piece_of(span: Span) -> str:
    """Return the piece that a span belongs to."""
    names, owner = span.path.split("."), span.owner
    if names[0] in ("stem", "patch_embed"):
        return STEM
    if any(name.startswith(("downsample", "transition")) for name in names):
        return DOWN
    if names[0] in ("head", "norm_pre", "fc", "classifier"):
        return HEAD
    if span.is_native:
        return _native_piece(owner)
    kind = type(owner).__name__
    if isinstance(owner, FoldedLargeKernel) or (isinstance(owner, nn.Conv2d) and owner.groups > 1):
        return DEPTHWISE
    if isinstance(owner, (nn.Linear, nn.Conv2d)):
        return PRODUCTS
    if any(part in kind for part in _NORMS):
        return NORMS
    return ACTIVATIONS if type(owner).__module__ == "torch.nn.modules.activation" else OTHER


def _native_piece(owner: Any) -> str:
    if isinstance(owner, PackedBlock):
        patch = getattr(owner, "patch", None)
        return FUSED if patch is None else STEM if owner.inputs <= 4 else DOWN
    return DEPTHWISE if isinstance(owner, (PreparedSum, PackedDepthwiseConv)) else NATIVE


def flop_of(span: Span) -> float:
    """Return the floating-point operations of a span, without those of the spans inside."""
    owner, output = span.owner, span.output
    if span.is_native:
        if isinstance(owner, PackedBlock):
            return 2.0 * owner.macs * output.numel() / owner.outputs
        if isinstance(owner, PackedDepthwiseConv):  # with the taps beside the image, because a sequence hides its inputs
            return 2.0 * math.prod(owner.patch.kernel) * output.numel()
        return _flop_of_problem(owner.problem) if isinstance(owner, PreparedSum) else 0.0
    if span.has_native:  # which counts by itself
        return 0.0
    if isinstance(owner, nn.Linear):
        return 2.0 * output.numel() * owner.in_features
    if isinstance(owner, nn.Conv2d):
        return _flop_of_conv(owner, span.inputs[0].shape[-2:], output)
    if isinstance(owner, FoldedLargeKernel):  # on PyTorch's convolutions
        kernels = tuple((kernel.shape[2], kernel.shape[3]) for kernel in owner.kernels)
        return _flop_of_problem(Problem("depthwise_sum", "cpu", output.dtype, tuple(output.shape), kernels, owner.anchors))
    return 0.0


def _flop_of_conv(conv: nn.Conv2d, image: Sequence[int], output: Tensor) -> float:
    """Return the operations of a convolution of an image of this height and width."""
    left, _, up, _ = conv._reversed_padding_repeated_twice
    taps, places = conv.weight.shape[1], output.shape[-2:]
    strides, dilations = sides(conv.stride), sides(conv.dilation)
    for axis, (pad, extent, outputs) in enumerate(zip((up, left), image, places)):
        taps *= _on_pixels(extent, outputs, conv.kernel_size[axis], strides[axis], pad, dilations[axis])
    return 2.0 * output.numel() / math.prod(places) * taps


def _on_pixels(extent: int, outputs: int, taps: int, stride: int, pad: int, dilation: int) -> int:
    """Count the pairs of an output and a tap whose tap lies on a pixel, along an axis of a convolution."""
    count = 0
    for tap in range(taps):
        # The tap lies on pixel `output * stride - shift`.
        shift = pad - tap * dilation
        first, last = max(0, -(-shift // stride)), min(outputs - 1, (extent - 1 + shift) // stride)
        count += max(0, last - first + 1)
    return count


def _flop_of_problem(problem: Problem) -> float:
    batch, channels, height, width = problem.shape
    taps = 0
    for (kh, kw), (row, column), dilation in zip(problem.kernels, problem.anchors, problem.dilations):
        taps += _inside(height, kh, row, dilation) * _inside(width, kw, column, dilation)
    return 2.0 * batch * channels * taps


def _inside(extent: int, taps: int, anchor: int, dilation: int) -> int:
    """Count the pairs of an output and a tap whose tap lies on a pixel, along an axis."""
    return sum(max(0, extent - abs(tap - anchor) * dilation) for tap in range(taps))


@torch.inference_mode()
def observe(network: nn.Module, x: Tensor, seconds: float, stopwatch: Stopwatch) -> Calls:
    """Call a network for `seconds` seconds, with and without observation in turn."""
    network(x)
    estimate = stopwatch.time(lambda: network(x))[1]
    spans, unobserved, observed = Spans(network), [], []
    for _ in range(max(_FEWEST, int(seconds / max(2 * estimate, 1e-9)))):
        if estimate < SHORT and not stopwatch.resets:
            network(x)
        unobserved.append(stopwatch.time(lambda: network(x))[1])
        with spans.observing():
            network(x)
        observed.append(spans.take())
    return middle_of(observed, unobserved)


def middle_of(observed: Sequence[Sequence[Span]], unobserved: Sequence[float]) -> Calls:
    """Return the middle half of the observed calls, ordered by their time, and the median of the unobserved ones."""
    calls = [[_Part.of(span) for span in spans] for spans in observed]
    calls.sort(key=lambda parts: sum(part.seconds for part in parts))
    quarter = len(calls) // 4
    return Calls(calls[quarter : len(calls) - quarter], statistics.median(unobserved))


def rows_of(calls: Calls, peak: float, float32_peak: float, **fields: Any) -> Iterator[PieceRow]:
    """Yield the row of each piece that occurs, and that of all pieces.

    Args:
        calls: the observed calls.
        peak: FMA peak of the machine in the precision of products, in GFLOP/s.
        float32_peak: the same in float32.
        fields: the fields of `PieceRow` that describe the network.
    """
    count = len(calls.observed)
    everything = [part for parts in calls.observed for part in parts]
    whole = sum(part.seconds for part in everything) / count
    for piece in (*PIECES, WHOLE):
        chosen = [part for part in everything if piece in (part.piece, WHOLE)]
        if not chosen:
            continue
        seconds, gflop = sum(part.seconds for part in chosen) / count, sum(part.flop for part in chosen) / count / 1e9
        at_peak = sum(part.flop / (peak if part.packed else float32_peak) for part in chosen) / count / 1e9
        labels: dict[str, float] = defaultdict(float)
        for part in chosen:
            labels[part.label] += part.seconds / count
        largest = sorted(labels.items(), key=lambda pair: -pair[1])[:_LARGEST]
        yield PieceRow(
            **fields,
            piece=piece,
            calls=round(len(chosen) / count),
            ms=1e3 * seconds,
            share=seconds / whole,
            gflop=gflop,
            gflops=gflop / seconds,
            peak_share=at_peak / seconds,
            unobserved_ms=1e3 * calls.unobserved,
            largest="" if piece == WHOLE else "; ".join(f"{label} {significant(1e3 * time)}" for label, time in largest),
        )


def _label(span: Span) -> str:
    """Return what computes a span, and in which stage."""
    stage = ".".join(span.path.split(".")[:2])
    kind = type(span.owner).__name__
    if span.is_native and isinstance(span.owner, PackedBlock):
        kind = f"{span.owner.inputs}→{span.owner.hidden}→{span.owner.outputs}"
    return f"{stage} {kind}".strip()
