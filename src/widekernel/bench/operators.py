"""The three passes of a depthwise convolution, ours against PyTorch's and those of inference engines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel import ops
from widekernel.bench import engines
from widekernel.bench.cases import FORWARD, INPUT_GRAD, PASSES, Case
from widekernel.bench.checking import Asked, check_agreement
from widekernel.bench.machine import Machine, copy_bandwidth
from widekernel.bench.timing import Timing, first_calls, interleave
from widekernel.ops.problem import LAYOUTS, mirror

Call = Callable[[], Tensor]
_SMALLEST_COPY, _COPY_SECONDS = 2**16, 0.03  # numbers; below, a copy is the call of an operator and little else


@dataclass(frozen=True)
class Row:
    """One pass of one case in one layout; times in milliseconds, None for what was not run and NaN for what failed.

    Attributes:
        case: its name.
        shape: N, C, H, W and the kernel, in words.
        batch: N.
        channels: C.
        height: H.
        width: W.
        kernel_height: kh.
        kernel_width: kw.
        direction: the pass.
        layout: of our call; the times of the rivals are in its two rows alike.
        ours_ms: median.
        ours_spread: half the distance between the quartiles, relative to the median.
        ours_calls: that count.
        torch_nchw_ms: PyTorch in its default layout.
        torch_nchw_calls: that count; 1 if a call takes more than a second.
        torch_nhwc_ms: PyTorch with channels_last.
        torch_nhwc_calls: that count.
        onnxruntime_ms: forward only, NCHW.
        openvino_ms: forward only, NCHW.
        times_best: how many times faster ours is than PyTorch in its better layout.
        times_default: how many times faster ours is than PyTorch in NCHW.
        gflops: of ours, in operations on pixels: taps on padding do not count.
        peak_share: `gflops` as a share of the machine's fused multiply-adds; above 1 for algorithms that need fewer.
        copy_gbs: GB/s read and written by copies of tensors as large as the input.
        limit_ms: the larger one of the times that direct computation at that peak, and moving the data at that speed, take.
        limit_share: `limit_ms` as a share of the time of ours.
        intensity: operations for each byte that has to be moved.
        backend: that ran.
        algorithm: that it says it uses; '' if it does not.
        error: largest difference of any rival from PyTorch in NHWC, relative to the largest number.
    """

    case: str
    shape: str
    batch: int
    channels: int
    height: int
    width: int
    kernel_height: int
    kernel_width: int
    direction: str
    layout: str
    ours_ms: float
    ours_spread: float
    ours_calls: int
    torch_nchw_ms: float
    torch_nchw_calls: int
    torch_nhwc_ms: float
    torch_nhwc_calls: int
    onnxruntime_ms: float | None
    openvino_ms: float | None
    times_best: float
    times_default: float
    gflops: float
    peak_share: float
    copy_gbs: float
    limit_ms: float
    limit_share: float
    intensity: float
    backend: str
    algorithm: str
    error: float


def measure_case(
    case: Case,
    machine: Machine,
    *,
    passes: Sequence[str] = PASSES,
    backend: str | None = None,
    algorithm: str | None = None,
    seconds: float = 0.5,
    rounds: int | None = None,
) -> Iterator[Row]:
    """Time the passes of a case, all rivals in turns, and give two rows a pass: ours in NCHW and in NHWC.

    Args:
        case: the convolution.
        machine: whose limits the times are compared with.
        passes: those to time.
        backend: that ours must run on; by default whichever is chosen.
        algorithm: that ours must use; by default the fastest.
        seconds: for each rival of each pass.
        rounds: calls of each rival, instead.

    Raises:
        BenchmarkError: if rivals differ in what they compute.
        NoBackendError: if the backend asked for does not compute the case.
    """
    # Of tensors of this size: small ones stay in caches.
    copying = copy_bandwidth(max(math.prod(case.shape), _SMALLEST_COPY), _COPY_SECONDS)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(case.shape, generator=generator) for _ in range(2))
    kernel = torch.randn(case.channels, 1, *case.kernel, generator=generator)
    asked: Asked = {"backend": backend, "algorithm": algorithm}
    for direction in passes:
        rivals = rivals_in_pytorch(direction, x, grad, kernel, asked) | _engines(direction, x, kernel)
        with torch.no_grad():
            with ops.trace() as ran:
                outputs, first = first_calls(rivals)
            error = check_agreement(outputs, "PyTorch NHWC", f"{direction} of {case}")
            # Large outputs would otherwise be held throughout.
            outputs.clear()
            timings = interleave(rivals, first, seconds, rounds)
        for layout, name in zip(LAYOUTS, ran.backends()):
            image = x.contiguous(memory_format=LAYOUTS[layout])
            details = ops.explain(image, [kernel], **asked)[PASSES.index(direction)].details
            # The first thing that a backend says of itself is how it computes, what follows are its means.
            ran_as = name, details.partition(";")[0], error
            limits = Limits(machine.peak, copying, case.bytes_moved)
            yield Row(**row_fields(case, direction, layout, timings, limits, ran_as))


def rivals_in_pytorch(direction: str, x: Tensor, grad: Tensor, kernel: Tensor, asked: Asked) -> dict[str, Call]:
    """Give the calls to compare, ours first, on the same numbers in both layouts."""
    rivals: dict[str, Call] = {}
    images = {name: [t.contiguous(memory_format=layout) for t in (x, grad)] for name, layout in LAYOUTS.items()}
    for name, (image, gradient) in images.items():
        rivals[f"ours {name}"] = ours(direction, image, gradient, kernel, asked)
    for name, (image, gradient) in images.items():
        rivals[f"PyTorch {name}"] = pytorchs(direction, image, gradient, kernel)
    return rivals


def _engines(direction: str, x: Tensor, kernel: Tensor) -> dict[str, Call]:
    if direction != FORWARD:
        return {}
    return {engine: engines.forward_in(engine, x, kernel) for engine in engines.ENGINES if not engines.missing(engine)}


def ours(direction: str, x: Tensor, grad: Tensor, kernel: Tensor, asked: Asked) -> Call:
    """Give the call of our operator that computes a pass."""
    size = (kernel.shape[2], kernel.shape[3])
    anchor = (size[0] // 2, size[1] // 2)
    if direction == FORWARD:
        return lambda: ops.depthwise_sum(x, [kernel], [anchor], **asked)
    if direction == INPUT_GRAD:
        # As the backward pass has it, flipping included.
        return lambda: ops.depthwise_sum(grad, [kernel.flip(-1, -2)], [mirror(size, anchor)], **asked)
    return lambda: ops.depthwise_weight_grad(x, grad, size, anchor, **asked)


def pytorchs(direction: str, x: Tensor, grad: Tensor, kernel: Tensor) -> Call:
    """Give the call of PyTorch's operator that computes a pass."""
    channels, padding = x.shape[1], [kernel.shape[2] // 2, kernel.shape[3] // 2]
    if direction == FORWARD:
        return lambda: F.conv2d(x, kernel, padding=padding, groups=channels)
    for_x = direction == INPUT_GRAD
    backward = torch.ops.aten.convolution_backward

    def call() -> Tensor:
        gradients = backward(
            grad, x, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], channels, [for_x, not for_x, False]
        )
        return gradients[0 if for_x else 1]

    return call


