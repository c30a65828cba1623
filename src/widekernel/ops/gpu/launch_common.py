"""Shared parts of all launches: options, and tensors in the memory layouts that the kernels accept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from widekernel.ops.gpu.interpreter import is_interpreted
from widekernel.ops.gpu.kernel_configs import KernelConfig
from widekernel.ops.problem import Problem


def product_options(problem: Problem, config: KernelConfig) -> dict:
    """Return the options of kernels that use matrix products: precision, warps and stages."""
    precision = "tf32x3" if problem.dtype == torch.float32 and not problem.tf32 else "tf32"
    # Triton's interpreter computes wrong products of bfloat16.
    upcast = is_interpreted() and problem.dtype == torch.bfloat16
    return {"PRECISION": precision, "UPCAST": upcast, "num_stages": config.stages, **launch_options(problem, config)}


def launch_options(problem: Problem, config: KernelConfig) -> dict:
    """Return the options of all launches. Not every version of Triton fuses multiplications and additions by default."""
    return {"num_warps": config.warps} | ({} if problem.device == "cpu" else {"enable_fp_fusion": True})


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Return a context in which the GPU of `x` is current, because kernels are launched on the current GPU."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def resolved(x: Tensor) -> Tensor:
    """Return `x` without a lazy negation, so that its memory holds the actual numbers."""
    return x.resolve_neg() if x.is_neg() else x


def in_planes(x: Tensor) -> tuple[Tensor, int]:
    """Return `x` with contiguous, consecutive planes, and the number of planes from one image to the next."""
    batch, channels, height, width = x.shape
    image, channel, row, column = x.stride()
    # The strides of dimensions of size 1 have no meaning.
    dense = (width == 1 or column == 1) and (height == 1 or row == width) and (channels == 1 or channel == height * width)
    if dense and batch == 1:
        return x, channels
    if dense and image % (height * width) == 0:
        return x, image // (height * width)
    return x.contiguous(), channels


def with_channels_inside(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return `x` with adjacent channels, and its strides of images, rows and columns."""
    farthest = x.shape[2] * x.stride(2) + x.shape[3] * x.stride(3)  # the kernels compute it in 32 bits
    if (x.shape[1] > 1 and x.stride(1) != 1) or farthest >= 2**31:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, (x.stride(0), x.stride(2), x.stride(3))
