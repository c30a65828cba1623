"""Launches of the kernels for weight gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.ops.gpu.kernel_configs import Chip, DirectNhwcGrad, FlatGrad, ToeplitzGrad
from widekernel.ops.gpu.kernels import direct, flat, weight_grad
from widekernel.ops.gpu.launch_common import in_planes, launch_options, product_options, with_channels_inside
from widekernel.ops.gpu.launch_geometry import (
    GRAD_LAUNCH_COLUMNS,
    blocks_across,
    flat_images_each,
    flat_splits,
    grad_splits,
    in_pixels,
    itemsize,
    next_power_of_two,
    output_rows_met,
    padded_width,
    transposed,
)
from widekernel.ops.problem import Anchor, Problem

_MOST_WRAPS = 4


class ToeplitzWeightGrad:
    """The launch of `weight_grad.toeplitz_weight_grad`."""

    def __init__(self, problem: Problem, config: ToeplitzGrad, chip: Chip) -> None:
        problem = transposed(problem) if config.transposed else problem
        self.batch, self.channels, self.height, self.width = problem.shape
        self.config, self.chip, self.problem = config, chip, problem
        self.padding = padded_width(self.width, problem.dtype) - self.width if config.copied else 0
        self.width += self.padding
        self.align = 16 // itemsize(problem.dtype)
        self.options = product_options(problem, config)

    def __call__(self, x: Tensor, grad: Tensor) -> Tensor:
        """Compute the gradient in float32, (C, 1, kh, kw)."""
        (kh, kw), (row, column) = self.problem.kernels[0], self.problem.anchors[0]
        if self.config.copied:
            x, grad = self._copied(x), self._copied(grad)
        starts = range(0, kw, GRAD_LAUNCH_COLUMNS)
        parts = [
            self._columns(x, grad, (kh, min(GRAD_LAUNCH_COLUMNS, kw - start)), (row, column - start)) for start in starts
        ]
        taps = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return taps.transpose(2, 3).contiguous() if self.config.transposed else taps

    def _copied(self, image: Tensor) -> Tensor:
        image = image.transpose(2, 3) if self.config.transposed else image
        return F.pad(image, (0, self.padding)).contiguous()

    def _fewest_rows(self, kh: int, row: int) -> int:
        """Return the smallest number of output rows for which a block of kernel rows lies on the image, at least 1."""
        starts = range(0, kh, self.config.kernel_rows)
        dilation = self.problem.dilations[0]
        return max(1, min(output_rows_met(self.config, self.height, row - start, dilation) for start in starts))

    def _columns(self, x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
        """Compute some columns of the kernel; the anchor may lie outside them."""
        c, dilation = self.config, self.problem.dilations[0]
        offset, across = blocks_across(c, self.width, *in_pixels(kernel[1], anchor[1], dilation), self.align)
        programs = self.channels * math.ceil(kernel[0] / c.kernel_rows)
        wraps = math.ceil(c.depth / self._fewest_rows(kernel[0], anchor[0]))
        # The split must not depend on the block of kernel rows, so the block with the most output rows determines the steps.
        steps = math.ceil(self.batch * self.height / c.depth) * math.ceil(self.width / c.outputs)
        splits = grad_splits(programs * across, steps, self.chip)
        partial = torch.empty(splits * across, self.channels, 1, *kernel, dtype=torch.float32, device=x.device)
        (x, x_planes), (grad, g_planes) = in_planes(x), in_planes(grad)
        weight_grad.toeplitz_weight_grad[(programs, across, splits)](
            x,
            grad,
            partial,
            x_planes,
            g_planes,
            self.batch,
            self.channels,
            math.ceil(steps / splits),
            H=self.height,
            W=self.width,
            KH=kernel[0],
            KW=kernel[1],
            ROW=anchor[0],
            COL=anchor[1],
            D=dilation,
            KYB=c.kernel_rows,
            KXB=next_power_of_two(kernel[1]),
            WI=c.inputs,
            WO=c.outputs,
            OFFSET=offset,
            ACROSS=across,
            BK=c.depth,
            WRAPS=wraps if wraps <= _MOST_WRAPS else 0,
            LONG=max(x_planes, g_planes) * self.height * self.width * (wraps + 1) >= 2**31,
            TURNED=bool(c.transposed and not c.copied),
            **self.options,
        )
        return _total(partial)


class FlatWeightGrad:
    """The launch of `flat.flat_weight_grad`."""

    def __init__(self, problem: Problem, config: FlatGrad, chip: Chip) -> None:
        self.batch, self.channels, self.height, self.width = problem.shape
        self.config, self.problem = config, problem
        self.splits = flat_splits(problem, config, chip)
        self.each = flat_images_each(problem, config, self.splits)
        self.options = product_options(problem, config)

    def __call__(self, x: Tensor, grad: Tensor) -> Tensor:
        """Compute the gradient in float32, (C, 1, kh, kw)."""
        (kh, kw), (row, column) = self.problem.kernels[0], self.problem.anchors[0]
        partial = torch.empty(self.splits, self.channels, 1, kh, kw, dtype=torch.float32, device=x.device)
        (x, x_planes), (grad, g_planes) = in_planes(x), in_planes(grad)
        flat.flat_weight_grad[(self.channels * self.splits,)](
            x,
            grad,
            partial,
            x_planes,
            g_planes,
            self.batch,
            self.channels,
            self.each,
            H=self.height,
            W=self.width,
            KH=kh,
            KW=kw,
            ROW=row,
            COL=column,
            D=self.problem.dilations[0],
            P=self.config.pixels,
            TAPS=next_power_of_two(max(16, kh * kw)),
            BN=self.config.images,
            **self.options,
        )
        return _total(partial)


class DirectNhwcWeightGrad:
    """The launch of `direct.direct_weight_grad_nhwc`."""

    def __init__(self, problem: Problem, config: DirectNhwcGrad, chip: Chip) -> None:
        self.batch, self.channels, self.height, self.width = problem.shape
        self.config, self.problem = config, problem
        self.programs = math.ceil(self.channels / config.channels) * problem.kernels[0][0]
        self.splits = grad_splits(self.programs, self.batch * self.height, chip)
        self.options = launch_options(problem, config)

    def __call__(self, x: Tensor, grad: Tensor) -> Tensor:
        """Compute the gradient in float32, (C, 1, kh, kw)."""
        (kh, kw), (row, column) = self.problem.kernels[0], self.problem.anchors[0]
        partial = torch.empty(self.splits, kh, kw, self.channels, dtype=torch.float32, device=x.device)
        (x, x_strides), (grad, g_strides) = with_channels_inside(x), with_channels_inside(grad)
        direct.direct_weight_grad_nhwc[(self.programs, self.splits)](
            x,
            grad,
            partial,
            *x_strides,
            *g_strides,
            self.batch,
            self.channels,
            math.ceil(self.batch * self.height / self.splits),
            H=self.height,
            W=self.width,
            KH=kh,
            KW=kw,
            ROW=row,
            COL=column,
            D=self.problem.dilations[0],
            TW=self.config.columns,
            BC=self.config.channels,
            **self.options,
        )
        return partial.sum(0).permute(2, 0, 1).unsqueeze(1).contiguous()


def _total(parts: Tensor) -> Tensor:
    """Return the sum over the first dimension."""
    return parts[0] if len(parts) == 1 else parts.sum(0)
