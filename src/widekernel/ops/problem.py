"""What a backend is asked to compute: shapes, kernels and anchors, checked once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from widekernel.errors import ArgumentError

Anchor = tuple[int, int]
DEPTHWISE_SUM = "depthwise_sum"
DEPTHWISE_WEIGHT_GRAD = "depthwise_weight_grad"
# One input and many outputs, and its adjoint: many inputs and one output. Each is as many sums of a single rectangle.
DEPTHWISE_BRANCHES = "depthwise_branches"
DEPTHWISE_SUM_OF_BRANCHES = "depthwise_sum_of_branches"
# "direct": every output is a sum over the pixels under the kernel and over nothing else, so that outliers, infinities and
# NaN reach no further than the kernel does.
DIRECT = "direct"
ALGORITHMS = (DIRECT,)
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
"""How images are stored, by the names that tables and options have for it."""


@dataclass(frozen=True)
class Problem:
    """One call of an operator, without its data.

    Attributes:
        op: `depthwise_sum`, `depthwise_weight_grad`, `depthwise_branches` or `depthwise_sum_of_branches`.
        device: device type, for instance `cpu`.
        dtype: type of every tensor of the call.
        shape: (N, C, H, W) of the input, or of every input.
        kernels: (kh, kw) of every rectangle.
        anchors: for every rectangle the tap that sits on the output pixel, counted from its top left corner.
        channels_last: whether the input, of several the first one, is stored as NHWC.
        algorithm: what the caller insists on, one of `ALGORITHMS`, or "" for the fastest.
        tf32: whether float32 numbers may be rounded to TF32, as in PyTorch's matrix products. Only ever set for float32 on
            a CUDA device, by `torch.set_float32_matmul_precision("high")` and its like; by default float32 is float32.
    """

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    kernels: tuple[tuple[int, int], ...]
    anchors: tuple[Anchor, ...]
    channels_last: bool = False
    algorithm: str = ""
    tf32: bool = False

    @staticmethod
    def of_sum(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], algorithm: str = "") -> Problem:
        """Describe a call of `depthwise_sum`."""
        return _problem(DEPTHWISE_SUM, x, _sizes(kernels), tuple(anchors), algorithm)

    @staticmethod
    def of_weight_grad(x: Tensor, kernel: tuple[int, int], anchor: Anchor, algorithm: str = "") -> Problem:
        """Describe a call of `depthwise_weight_grad`."""
        return _problem(DEPTHWISE_WEIGHT_GRAD, x, (kernel,), (anchor,), algorithm)

    @staticmethod
    def of_branches(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], algorithm: str = "") -> Problem:
        """Describe a call of `depthwise_branches`."""
        return _problem(DEPTHWISE_BRANCHES, x, _sizes(kernels), tuple(anchors), algorithm)

    @staticmethod
    def of_sum_of_branches(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], algorithm: str = "") -> Problem:
        """Describe a call of `depthwise_sum_of_branches` whose first input is `x`."""
        return _problem(DEPTHWISE_SUM_OF_BRANCHES, x, _sizes(kernels), tuple(anchors), algorithm)

    def branches(self) -> list[Problem]:
        """Give the call of `depthwise_sum` that computes each rectangle alone."""
        rects = zip(self.kernels, self.anchors)
        return [replace(self, op=DEPTHWISE_SUM, kernels=(kernel,), anchors=(anchor,)) for kernel, anchor in rects]

    def __str__(self) -> str:
        rects = ", ".join(f"{kh}x{kw} anchored at {anchor}" for (kh, kw), anchor in zip(self.kernels, self.anchors))
        layout = "channels_last" if self.channels_last else "contiguous"
        how = f", algorithm {self.algorithm!r}" if self.algorithm else ""
        dtype = f"{self.dtype}{' (TF32 allowed)' if self.tf32 else ''}"
        return f"{self.op} of {self.shape} {dtype} {layout} on {self.device} with {rects or 'no rectangle'}{how}"


def _problem(op: str, x: Tensor, sizes: tuple[tuple[int, int], ...], anchors: tuple[Anchor, ...], algorithm: str) -> Problem:
    batch, channels, height, width = x.shape
    shape = (batch, channels, height, width)
    return Problem(op, x.device.type, x.dtype, shape, sizes, anchors, is_channels_last(x), algorithm, allows_tf32(x))


def _sizes(kernels: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((kernel.shape[2], kernel.shape[3]) for kernel in kernels)


def allows_tf32(x: Tensor) -> bool:
    """Whether a call with input `x` may round float32 numbers to TF32: where PyTorch's matrix products may."""
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return False
    # `get_float32_matmul_precision` raises where TF32 was allowed by this attribute; set by that function, both agree.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` (N, C, H, W) is stored as NHWC; tensors that are both (C = 1, 1x1 maps) count as contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def is_recorded() -> bool:
    """Whether `torch.jit.trace`, or what is built on it, records a graph."""
    return torch._C._get_tracing_state() is not None


