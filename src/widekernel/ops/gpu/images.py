"""What launches have in common: options, and images as the kernels take them."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from widekernel.ops.gpu.configs import Config
from widekernel.ops.problem import Problem

INTERPRETER = "TRITON_INTERPRET"
"""Environment variable of Triton's: 1 has kernels interpreted, which is how they run on a CPU, for tests."""


def product_options(problem: Problem, config: Config) -> dict:
    """Give what the kernels with products have in common: their precision, warps and stages."""
    precision = "tf32x3" if problem.dtype == torch.float32 and not problem.tf32 else "tf32"
    # Triton's interpreter multiplies bfloat16 wrongly.
    upcast = is_interpreted() and problem.dtype == torch.bfloat16
    return {"PRECISION": precision, "UPCAST": upcast, "num_stages": config.stages, **launch_options(problem, config)}


def is_interpreted() -> bool:
    """Whether Triton interprets kernels instead of compiling them."""
    return os.environ.get(INTERPRETER) == "1"


def launch_options(problem: Problem, config: Config) -> dict:
    """Give what all launches have in common; that multiplications and additions are fused is no default in every Triton."""
    return {"num_warps": config.warps} | ({} if problem.device == "cpu" else {"enable_fp_fusion": True})


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Make the GPU of `x` the current one, on which kernels are launched."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def resolved(x: Tensor) -> Tensor:
    """Give `x` with its numbers in memory, and not their negatives."""
    return x.resolve_neg() if x.is_neg() else x


def in_planes(x: Tensor) -> tuple[Tensor, int]:
    """Give `x` with contiguous planes that follow one another, and how many planes further the next image is."""
    batch, channels, height, width = x.shape
    image, channel, row, column = x.stride()
    # The strides of dimensions of size 1 mean nothing.
    dense = (width == 1 or column == 1) and (height == 1 or row == width) and (channels == 1 or channel == height * width)
    if dense and batch == 1:
        return x, channels
    if dense and image % (height * width) == 0:
        return x, image // (height * width)
    return x.contiguous(), channels


def with_channels_inside(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Give `x` with its channels side by side, and the other strides."""
    farthest = x.shape[2] * x.stride(2) + x.shape[3] * x.stride(3)  # counted in 32 bits by the kernels
    if (x.shape[1] > 1 and x.stride(1) != 1) or farthest >= 2**31:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, (x.stride(0), x.stride(2), x.stride(3))
