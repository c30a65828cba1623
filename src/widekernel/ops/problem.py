"""The problem that a backend is asked to compute: operator, shapes, kernels, anchors and dilations of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from widekernel.errors import ArgumentError

Anchor = tuple[int, int]
Anchors = tuple[Anchor, ...]
Dilations = tuple[int, ...]
DEPTHWISE_SUM = "depthwise_sum"
DEPTHWISE_WEIGHT_GRAD = "depthwise_weight_grad"
# One input and many outputs, and its adjoint: many inputs and one output. Each equals one single-rectangle sum per branch.
DEPTHWISE_BRANCHES = "depthwise_branches"
DEPTHWISE_SUM_OF_BRANCHES = "depthwise_sum_of_branches"
Algorithm = Literal["direct"]
"""An algorithm that a call can request; None means the fastest."""
# Every output is a sum over the pixels under the kernel and nothing else, so that outliers, infinities and NaN spread no
# further than the kernel reaches.
DIRECT: Algorithm = "direct"
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
"""The memory layouts of images, by the names used in tables and options."""


@dataclass(frozen=True)
class Problem:
    """One call of an operator, without its data.

    Attributes:
        op: `depthwise_sum`, `depthwise_weight_grad`, `depthwise_branches` or `depthwise_sum_of_branches`.
        device: type of the device, for instance `cpu`.
        dtype: type of every tensor of the call.
        shape: (N, C, H, W) of the input, or of every input.
        kernels: (kh, kw) of every rectangle, in taps.
        anchors: for every rectangle the tap that sits on the output pixel, counted from its top left corner.
        channels_last: whether the (first) input is stored as NHWC.
        algorithm: the algorithm that the call requests; None for the fastest.
        tf32: whether float32 numbers may be rounded to TF32, as in PyTorch's matrix products. True only for float32 on a
            CUDA device, after `torch.set_float32_matmul_precision("high")` or an equivalent setting.
        dilations: for every rectangle the distance between neighboring taps in pixels, along both axes; by default all 1.
            Anchors count taps: tap (i, j) reads pixel (y + (i - row)·d, x + (j - column)·d).

    Raises:
        ArgumentError: if some rectangle is dilated and the numbers of rectangles and dilations differ.
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
    dilations: Dilations = ()

    def __post_init__(self) -> None:
        if not self.dilated:  # so that problems without a dilation are equal
            object.__setattr__(self, "dilations", (1,) * len(self.kernels))
        elif len(self.dilations) != len(self.kernels):
            counts = f"{len(self.kernels)} kernels but {len(self.dilations)} dilations"
            raise ArgumentError(f"{counts}: every rectangle needs one dilation")

    @property
    def dilated(self) -> bool:
        """Whether some rectangle has gaps between its taps."""
        return any(dilation != 1 for dilation in self.dilations)

    @staticmethod
    def of_sum(
        x: Tensor,
        kernels: Sequence[Tensor],
        anchors: Sequence[Anchor],
        algorithm: Algorithm | None = None,
        dilations: Dilations = (),
    ) -> Problem:
        """Describe a call of `depthwise_sum`."""
        return _problem(DEPTHWISE_SUM, x, _sizes(kernels), tuple(anchors), algorithm, dilations)

    @staticmethod
    def of_weight_grad(
        x: Tensor,
        kernel: tuple[int, int],
        anchor: Anchor,
        algorithm: Algorithm | None = None,
        dilations: Dilations = (),
    ) -> Problem:
        """Describe a call of `depthwise_weight_grad`."""
        return _problem(DEPTHWISE_WEIGHT_GRAD, x, (kernel,), (anchor,), algorithm, dilations)

    @staticmethod
    def of_branches(
        x: Tensor,
        kernels: Sequence[Tensor],
        anchors: Sequence[Anchor],
        algorithm: Algorithm | None = None,
        dilations: Dilations = (),
    ) -> Problem:
        """Describe a call of `depthwise_branches`."""
        return _problem(DEPTHWISE_BRANCHES, x, _sizes(kernels), tuple(anchors), algorithm, dilations)

    @staticmethod
    def of_sum_of_branches(
        x: Tensor,
        kernels: Sequence[Tensor],
        anchors: Sequence[Anchor],
        algorithm: Algorithm | None = None,
        dilations: Dilations = (),
    ) -> Problem:
        """Describe a call of `depthwise_sum_of_branches` whose first input is `x`."""
        return _problem(DEPTHWISE_SUM_OF_BRANCHES, x, _sizes(kernels), tuple(anchors), algorithm, dilations)

    @property
    def layout(self) -> str:
        """Memory layout of the input: a key of `LAYOUTS`."""
        return "NHWC" if self.channels_last else "NCHW"

    def branches(self) -> list[Problem]:
        """Return, for each rectangle, the `depthwise_sum` problem that computes it alone."""
        rects = zip(self.kernels, self.anchors, self.dilations)
        return [
            replace(self, op=DEPTHWISE_SUM, kernels=(kernel,), anchors=(anchor,), dilations=(dilation,))
            for kernel, anchor, dilation in rects
        ]

    def __str__(self) -> str:
        rects = ", ".join(
            f"{kh}x{kw} anchored at {anchor}" + (f" with dilation {dilation}" if dilation != 1 else "")
            for (kh, kw), anchor, dilation in zip(self.kernels, self.anchors, self.dilations)
        )
        layout = "channels_last" if self.channels_last else "contiguous"
        algorithm = f", algorithm {self.algorithm!r}" if self.algorithm else ""
        dtype = f"{self.dtype}{' (TF32 allowed)' if self.tf32 else ''}"
        return f"{self.op} of {self.shape} {dtype} {layout} on {self.device} with {rects or 'no rectangle'}{algorithm}"


