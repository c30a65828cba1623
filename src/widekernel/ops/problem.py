"""What a backend is asked to compute: the operator, shapes, kernels and anchors of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Anchor = tuple[int, int]
Anchors = tuple[Anchor, ...]
DEPTHWISE_SUM = "depthwise_sum"
DEPTHWISE_WEIGHT_GRAD = "depthwise_weight_grad"
# One input and many outputs, and its adjoint: many inputs and one output. Each is as many sums of a single rectangle.
DEPTHWISE_BRANCHES = "depthwise_branches"
DEPTHWISE_SUM_OF_BRANCHES = "depthwise_sum_of_branches"
Algorithm = Literal["direct"]
"""What a call can insist on; None stands for the fastest algorithm."""
# Every output is a sum over the pixels under the kernel and over nothing else, so that outliers, infinities and NaN reach no
# further than the kernel does.
DIRECT: Algorithm = "direct"
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
"""How images are stored, by the names used in tables and options."""


@dataclass(frozen=True)
class Problem:
    """One call of an operator, without its data.

    Attributes:
        op: `depthwise_sum`, `depthwise_weight_grad`, `depthwise_branches` or `depthwise_sum_of_branches`.
        device: its type, for instance `cpu`.
        dtype: of every tensor of the call.
        shape: (N, C, H, W) of the input, or of every input.
        kernels: (kh, kw) of every rectangle.
        anchors: for every rectangle the tap that sits on the output pixel, counted from its top left corner.
        channels_last: whether the input, of several the first one, is stored as NHWC.
        algorithm: what the call insists on; None for the fastest.
        tf32: whether float32 numbers may be rounded to TF32, as in PyTorch's matrix products. True only for float32 on a
            CUDA device, after `torch.set_float32_matmul_precision("high")` or an equivalent setting.
    """

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    kernels: tuple[tuple[int, int], ...]
    anchors: tuple[Anchor, ...]
    channels_last: bool = False
    algorithm: Algorithm | None = None
    tf32: bool = False

    @staticmethod
    def of_sum(
        x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], algorithm: Algorithm | None = None
    ) -> Problem:
        """Describe a call of `depthwise_sum`."""
        return _problem(DEPTHWISE_SUM, x, _sizes(kernels), tuple(anchors), algorithm)

    @staticmethod
    def of_weight_grad(x: Tensor, kernel: tuple[int, int], anchor: Anchor, algorithm: Algorithm | None = None) -> Problem:
        """Describe a call of `depthwise_weight_grad`."""
        return _problem(DEPTHWISE_WEIGHT_GRAD, x, (kernel,), (anchor,), algorithm)

    @staticmethod
    def of_branches(
        x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], algorithm: Algorithm | None = None
    ) -> Problem:
        """Describe a call of `depthwise_branches`."""
        return _problem(DEPTHWISE_BRANCHES, x, _sizes(kernels), tuple(anchors), algorithm)

    @staticmethod
    def of_sum_of_branches(
        x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], algorithm: Algorithm | None = None
    ) -> Problem:
        """Describe a call of `depthwise_sum_of_branches` whose first input is `x`."""
        return _problem(DEPTHWISE_SUM_OF_BRANCHES, x, _sizes(kernels), tuple(anchors), algorithm)

    @property
    def layout(self) -> str:
        """How the input is stored: a key of `LAYOUTS`."""
        return "NHWC" if self.channels_last else "NCHW"

    def branches(self) -> list[Problem]:
        """Return for each rectangle the call of `depthwise_sum` that computes it alone."""
        rects = zip(self.kernels, self.anchors)
        return [replace(self, op=DEPTHWISE_SUM, kernels=(kernel,), anchors=(anchor,)) for kernel, anchor in rects]

    def __str__(self) -> str:
        rects = ", ".join(f"{kh}x{kw} anchored at {anchor}" for (kh, kw), anchor in zip(self.kernels, self.anchors))
        layout = "channels_last" if self.channels_last else "contiguous"
        algorithm = f", algorithm {self.algorithm!r}" if self.algorithm else ""
        dtype = f"{self.dtype}{' (TF32 allowed)' if self.tf32 else ''}"
        return f"{self.op} of {self.shape} {dtype} {layout} on {self.device} with {rects or 'no rectangle'}{algorithm}"


def _problem(
    op: str, x: Tensor, sizes: tuple[tuple[int, int], ...], anchors: tuple[Anchor, ...], algorithm: Algorithm | None
) -> Problem:
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


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the layout of `x`, which is also the layout of what the operators return for it."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def in_layout(y: Tensor, layout: torch.memory_format) -> Tensor:
    """Return `y` with the strides that `torch.empty` has in that layout.

    `contiguous` leaves the strides of dimensions of size 1 alone, because they mean nothing; but compiled code asserts that
    an operator returns exactly the strides of its fake implementation.
    """
    y = y.contiguous(memory_format=layout)
    if min(y.shape) > 1:
        return y
    return y.as_strided(y.shape, torch.empty_like(y, memory_format=layout, device="meta").stride())


def touching(taps: int, anchor: int, extent: int) -> slice:
    """Return the taps of a kernel axis that can meet an image of `extent` pixels; those further out see only padding."""
    return slice(max(0, anchor - extent + 1), min(taps, anchor + extent))


def mirror(kernel: Sequence[int], anchor: Anchor) -> Anchor:
    """Return the anchor of the flipped kernel, as the input gradient needs it."""
    return kernel[0] - 1 - anchor[0], kernel[1] - 1 - anchor[1]


def mirror_anchors(kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> Anchors:
    """Return the anchors of the flipped kernels."""
    return tuple(mirror(kernel.shape[2:], anchor) for kernel, anchor in zip(kernels, anchors))


def flipped(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Return the kernels upside down and back to front, as the input gradient needs them."""
    return [kernel.flip(-1, -2) for kernel in kernels]


def center_anchors(kernels: Sequence[Tensor]) -> list[Anchor]:
    """Return the middle tap of every kernel; what is no kernel at all is left to `check_sum`."""
    return [(k.shape[2] // 2, k.shape[3] // 2) if k.dim() == 4 else (0, 0) for k in kernels]
