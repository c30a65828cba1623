"""The structures of the native library's C interface (native/include/widekernel.h) in ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

# Pointers to numbers are plain addresses, as `Tensor.data_ptr` returns them.
Address = ctypes.c_void_p


def _each(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class Tensor(ctypes.Structure):
    """An image tensor: address, and strides in elements."""

    _fields_ = [("data", Address), *_each(ctypes.c_int64, "image", "channel", "row", "column")]


class Pass(ctypes.Structure):
    """A kernel as executed."""

    _fields_ = _each(ctypes.c_int32, "rows", "columns", "row", "column", "method", "dilation", "input", "output")


class Rect(ctypes.Structure):
    """A kernel of the caller, and the pass that it is merged into."""

    _fields_ = [("taps", Address), *_each(ctypes.c_int32, "rows", "columns", "row", "column", "dilation", "pass")]


class Partial(ctypes.Structure):
    """The channels of the image that a sum is computed of, and the others."""

    _fields_ = [*_each(ctypes.c_int32, "inputs", "others"), *_each(Address, "selected", "other", "scale", "shift")]


_COMMON = _each(ctypes.c_int32, "dtype", "threads", "images", "channels", "height", "width")


class Sum(ctypes.Structure):
    """A call of `wk_depthwise_sum`."""

    _fields_ = [
        *_COMMON,
        *_each(Tensor, "x", "y"),
        *_each(ctypes.c_int32, "inputs", "outputs"),
        *_each(ctypes.POINTER(Address), "xs", "ys"),
        *_each(ctypes.c_int32, "passes", "rects"),
        ("pass", ctypes.POINTER(Pass)),
        ("rect", ctypes.POINTER(Rect)),
        *_each(Address, "scale", "shift"),
        ("relu", ctypes.c_int32),
        ("partial", ctypes.POINTER(Partial)),
    ]


class WeightGrad(ctypes.Structure):
    """A call of `wk_depthwise_weight_grad`."""

    _fields_ = [
        *_COMMON,
        *_each(Tensor, "x", "grad"),
        ("pass", Pass),
        ("taps", Address),
        *_each(ctypes.c_int32, "rows", "columns", "row", "column", "dilation"),
    ]


class PatchGeometry(ctypes.Structure):
    """The patches of a convolution; all zero for none."""

    _fields_ = _each(ctypes.c_int32, "rows", "columns", "row_stride", "column_stride", "top", "left")


class PointwiseWeights(ctypes.Structure):
    """The weights that `wk_pointwise_pack` packs."""

    _fields_ = [
        *_each(ctypes.c_int32, "type", "inputs", "hidden", "outputs", "activation", "normalize"),
        ("eps", ctypes.c_float),
        *_each(Address, "first", "first_bias", "second", "second_bias"),
        ("patch", PatchGeometry),
        ("normalize_after", ctypes.c_int32),
        ("after_eps", ctypes.c_float),
        *_each(Address, "after_scale", "after_shift", "response"),
        ("response_eps", ctypes.c_float),
    ]


class PointwiseCall(ctypes.Structure):
    """A call of `wk_pointwise_run`."""

    _fields_ = [
        *_each(ctypes.c_int32, "threads", "images", "height", "width"),
        *_each(Tensor, "x", "residual", "y"),
        *_each(ctypes.c_int32, "x_height", "x_width"),
        ("factors", Address),
    ]


class Gate(ctypes.Structure):
    """A call of `wk_gate_run`."""

    _fields_ = [
        *_each(ctypes.c_int32, "threads", "images", "channels", "height", "width"),
        ("x", Tensor),
        *_each(ctypes.c_int32, "hidden", "activation"),
        *_each(Address, "first", "first_bias", "second", "second_bias", "y"),
    ]


class DepthwiseConv(ctypes.Structure):
    """A call of `wk_depthwise_conv_run`."""

    _fields_ = [
        *_each(ctypes.c_int32, "threads", "images", "channels", "height", "width", "x_height", "x_width", "relu"),
        *_each(Tensor, "x", "y"),
        ("patch", PatchGeometry),
        *_each(Address, "taps", "shift"),
    ]


class Place(ctypes.Structure):
    """An address: some bytes from one of the bases of `wk_run_steps`; null if the index of the base is negative."""

    _fields_ = [("base", ctypes.c_int64), ("offset", ctypes.c_int64)]


class Step(ctypes.Structure):
    """One of several calls that `wk_run_steps` makes."""

    _fields_ = [
        *_each(ctypes.c_int32, "kind", "relu"),
        *_each(Address, "call", "packed"),
        *_each(Place, "x", "factors", "residual", "y"),
        *_each(Address, "taps", "scale", "shift", "partial"),
    ]


class Samples(ctypes.Structure):
    """Some floats in memory at constant distance."""

    _fields_ = [("at", Address), ("count", ctypes.c_int64), ("step", ctypes.c_int64)]


class PointwiseGrad(ctypes.Structure):
    """A call of `wk_pointwise_weight_grad`."""

    _fields_ = [
        *_each(ctypes.c_int32, "threads", "images", "height", "width", "inputs", "outputs"),
        *_each(Tensor, "x", "grad"),
        *_each(Address, "weight", "bias"),
    ]


class BatchNorm(ctypes.Structure):
    """A call of `wk_batch_norm_run`."""

    _fields_ = [
        *_each(ctypes.c_int32, "threads", "images", "channels", "height", "width", "backward"),
        *_each(Tensor, "x", "grad", "y"),
        *_each(Address, "weight", "bias"),
        ("eps", ctypes.c_float),
        *_each(Address, "mean", "variance", "factor", "weight_grad", "bias_grad"),
    ]
