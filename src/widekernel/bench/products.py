"""Pointwise products and pairs of them on a CPU: packed blocks compared with PyTorch's operators and onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.bench.checking import check_agreement
from widekernel.bench.engines import missing, products_in_onnxruntime
from widekernel.bench.precision import BFLOAT16, FLOAT32, Precision
from widekernel.bench.tables import Column, factor, significant
from widekernel.bench.timing import SETTLING, first_calls, interleave
from widekernel.ops.cpu.pointwise import PackedBlock
from widekernel.ops.problem import LAYOUTS

TOLERANCES = {FLOAT32: 1e-4, BFLOAT16: 2e-2}
"""Largest allowed difference between implementations, relative to the largest number."""
NOTES: tuple[str, ...] = (
    "y = second · activation(first · x + bias) + bias for every pixel, or y = activation(first · x + bias). "
    "Times are medians of calls made in turn, on the same numbers; ± is half the interquartile range.",
    "linear: `F.linear` on rows of contiguous channels, and the activation. 1×1: convolutions on channels_last images, and "
    "the activation. onnxruntime: matrix products of rows, and the activation.",
    "× best: speed-up of ours on channels_last images over the fastest of the others.",
    "In bfloat16, all tensors of the others have that type. Ours are float32, and only the factors of products are rounded. "
    "onnxruntime has no such products on a CPU.",
    "GFLOP/s and the share of the peak, which is that of the precision, count the products only, not the activation.",
    "Before a case is timed, all implementations are compared with each other.",
)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
_LINEAR, _CONVOLUTION, _ENGINE = "linear", "1×1", "onnxruntime"


@dataclass(frozen=True)
class ProductCase:
    """A product over channels with an activation, and perhaps a second product.

    Attributes:
        family: whose networks contain it.
        batch: N.
        inputs: channels of the image.
        hidden: channels after the first product.
        outputs: channels after the second product; 0 without one.
        size: height and width.
        activation: `gelu` or `relu`.
    """

    family: str
    batch: int
    inputs: int
    hidden: int
    outputs: int
    size: int
    activation: str = "gelu"

    def __str__(self) -> str:
        """Return the channels and the shape, such as 96→384→96, 1×56²."""
        channels = "→".join(str(number) for number in (self.inputs, self.hidden, self.outputs) if number)
        return f"{channels}, {self.batch}x{self.size}²"

    @property
    def operations(self) -> int:
        """Floating-point operations of the products."""
        return 2 * self.batch * self.size**2 * self.hidden * (self.inputs + self.outputs)


def _pairs(family: str, widths: Sequence[int], batch: int) -> list[ProductCase]:
    """Return the pairs of four stages."""
    return [ProductCase(family, batch, width, 4 * width, width, 56 >> stage) for stage, width in enumerate(widths)]


PRODUCT_CASES: tuple[ProductCase, ...] = (
    *_pairs("ConvNeXt", (96, 192, 384, 768), 1),
    *_pairs("ConvNeXt", (96, 192, 384, 768), 8),
    *_pairs("SLaK", (124, 249, 499, 998), 1),
    *_pairs("RepLKNet", (128, 256, 512, 1024), 1),
    *(ProductCase("RepLKNet", 1, width, width, 0, 56 >> i, "relu") for i, width in enumerate((128, 256, 512, 1024))),
)
"""Products of the published networks: blocks of ConvNeXt-T, SLaK-T and RepLKNet-31B, and 1×1 convolutions of the latter."""


@dataclass(frozen=True)
class ProductRow:
    """One case. Times are medians in milliseconds, None if not run.

    Attributes:
        family: whose networks contain the case.
        case: channels and shape as text.
        activation: the activation.
        batch: N.
        inputs: channels of the image.
        hidden: channels after the first product.
        outputs: channels after the second product; 0 without one.
        size: height and width.
        nhwc_ms: packed block on a channels_last image.
        nhwc_spread: half the interquartile range, relative to the median.
        nchw_ms: packed block on a contiguous image.
        linear_ms: `F.linear`.
        convolution_ms: PyTorch's 1×1 convolution, channels_last.
        onnxruntime_ms: onnxruntime.
        times_best: speed-up of the packed block (channels_last) over the fastest of the others.
        gflops: speed of the packed block, channels_last.
        peak_share: `gflops` relative to the FMA peak of the machine.
        error: largest difference between implementations, relative to the largest number.
        precision: type of the factors of products.
    """

    family: str
    case: str
    activation: str
    batch: int
    inputs: int
    hidden: int
    outputs: int
    size: int
    nhwc_ms: float
    nhwc_spread: float
    nchw_ms: float
    linear_ms: float
    convolution_ms: float
    onnxruntime_ms: float | None
    times_best: float
    gflops: float
    peak_share: float
    error: float
    precision: str = "float32"


COLUMNS: Sequence[Column] = (
    ("case", lambda row: row.family),
    ("channels, N×H²", lambda row: row.case),
    ("activation", lambda row: row.activation),
    ("ours NHWC, ms", lambda row: significant(row.nhwc_ms)),
    ("±", lambda row: f"{100 * row.nhwc_spread:.0f} %"),
    ("ours NCHW, ms", lambda row: significant(row.nchw_ms)),
    ("linear, ms", lambda row: significant(row.linear_ms)),
    ("1×1, ms", lambda row: significant(row.convolution_ms)),
    ("onnxruntime, ms", lambda row: significant(row.onnxruntime_ms)),
    ("× best", lambda row: factor(row.times_best)),
    ("GFLOP/s", lambda row: f"{row.gflops:.0f}"),
    ("of peak", lambda row: f"{row.peak_share:.2f}"),
)


def measure_products(
    cases: Sequence[ProductCase],
    peak: float,
    seconds: float = 0.1,
    rounds: int | None = None,
    advance: Callable[[str, int], None] = lambda what, steps: None,
    precision: Precision = FLOAT32,
) -> Iterator[ProductRow]:
    """Time all cases; yield each row as soon as it is measured.

    Args:
        cases: what to time.
        peak: peak of the machine with the current number of threads, in GFLOP/s.
        seconds: time to spend on each implementation.
        rounds: number of timed calls of each implementation, instead of `seconds`.
        advance: called with a description of the next step, and the number of cases that were finished.
        precision: `FLOAT32` or `BFLOAT16`.

    Raises:
        BenchmarkError: if implementations disagree.
        ArgumentError: if the native library, or products of that precision, cannot run.
    """
    for case in cases:
        advance(str(case), 0)
        with torch.inference_mode():
            row = _measure(case, peak, seconds, rounds, precision)
        yield row
        advance("", 1)


def _measure(case: ProductCase, peak: float, seconds: float, rounds: int | None, precision: Precision) -> ProductRow:
    calls = _implementations(case, precision)
    outputs, first = first_calls(calls)
    error = check_agreement(outputs, _LINEAR, str(case), TOLERANCES[precision])
    outputs.clear()
    timings = interleave(calls, first, seconds, rounds, pause=SETTLING)
    times = {name: 1e3 * timing.median for name, timing in timings.items()}
    ours, gflops = times["NHWC"], case.operations / times["NHWC"] / 1e6
    return ProductRow(
        case.family,
        str(case),
        case.activation,
        case.batch,
        case.inputs,
        case.hidden,
        case.outputs,
        case.size,
        nhwc_ms=ours,
        nhwc_spread=timings["NHWC"].spread,
        nchw_ms=times["NCHW"],
        linear_ms=times[_LINEAR],
        convolution_ms=times[_CONVOLUTION],
        onnxruntime_ms=times.get(_ENGINE),
        times_best=min(time for name, time in times.items() if name not in LAYOUTS) / ours,
        gflops=gflops,
        peak_share=gflops / peak,
        error=error,
        precision=precision.name,
    )


def _implementations(case: ProductCase, precision: Precision) -> dict[str, Callable[[], Tensor]]:
    """Return all calls; the results have the shape (N, channels, H, W)."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    image = numbers(case.batch, case.inputs, case.size, case.size)
    layers = [(numbers(case.hidden, case.inputs) / case.inputs**0.5, numbers(case.hidden))]
    if case.outputs:
        layers.append((numbers(case.outputs, case.hidden) / case.hidden**0.5, numbers(case.outputs)))
    second, shift = layers[1] if case.outputs else (None, None)
    packed = PackedBlock(*layers[0], case.activation, second, shift, precision=precision.name)
    activation = _ACTIVATIONS[case.activation]

    def chained(
        layer: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, weights: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        y = activation(layer(x, *weights[0]))
        return layer(y, *weights[1]) if case.outputs else y

    images = {name: image.contiguous(memory_format=layout) for name, layout in LAYOUTS.items()}
    calls: dict[str, Callable[[], Tensor]] = {name: partial(packed, x) for name, x in images.items()}
    layers = [(matrix.to(precision.dtype), bias.to(precision.dtype)) for matrix, bias in layers]
    theirs = images["NHWC"].to(precision.dtype)
    rows = theirs.permute(0, 2, 3, 1)
    kernels = [(matrix[:, :, None, None].contiguous(memory_format=torch.channels_last), bias) for matrix, bias in layers]
    calls[_LINEAR] = lambda: chained(F.linear, rows, layers).permute(0, 3, 1, 2)
    calls[_CONVOLUTION] = lambda: chained(F.conv2d, theirs, kernels)
    if precision is FLOAT32 and not missing(_ENGINE):
        run = products_in_onnxruntime(rows, layers, case.activation)
        calls[_ENGINE] = lambda: run().permute(0, 3, 1, 2)
    return calls