class Limits(NamedTuple):
    """What no call can be faster than: GFLOP/s, GB/s, and the bytes that it has to read and write."""

    peak: float
    copying: float
    bytes_moved: int

    def seconds(self, macs: int) -> tuple[float, float]:
        """Give the time of so many multiply-accumulates, and that of moving the data."""
        return 2 * macs / (self.peak * 1e9), self.bytes_moved / (self.copying * 1e9)


_FAILED = Timing(())


def row_fields(
    case: Case, direction: str, layout: str, timings: Mapping[str, Timing], limits: Limits, ran: tuple[str, str, float]
) -> dict[str, Any]:
    """Give the fields of a `Row`; of rivals without a timing the times are NaN.

    Args:
        case: what was timed.
        direction: which pass of it.
        layout: of our call.
        timings: by the names of the rivals.
        limits: of the machine, for this case.
        ran: the backend of our call, its algorithm, and the largest difference of the rivals.
    """
    ours, nchw, nhwc = (timings.get(name, _FAILED) for name in (f"ours {layout}", "PyTorch NCHW", "PyTorch NHWC"))
    seconds, limit = ours.median, max(limits.seconds(case.macs))
    gflops = 2 * case.macs / seconds / 1e9
    others = {engine: 1e3 * timings[engine].median if engine in timings else None for engine in engines.ENGINES}
    return {
        "case": case.name,
        "shape": str(case),
        "batch": case.batch,
        "channels": case.channels,
        "height": case.height,
        "width": case.width,
        "kernel_height": case.kernel[0],
        "kernel_width": case.kernel[1],
        "direction": direction,
        "layout": layout,
        "ours_ms": 1e3 * seconds,
        "ours_spread": ours.spread,
        "ours_calls": ours.calls,
        "torch_nchw_ms": 1e3 * nchw.median,
        "torch_nchw_calls": nchw.calls,
        "torch_nhwc_ms": 1e3 * nhwc.median,
        "torch_nhwc_calls": nhwc.calls,
        "onnxruntime_ms": others["onnxruntime"],
        "openvino_ms": others["openvino"],
        "times_best": best_of(nchw.median, nhwc.median) / seconds,
        "times_default": nchw.median / seconds,
        "gflops": gflops,
        "peak_share": gflops / limits.peak,
        "copy_gbs": limits.copying,
        "limit_ms": 1e3 * limit,
        "limit_share": limit / seconds,
        "intensity": 2 * case.macs / limits.bytes_moved,
        "backend": ran[0],
        "algorithm": ran[1],
        "error": ran[2],
    }


def best_of(*medians: float) -> float:
    """Give the shortest of some times, whichever of them are there; NaN if none is."""
    return min((median for median in medians if not math.isnan(median)), default=math.nan)