def _problem(
    op: str,
    x: Tensor,
    sizes: tuple[tuple[int, int], ...],
    anchors: Anchors,
    algorithm: Algorithm | None,
    dilations: Dilations,
) -> Problem:
    batch, channels, height, width = x.shape
    shape, last, tf32 = (batch, channels, height, width), is_channels_last(x), allows_tf32(x)
    return Problem(op, x.device.type, x.dtype, shape, sizes, anchors, last, algorithm, tf32, dilations)


def _sizes(kernels: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((kernel.shape[2], kernel.shape[3]) for kernel in kernels)


def allows_tf32(x: Tensor) -> bool:
    """Return whether a call with input `x` may round float32 to TF32; it may if PyTorch's matrix products may."""
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return False
    # `get_float32_matmul_precision` raises if TF32 was allowed by this attribute; after its setter, both agree.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def is_channels_last(x: Tensor) -> bool:
    """Return whether `x` (N, C, H, W) is stored as NHWC; tensors that are also contiguous (C = 1, 1x1 maps) do not count."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the layout of `x`, which is also the layout of the operators' results for it."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def in_layout(y: Tensor, layout: torch.memory_format) -> Tensor:
    """Return `y` with the strides of `torch.empty` in that layout.

    `contiguous` keeps the strides of dimensions of size 1, because they have no effect. But compiled code asserts that an
    operator returns exactly the strides of its fake implementation.
    """
    y = y.contiguous(memory_format=layout)
    if min(y.shape) > 1:
        return y
    return y.as_strided(y.shape, torch.empty_like(y, memory_format=layout, device="meta").stride())


def touching(taps: int, anchor: int, extent: int, dilation: int = 1) -> slice:
    """Return the taps of a kernel axis that can meet an image of `extent` pixels; the others only ever meet padding."""
    farthest = (extent - 1) // dilation
    return slice(max(0, anchor - farthest), min(taps, anchor + farthest + 1))


def only_dilated(dilations: Sequence[int]) -> Dilations:
    """Return the dilations as calls pass them on: empty if all are 1, so that such calls look like those without any."""
    return () if all(dilation == 1 for dilation in dilations) else tuple(dilations)


def mirror(kernel: Sequence[int], anchor: Anchor) -> Anchor:
    """Return the anchor of the flipped kernel, which the input gradient needs."""
    return kernel[0] - 1 - anchor[0], kernel[1] - 1 - anchor[1]


def mirror_anchors(kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> Anchors:
    """Return the anchors of the flipped kernels."""
    return tuple(mirror(kernel.shape[2:], anchor) for kernel, anchor in zip(kernels, anchors))


def flipped(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Return the kernels flipped along both axes, which the input gradient needs."""
    return [kernel.flip(-1, -2) for kernel in kernels]


def center_anchors(kernels: Sequence[Tensor]) -> list[Anchor]:
    """Return the middle tap of every kernel; `check_sum` later rejects tensors that are not kernels."""
    return [(k.shape[2] // 2, k.shape[3] // 2) if k.dim() == 4 else (0, 0) for k in kernels]
