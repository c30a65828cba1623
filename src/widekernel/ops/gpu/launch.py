"""Calls of the kernels: what is decided once for a problem, and what is done at each call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from widekernel.ops.gpu.configs import (
    WIDEST_DIAGONALS,
    Channels,
    ChannelsGrad,
    Chip,
    Config,
    Flat,
    Planes,
    Toeplitz,
    ToeplitzGrad,
    blocks_across,
    itemsize,
    lead_of,
    power_of_two,
    turned,
)
from widekernel.ops.gpu.cost import flat_splits, grad_splits
from widekernel.ops.gpu.kernels import direct, flat, toeplitz, weight_grad
from widekernel.ops.problem import Anchor, Problem, in_layout

Images = Sequence[Tensor]
Epilogue = tuple[Tensor | None, Tensor | None, bool]
PLAIN: Epilogue = (None, None, False)
"""Neither scale nor shift nor rectifier."""


class PreparedSum:
    """Sums of rectangles of one problem: of one input or of one for each rectangle, added up or an output for each."""

    def __init__(self, problem: Problem, config: Config, chip: Chip) -> None:
        self.problem, self.config = problem, config
        launch = {Toeplitz: _ToeplitzSum, Flat: _FlatSum, Planes: _PlanesSum, Channels: _ChannelsSum}[type(config)]
        self._launch: Callable[..., None] = launch(problem, config, chip)

    def __call__(self, x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor | None) -> Tensor:
        """Compute `depthwise_sum`, in the layout of `x`."""
        return self.epilogue(x, kernels, None, bias, False)

    def epilogue(
        self, x: Tensor, kernels: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, relu: bool
    ) -> Tensor:
        """Compute relu(scale · sum + shift), the affine map per channel (C,) and the rectifier both being optional."""
        scale, shift = (None if values is None else _plain(values).contiguous() for values in (scale, shift))
        return self._run((x,), kernels, 1, (scale, shift, relu))[0]

    def branches(self, x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> list[Tensor]:
        """Compute an output for each rectangle from one reading of `x`."""
        return self._run((x,), kernels, len(kernels), PLAIN)

    def sum_of_branches(self, xs: Images, kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> Tensor:
        """Add up the rectangles, each of an input of its own."""
        return self._run(xs, kernels, 1, PLAIN)[0]

    def _run(self, xs: Images, kernels: Sequence[Tensor], outputs: int, epilogue: Epilogue) -> list[Tensor]:
        last = self.problem.channels_last
        stays = last and isinstance(self.config, Channels)
        layout = torch.channels_last if stays else torch.contiguous_format
        with _on(xs[0]):
            ys = [
                torch.empty(xs[0].shape, dtype=xs[0].dtype, device=xs[0].device, memory_format=layout)
                for _ in range(outputs)
            ]
            self._launch([_plain(x) for x in xs], [_plain(kernel) for kernel in kernels], ys, epilogue)
            return [in_layout(y, torch.channels_last if last else torch.contiguous_format) for y in ys]


class PreparedWeightGrad:
    """Weight gradients of one problem."""

    def __init__(self, problem: Problem, config: Config, chip: Chip) -> None:
        self.problem, self.config = problem, config
        launch = {ToeplitzGrad: _ToeplitzWeightGrad, ChannelsGrad: _ChannelsWeightGrad}[type(config)]
        self._launch: Callable[[Tensor, Tensor], Tensor] = launch(problem, config, chip)

    def __call__(self, x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
        """Compute `depthwise_weight_grad`, (C, 1, kh, kw)."""
        with _on(x):
            return self._launch(_plain(x), _plain(grad)).to(x.dtype)


class _ToeplitzSum:
    def __init__(self, problem: Problem, config: Toeplitz, chip: Chip) -> None:
        problem = turned(problem) if config.turned else problem
        _, self.channels, self.height, self.width = problem.shape
        self.copies = 16 // itemsize(problem.dtype)
        self.config = config
        self.rects = tuple(self._rect(*size, *anchor) for size, anchor in zip(problem.kernels, problem.anchors))
        self.tiles = math.ceil(self.height / (config.rows * config.row_blocks)) * math.ceil(self.width / config.columns)
        self.options = _options(problem, config)
        self.one_warp = _warps(problem, config) | {"num_warps": 1}

    def _rect(self, kh: int, kw: int, row: int, column: int) -> tuple[int, ...]:
        """Add to a rectangle the zeros in front of its rows, their length with the zeros behind, and where blocks begin."""
        lead = lead_of(self.config, kw, column, self.copies)
        beyond = self.config.columns + self.config.depth + 2 * self.copies
        # Blocks begin at multiples of 16 bytes of the copies, whatever the lead.
        pad = -(-(lead + beyond) // self.copies) * self.copies + lead - column
        return kh, kw, row, column, pad, -(-(pad + kw + beyond) // 16) * 16, lead

    def __call__(self, xs: Images, kernels: Sequence[Tensor], ys: Images, epilogue: Epilogue) -> None:
        expanded = []
        for kernel, (kh, kw, _, _, pad, length, _) in zip(kernels, self.rects):
            kernel = kernel.transpose(2, 3) if self.config.turned else kernel
            e = kernel.new_empty(self.channels, kh, self.copies, length)
            sizes = {"KH": kh, "KW": kw, "PAD": pad, "L": length, "S": self.copies, "BL": min(128, power_of_two(length))}
            toeplitz.expand[(self.channels * kh,)](kernel.contiguous(), e, **sizes, **self.one_warp)
            expanded.append(e)
        images, planes = zip(*(_in_planes(x) for x in xs))
        scale, shift, relu = epilogue
        c = self.config
        batch = xs[0].shape[0]
        toeplitz.toeplitz_sum[(self.tiles * self.channels * math.ceil(batch / c.images),)](
            images,
            tuple(expanded),
            tuple(ys),
            scale,
            shift,
            planes,
            batch,
            self.channels,
            RECTS=self.rects,
            H=self.height,
            W=self.width,
            S=self.copies,
            TURNED=bool(c.turned),
            RELU=relu,
            RH=c.rows,
            TW=c.columns,
            BH=c.row_blocks,
            BN=c.images,
            BK=c.depth,
            **self.options,
        )


class _FlatSum:
    def __init__(self, problem: Problem, config: Flat, chip: Chip) -> None:
        self.batch, self.channels, self.height, self.width = problem.shape
        self.config = config
        self.rects = _rects(problem)
        self.splits = flat_splits(problem, config, chip)
        self.options = _options(problem, config)

    def __call__(self, xs: Images, kernels: Sequence[Tensor], ys: Images, epilogue: Epilogue) -> None:
        images, planes = zip(*(_in_planes(x) for x in xs))
        scale, shift, relu = epilogue
        each = math.ceil(self.batch / self.splits)
        flat.flat_sum[(self.channels * self.splits,)](
            images,
            tuple(kernel.contiguous() for kernel in kernels),
            tuple(ys),
            scale,
            shift,
            planes,
            self.batch,
            self.channels,
            each,
            RECTS=self.rects,
            H=self.height,
            W=self.width,
            RELU=relu,
            P=self.config.pixels,
            BN=self.config.images,
            **self.options,
        )


class _PlanesSum:
    def __init__(self, problem: Problem, config: Planes, chip: Chip) -> None:
        batch, self.channels, self.height, self.width = problem.shape
        self.config, self.batch = config, batch
        self.rects = _rects(problem)
        blocks = math.ceil(self.height * self.width / config.pixels)
        self.programs = math.ceil(batch * self.channels / config.planes) * blocks
        self.options = _warps(problem, config)

    def __call__(self, xs: Images, kernels: Sequence[Tensor], ys: Images, epilogue: Epilogue) -> None:
        scale, shift, relu = epilogue
        image, planes = _in_planes(_one(xs, ys))
        direct.direct_sum_nchw[(self.programs,)](
            image,
            tuple(kernel.contiguous() for kernel in kernels),
            ys[0],
            scale,
            shift,
            planes,
            self.batch,
            self.channels,
            RECTS=self.rects,
            H=self.height,
            W=self.width,
            RELU=relu,
            BP=self.config.planes,
            BM=self.config.pixels,
            **self.options,
        )


class _ChannelsSum:
    def __init__(self, problem: Problem, config: Channels, chip: Chip) -> None:
        batch, self.channels, self.height, self.width = problem.shape
        self.config, self.batch = config, batch
        self.rects = _rects(problem)
        tiles = math.ceil(self.height / config.rows) * math.ceil(self.width / config.columns)
        self.programs = math.ceil(self.channels / config.channels) * tiles * batch
        self.options = _warps(problem, config)

    def __call__(self, xs: Images, kernels: Sequence[Tensor], ys: Images, epilogue: Epilogue) -> None:
        scale, shift, relu = epilogue
        x, strides = _with_channels_inside(_one(xs, ys))
        direct.direct_sum_nhwc[(self.programs,)](
            x,
            tuple(kernel[:, 0].permute(1, 2, 0).float().contiguous() for kernel in kernels),
            ys[0],
            scale,
            shift,
            *strides,
            self.batch,
            self.channels,
            RECTS=self.rects,
            H=self.height,
            W=self.width,
            RELU=relu,
            RH=self.config.rows,
            TW=self.config.columns,
            BC=self.config.channels,
            **self.options,
        )


class _ToeplitzWeightGrad:
    def __init__(self, problem: Problem, config: ToeplitzGrad, chip: Chip) -> None:
        problem = turned(problem) if config.turned else problem
        self.batch, self.channels, self.height, self.width = problem.shape
        self.config, self.chip, self.problem = config, chip, problem
        self.align = 16 // itemsize(problem.dtype)
        self.options = _options(problem, config)

    def __call__(self, x: Tensor, grad: Tensor) -> Tensor:
        (kh, kw), (row, column) = self.problem.kernels[0], self.problem.anchors[0]
        starts = range(0, kw, WIDEST_DIAGONALS)
        parts = [self._columns(x, grad, (kh, min(WIDEST_DIAGONALS, kw - start)), (row, column - start)) for start in starts]
        taps = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return taps.transpose(2, 3).contiguous() if self.config.turned else taps

    def _columns(self, x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
        """Compute some columns of the kernel; the anchor may lie outside of them."""
        c = self.config
        offset, across = blocks_across(c, self.width, kernel[1], anchor[1], self.align)
        programs = self.channels * math.ceil(kernel[0] / c.kernel_rows)
        # The split must not depend on the block of kernel rows: as many steps as the one with the most output rows has.
        steps = math.ceil(self.batch * self.height / c.depth) * math.ceil(self.width / c.outputs)
        splits = grad_splits(self.problem, programs * across, steps, self.chip)
        partial = torch.empty(splits * across, self.channels, 1, *kernel, dtype=torch.float32, device=x.device)
        (x, x_planes), (grad, g_planes) = _in_planes(x), _in_planes(grad)
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
            KYB=c.kernel_rows,
            KXB=power_of_two(kernel[1]),
            WI=c.inputs,
            WO=c.outputs,
            OFFSET=offset,
            ACROSS=across,
            BK=c.depth,
            TURNED=bool(c.turned),
            **self.options,
        )
        return partial[0] if len(partial) == 1 else partial.sum(0)


class _ChannelsWeightGrad:
    def __init__(self, problem: Problem, config: ChannelsGrad, chip: Chip) -> None:
        self.batch, self.channels, self.height, self.width = problem.shape
        self.config, self.problem = config, problem
        self.programs = math.ceil(self.channels / config.channels) * problem.kernels[0][0]
        self.splits = grad_splits(problem, self.programs, self.batch * self.height, chip)
        self.options = _warps(problem, config)

    def __call__(self, x: Tensor, grad: Tensor) -> Tensor:
        (kh, kw), (row, column) = self.problem.kernels[0], self.problem.anchors[0]
        partial = torch.empty(self.splits, kh, kw, self.channels, dtype=torch.float32, device=x.device)
        (x, x_strides), (grad, g_strides) = _with_channels_inside(x), _with_channels_inside(grad)
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
            TW=self.config.columns,
            BC=self.config.channels,
            **self.options,
        )
        return partial.sum(0).permute(2, 0, 1).unsqueeze(1).contiguous()


def _rects(problem: Problem) -> tuple[tuple[int, ...], ...]:
    return tuple((*size, *anchor) for size, anchor in zip(problem.kernels, problem.anchors))


def _options(problem: Problem, config: Config) -> dict:
    """Give what the kernels with products have in common: their precision, warps and stages."""
    precision = "tf32x3" if problem.dtype == torch.float32 and not problem.tf32 else "tf32"
    # Only in Triton's interpreter do tensors lie on a CPU; its products of bfloat16 are wrong.
    upcast = problem.device == "cpu" and problem.dtype == torch.bfloat16
    return {"PRECISION": precision, "UPCAST": upcast, "num_stages": config.stages, **_warps(problem, config)}


def _warps(problem: Problem, config: Config) -> dict:
    """Give what all launches have in common; that multiplications and additions are fused is no default in every Triton."""
    return {"num_warps": config.warps} | ({} if problem.device == "cpu" else {"enable_fp_fusion": True})


def _on(x: Tensor) -> AbstractContextManager:
    """Make the GPU of `x` the current one, on which kernels are launched."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _plain(x: Tensor) -> Tensor:
    return x.resolve_neg() if x.is_neg() else x


def _one(xs: Images, ys: Images) -> Tensor:
    if len(xs) != 1 or len(ys) != 1:
        raise ValueError(f"{len(xs)} inputs and {len(ys)} outputs: the direct kernels have one of each")
    return xs[0]


def _in_planes(x: Tensor) -> tuple[Tensor, int]:
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


def _with_channels_inside(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Give `x` with its channels side by side, and the other strides."""
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, (x.stride(0), x.stride(2), x.stride(3))
