"""The calls that compute one pass of a depthwise convolution: our operator's, PyTorch's and those of inference engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel import ops
from widekernel.bench import engines
from widekernel.bench.cases import FORWARD, INPUT_GRAD, Case
from widekernel.bench.checking import BackendRequest
from widekernel.bench.precision import Precision
from widekernel.ops.problem import LAYOUTS, flipped, mirror

PYTORCH = ("PyTorch NHWC", "PyTorch NCHW")
"""The implementations with which the others are compared; the first one that ran is used."""

Call = Callable[[], Tensor]


class Tensors(NamedTuple):
    """Input (N, C, H, W), gradient of the output (N, C, H, W) and kernel (C, 1, kh, kw)."""

    x: Tensor
    grad: Tensor
    kernel: Tensor

    @classmethod
    def random(cls, case: Case, precision: Precision, device: torch.device) -> Tensors:
        """Draw random numbers, which are the same in every precision, up to rounding."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = case.shape, case.shape, (case.channels, 1, *case.kernel)
        return cls(*(torch.randn(shape, generator=generator, device=device).to(precision.dtype) for shape in shapes))

    def first(self, images: int) -> Tensors:
        """Return the first `images` images with the same kernel."""
        return Tensors(self.x[:images], self.grad[:images], self.kernel)


def implementations(
    direction: str, x: Tensor, grad: Tensor, kernel: Tensor, request: BackendRequest, dilation: int = 1
) -> dict[str, Call]:
    """Return the calls of our operator and then those of PyTorch, on the same numbers in both layouts."""
    calls: dict[str, Call] = {}
    images = {name: [t.contiguous(memory_format=layout) for t in (x, grad)] for name, layout in LAYOUTS.items()}
    for name, (image, gradient) in images.items():
        calls[f"ours {name}"] = our_call(direction, image, gradient, kernel, request, dilation)
    for name, (image, gradient) in images.items():
        calls[f"PyTorch {name}"] = pytorch_call(direction, image, gradient, kernel, dilation)
    return calls


def our_call(direction: str, x: Tensor, grad: Tensor, kernel: Tensor, request: BackendRequest, dilation: int = 1) -> Call:
    """Return the call of our operator that computes a pass."""
    size = (kernel.shape[2], kernel.shape[3])
    anchor = (size[0] // 2, size[1] // 2)
    apart = None if dilation == 1 else [dilation]
    if direction == FORWARD:
        return lambda: ops.depthwise_sum(x, [kernel], [anchor], dilations=apart, **request)
    if direction == INPUT_GRAD:
        # As in the backward pass, which flips the kernel at each call.
        return lambda: ops.depthwise_sum(grad, flipped([kernel]), [mirror(size, anchor)], dilations=apart, **request)
    return lambda: ops.depthwise_weight_grad(x, grad, size, anchor, dilation=dilation, **request)


def pytorch_call(direction: str, x: Tensor, grad: Tensor, kernel: Tensor, dilation: int = 1) -> Call:
    """Return the call of PyTorch's operator that computes a pass.

    For a kernel with an even side, PyTorch pads `dilation` rows or columns too many: its output is cropped, and the gradient
    of what was cropped is zero.
    """
    channels, height, width = x.shape[1:]
    (kh, kw), even = kernel.shape[2:], [(size + 1) % 2 * dilation for size in kernel.shape[2:]]
    padding = [kh // 2 * dilation, kw // 2 * dilation]
    if direction == FORWARD:
        if not any(even):
            return lambda: F.conv2d(x, kernel, padding=padding, dilation=dilation, groups=channels)
        return lambda: F.conv2d(x, kernel, padding=padding, dilation=dilation, groups=channels)[..., :height, :width]
    for_x = direction == INPUT_GRAD
    backward = torch.ops.aten.convolution_backward

    def call() -> Tensor:
        given = F.pad(grad, (0, even[1], 0, even[0])) if any(even) else grad
        gradients = backward(
            given, x, kernel, None, [1, 1], padding, [dilation] * 2, False, [0, 0], channels, [for_x, not for_x, False]
        )
        return gradients[0 if for_x else 1]

    return call


def engine_calls(x: Tensor, kernel: Tensor) -> dict[str, Call]:
    """Return the calls of the installed inference engines that compute the forward pass."""
    return {name: engines.forward_in(name, x, kernel) for name in engines.ENGINES if not engines.missing(name)}