@contextmanager
def unrecorded() -> Iterator[None]:
    """Look at tensors without `torch.jit.trace` making it a part of the graph: their sizes are whole numbers here."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def whole_sizes(tensor: Tensor) -> list[int]:
    """Give the sizes of a tensor, which in a graph that is recorded are those that it has now."""
    if torch.jit.is_scripting():
        return tensor.size()  # type: ignore[return-value]
    else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
        return sizes_now(tensor)


def sizes_now(tensor: Tensor) -> Any:
    """Do the same where TorchScript need not know it, in less time."""
    if torch._C._get_tracing_state() is None:
        return tensor.shape
    with unrecorded():
        return tensor.shape


def memory_format(x: Tensor) -> torch.memory_format:
    """Give the layout of `x`, which is also the layout of what the operators return for it."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def in_layout(y: Tensor, layout: torch.memory_format) -> Tensor:
    """Give `y` with the strides that `torch.empty` would give it in that layout.

    `contiguous` does not do that for dimensions of size 1, whose strides mean nothing; but compiled code asserts that an
    operator returns the very strides that it promised.
    """
    y = y.contiguous(memory_format=layout)
    if min(y.shape) > 1:
        return y
    return y.as_strided(y.shape, torch.empty_like(y, memory_format=layout, device="meta").stride())


def touching(taps: int, anchor: int, extent: int) -> slice:
    """Give the taps of a kernel axis that can meet an image of `extent` pixels; those further out see only padding."""
    return slice(max(0, anchor - extent + 1), min(taps, anchor + extent))


def mirror(kernel: Sequence[int], anchor: Anchor) -> Anchor:
    """Give the anchor of the flipped kernel, which is the one the input gradient needs."""
    return kernel[0] - 1 - anchor[0], kernel[1] - 1 - anchor[1]


def middles(kernels: Sequence[Tensor]) -> list[Anchor]:
    """Give the middle tap of every kernel; what is no kernel at all is left to `check_sum`."""
    return [(k.shape[2] // 2, k.shape[3] // 2) if k.dim() == 4 else (0, 0) for k in kernels]


def check_anchor(kernel: Sequence[int], anchor: Sequence[int]) -> None:
    """Raise unless `anchor` is one of the taps of a (kh, kw) kernel."""
    # The compiler of PyTorch 2.11 cannot ask a number that is a symbol what it has.
    whole = len(anchor) == 2 and all(isinstance(n, (int, torch.SymInt)) or hasattr(n, "__index__") for n in anchor)
    if not whole or not (0 <= anchor[0] < kernel[0] and 0 <= anchor[1] < kernel[1]):
        raise ArgumentError(
            f"anchor {tuple(anchor)} lies outside the {kernel[0]}x{kernel[1]} kernel: "
            f"it must be whole numbers (row, column) with 0 <= row < {kernel[0]} and 0 <= column < {kernel[1]}"
        )


def check_algorithm(algorithm: str) -> None:
    """Raise unless `algorithm` is "" or one that can be asked for."""
    if algorithm and algorithm not in ALGORITHMS:
        raise ArgumentError(
            f"unknown algorithm {algorithm!r}: ask for {' or '.join(map(repr, ALGORITHMS))}, or for None, the fastest"
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
    """Raise unless `scale` and `relu` are what may follow the sum of an input `x`."""
    if scale is not None:
        check_per_channel("scale", scale, x)
    if not isinstance(relu, bool):
        raise ArgumentError(f"relu is {relu!r}: it must be True or False")


def check_per_channel(name: str, values: Tensor, x: Tensor) -> None:
    """Raise unless `values` has a number for every channel of `x`."""
    if not isinstance(values, Tensor):
        raise ArgumentError(f"{name} is {values!r}: it must be a tensor of a number for each channel")
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
