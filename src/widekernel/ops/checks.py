"""Checks of the operators' arguments; each raises an error that names the offending value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.ops.problem import DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD, Algorithm, Dilations, only_dilated

_ALGORITHMS = get_args(Algorithm)


def check_anchor(kernel: Sequence[int], anchor: Sequence[int]) -> None:
    """Raise unless `anchor` is one of the taps of a (kh, kw) kernel."""
    # The compiler of PyTorch 2.11 cannot read attributes of a symbolic number.
    integers = len(anchor) == 2 and all(isinstance(n, (int, torch.SymInt)) or hasattr(n, "__index__") for n in anchor)
    if not integers or not (0 <= anchor[0] < kernel[0] and 0 <= anchor[1] < kernel[1]):
        raise ArgumentError(
            f"anchor {tuple(anchor)} lies outside the {kernel[0]}x{kernel[1]} kernel: "
            f"it must be whole numbers (row, column) with 0 <= row < {kernel[0]} and 0 <= column < {kernel[1]}"
        )


def check_algorithm(algorithm: str | None) -> Algorithm | None:
    """Return `algorithm`, or None if it is empty; raise unless it is one that a call can ask for."""
    if not algorithm:
        return None
    if algorithm not in _ALGORITHMS:
        raise ArgumentError(
            f"unknown algorithm {algorithm!r}: ask for {' or '.join(map(repr, _ALGORITHMS))}, or for None, the fastest"
        )
    return algorithm  # type: ignore[return-value]


def check_dilations(dilations: Sequence[int] | None, rects: int) -> Dilations:
    """Return the dilations of so many rectangles, empty if all are 1; raise unless each is a positive whole number.

    Args:
        dilations: distance between neighboring taps of each rectangle; None for 1.
        rects: number of rectangles.
    """
    if dilations is None:
        return ()
    if not isinstance(dilations, (list, tuple)):
        raise ArgumentError(f"dilations is {dilations!r}: it must be a list with one whole number for each kernel, or None")
    if len(dilations) != rects:
        raise ArgumentError(f"{rects} kernels but {len(dilations)} dilations: every rectangle needs one dilation")
    for i, dilation in enumerate(dilations):
        check_dilation(f"dilations[{i}]", dilation)
    return only_dilated(dilations)


def check_dilation(name: str, dilation: int) -> None:
    """Raise unless `dilation` is a positive whole number."""
    # As in `check_anchor`. True is an integer in Python.
    integer = isinstance(dilation, (int, torch.SymInt)) or hasattr(dilation, "__index__")
    if not integer or isinstance(dilation, (bool, Tensor)) or dilation < 1:
        raise ArgumentError(
            f"{name} is {dilation!r}: a distance between taps must be a positive whole number; 1 leaves no gaps between them"
        )


def check_sum(
    x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Sequence[int]], bias: Tensor | None, op: str = DEPTHWISE_SUM
) -> None:
    """Raise a ValueError that names the offending value unless the arguments of `depthwise_sum` (or `op`) fit together."""
    if x.dim() != 4:
        raise ArgumentError(f"x has shape {tuple(x.shape)}: {op} needs four dimensions (N, C, H, W)")
    _check_floating(x, op)
    if isinstance(kernels, Tensor):
        raise ArgumentError(f"kernels is a tensor: {op} takes a list of rectangles; write [kernel]")
    if not kernels:
        raise ArgumentError(f"kernels is empty: {op} needs at least one rectangle")
    if len(kernels) != len(anchors):
        raise ArgumentError(f"{len(kernels)} kernels but {len(anchors)} anchors: every rectangle needs one anchor")
    channels = x.shape[1]
    for i, (kernel, anchor) in enumerate(zip(kernels, anchors)):
        if kernel.dim() != 4 or kernel.shape[1] != 1 or kernel.shape[0] != channels:
            raise ArgumentError(
                f"kernels[{i}] has shape {tuple(kernel.shape)}: an input with {channels} channels "
                f"needs ({channels}, 1, kh, kw)"
            )
        if 0 in kernel.shape[2:]:
            raise ArgumentError(f"kernels[{i}] has shape {tuple(kernel.shape)}: a rectangle needs at least one tap")
        check_anchor(kernel.shape[2:], anchor)
        _check_same(f"kernels[{i}]", kernel, x)
    if bias is not None:
        check_per_channel("bias", bias, x)


def check_weight_grad(x: Tensor, grad: Tensor, kernel: Sequence[int], anchor: Sequence[int]) -> None:
    """Raise a ValueError that names the offending value unless the arguments of `depthwise_weight_grad` fit together."""
    if x.dim() != 4 or grad.shape != x.shape:
        raise ArgumentError(f"x has shape {tuple(x.shape)} and grad {tuple(grad.shape)}: both must be the same (N, C, H, W)")
    _check_floating(x, DEPTHWISE_WEIGHT_GRAD)
    if len(kernel) != 2 or min(kernel) < 1:
        raise ArgumentError(f"kernel size {tuple(kernel)} must be two positive numbers (kh, kw)")
    check_anchor(kernel, anchor)
    _check_same("grad", grad, x)


def check_epilogue(x: Tensor, scale: Tensor | None, relu: bool) -> None:
    """Raise unless `scale` and `relu` are valid for an input `x`."""
    if scale is not None:
        check_per_channel("scale", scale, x)
    if not isinstance(relu, bool):
        raise ArgumentError(f"relu is {relu!r}: it must be True or False")


def check_per_channel(name: str, values: Tensor, x: Tensor) -> None:
    """Raise unless `values` has one number for each channel of `x`."""
    if not isinstance(values, Tensor):
        raise ArgumentError(f"{name} is {values!r}: it must be a tensor with one number for each channel")
    channels = x.shape[1]
    if values.shape != (channels,):
        raise ArgumentError(f"{name} has shape {tuple(values.shape)}: an input with {channels} channels needs ({channels},)")
    _check_same(name, values, x)


def _check_floating(x: Tensor, op: str) -> None:
    if not x.dtype.is_floating_point:
        raise ArgumentError(f"x has dtype {x.dtype}: {op} needs a floating-point type; convert it first")


def _check_same(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ArgumentError(f"{name} is on {tensor.device} but x is on {x.device}: move one of them")
    if tensor.dtype != x.dtype:
        raise ArgumentError(
            f"{name} has dtype {tensor.dtype} but x has {x.dtype}: convert one of them, or call under torch.autocast"
        )
