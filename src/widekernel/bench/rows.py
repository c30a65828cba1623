"""The rows of the tables: dataclasses for operators, branches and networks, with extensions for devices and sweeps.

The fields are the columns of the CSV files, so their names and their order must not change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

CSV_NAME = "csv"
"""Metadata key for the CSV column name of a field, if it differs from the field's name."""


@dataclass(frozen=True)
class OperatorRow:
    """One pass of one case in one layout. Times are in milliseconds: None if not run, NaN if failed.

    Attributes:
        case: name of the case.
        shape: N, C, H, W and the kernel as text.
        batch: N.
        channels: C.
        height: H.
        width: W.
        kernel_height: kh.
        kernel_width: kw.
        direction: the pass.
        layout: layout of our call; the times of the other implementations are the same in both rows of a pass.
        ours_ms: median time of our operator.
        ours_spread: half the interquartile range, relative to the median.
        ours_calls: number of timed calls.
        torch_nchw_ms: median time of PyTorch in its default layout.
        torch_nchw_calls: number of timed calls; 1 for slow calls.
        torch_nhwc_ms: median time of PyTorch with channels_last.
        torch_nhwc_calls: number of timed calls.
        onnxruntime_ms: median time of onnxruntime; forward only, NCHW.
        openvino_ms: median time of OpenVINO; forward only, NCHW.
        times_best: speed-up of our operator over PyTorch in its faster layout.
        times_default: speed-up of our operator over PyTorch in NCHW.
        gflops: speed of our operator, counting taps on pixels but not on padding.
        peak_share: `gflops` relative to the peak of the machine; above 1 for algorithms that need fewer operations.
        copy_gbs: GB/s read and written by copies of tensors.
        limit_ms: time of direct computation at the peak, or of moving the data at the speed of copies; the longer one.
        limit_share: `limit_ms` relative to the time of our operator.
        intensity: floating-point operations per byte that has to be moved.
        backend: the backend that ran.
        algorithm: the algorithm that it reports; '' if it reports none.
        error: largest difference between implementations, relative to the largest number; NaN if nothing was compared.
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


@dataclass(frozen=True)
class DeviceOperatorRow(OperatorRow):
    """One pass of one case in one precision and layout, on a CUDA device.

    `peak_share` and `limit_ms` refer to matrix products in that precision, `copy_gbs` to copies of large tensors.

    Attributes:
        dtype: name of the precision.
        limited_by: `copy` or `matmul`, whichever determines `limit_ms`.
        reference_error: largest error of our operator against float64, relative to the largest number.
        remark: what failed or computed wrong results, and therefore has no times.
    """

    dtype: str
    limited_by: str
    reference_error: float
    remark: str


@dataclass(frozen=True)
class BranchesRow:
    """One part of the training step of a layer with several branches, or the whole step, in one layout.

    Times are medians in milliseconds; those of a whole step are the sums of its parts.

    Attributes:
        case: name of the case.
        shape: N, C, H, W and the kernels as text.
        dtype: name of the precision.
        part: the pass, or `all three`.
        layout: layout of our calls; the times of PyTorch are the same in the rows of both layouts.
        ours_ms: time of our operators.
        ours_spread: half the interquartile range, relative to the median; NaN for a whole step.
        filled_ms: time of our operators on kernels with zeros in their gaps; NaN if no kernel is dilated.
        torch_nchw_ms: time of PyTorch in its default layout.
        torch_nhwc_ms: time of PyTorch with channels_last.
        times_filled: speed-up over kernels with zeros in their gaps.
        times_best: speed-up over PyTorch in its faster layout.
        backend: the backends that ran.
        error: largest difference between implementations, relative to the largest number.
    """

    case: str
    shape: str
    dtype: str
    part: str
    layout: str
    ours_ms: float
    ours_spread: float
    filled_ms: float
    torch_nchw_ms: float
    torch_nhwc_ms: float
    times_filled: float
    times_best: float
    backend: str
    error: float


@dataclass(frozen=True)
class SweepRow(OperatorRow):
    """One pass of one case of a sweep in one layout: a cell.

    If a call of PyTorch takes too long, its time is estimated: that on fewer images, times the ratio of their numbers.

    Attributes:
        times_same: speed-up of our operator over PyTorch in the same layout.
        torch_nchw_images: number of images on which PyTorch was timed in NCHW; 0 if a single one would have taken too long.
        torch_nhwc_images: the same with channels_last.
        twin_ratio: the fastest implementation of the unit is timed under two names; the ratio of the two medians, which is 1
            but for errors of measurement. The same in all rows of a unit; NaN if nothing was timed.
        remark: what failed or computed wrong results, and therefore has no times.
    """

    times_same: float
    torch_nchw_images: int
    torch_nhwc_images: int
    twin_ratio: float
    remark: str


@dataclass(frozen=True)
class NetworkRow:
    """One variant of a network in one mode and layout.

    Attributes:
        model: name of the network.
        mode: `train` (forward, loss, backward, step of SGD) or `infer`.
        batch: images per call.
        size: height and width of the images.
        variant: form of the network; the column `rival` of CSV files.
        layout: layout of images and weights.
        compiled: whether the network is compiled by `torch.compile`.
        ms: median time in milliseconds.
        spread: half the interquartile range, relative to the median.
        calls: number of timed calls.
        times_nhwc: speed-up over the network on PyTorch's convolutions with channels_last.
        times_default: speed-up over the network on PyTorch's convolutions in PyTorch's default layout.
        images_per_second: at the median.
        depthwise_share: share of the time in depthwise convolutions; None where it cannot be measured: in compiled and fused
            networks, and in other engines.
    """

    model: str
    mode: str
    batch: int
    size: int
    variant: str = field(metadata={CSV_NAME: "rival"})
    layout: str
    compiled: bool
    ms: float
    spread: float
    calls: int
    times_nhwc: float
    times_default: float
    images_per_second: float
    depthwise_share: float | None


@dataclass(frozen=True)
class PrecisionNetworkRow(NetworkRow):
    """One variant of a network in inference on a CPU, in a table that compares precisions.

    The outputs are compared with those of the network on PyTorch's convolutions in float32, with channels_last.

    Attributes:
        precision: type of the factors of products.
        error: norm of the difference of the outputs, relative to their norm.
        cosine: cosine similarity of the outputs.
        images: number of images that were compared.
        same_class: how many of them have the same top class.
    """

    precision: str
    error: float
    cosine: float
    images: int
    same_class: int


@dataclass(frozen=True)
class DeviceNetworkRow(NetworkRow):
    """One variant of a network in one mode, precision and layout, on a CUDA device.

    Attributes:
        dtype: name of the precision; float16 and bfloat16 by autocast.
        times_best: speed-up over the fastest network on PyTorch's convolutions, folded ones included; for compiled rows,
            compiled ones too.
        remark: what failed or computed wrong results, and therefore has no times.
    """

    dtype: str
    times_best: float
    remark: str
