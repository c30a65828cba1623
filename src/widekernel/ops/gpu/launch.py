"""Launches of the kernels: some decisions are made once per problem, the rest at each call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from widekernel.ops.gpu import launch_weight_grad
from widekernel.ops.gpu.kernel_configs import (
    Chip,
    DirectNchw,
    DirectNhwc,
    DirectNhwcGrad,
    Flat,
    FlatGrad,
    KernelConfig,
    Toeplitz,
    ToeplitzGrad,
)
from widekernel.ops.gpu.kernels import direct, driver, flat, toeplitz
from widekernel.ops.gpu.kernels.errors import OutOfResources
from widekernel.ops.gpu.launch_common import (
    in_planes,
    launch_options,
    on_device_of,
    product_options,
    resolved,
    with_channels_inside,
)
from widekernel.ops.gpu.launch_geometry import (
    expanded_length,
    flat_images_each,
    flat_splits,
    in_pixels,
    itemsize,
    leading_columns,
    next_power_of_two,
    transposed,
)
from widekernel.ops.problem import Anchor, Problem, in_layout

Images = Sequence[Tensor]
Epilogue = tuple[Tensor | None, Tensor | None, bool]
PLAIN: Epilogue = (None, None, False)
"""An epilogue without scale, shift and ReLU."""


def obstacle() -> str:
    """Return why kernels cannot be launched on the GPU of this machine; "" if they can."""
    return driver.obstacle()


class FirstThatFits:
    """An operator with the first of several configurations that fits on the GPU.

    The shared memory and registers that a program needs are known exactly only after compilation.

    Args:
        with_config: returns the operator with a given configuration.
        configs: the configurations in order of preference.
    """

    def __init__(self, with_config: Callable[[KernelConfig], Callable[..., Any]], configs: Sequence[KernelConfig]) -> None:
        self._with_config, self._left = with_config, list(configs)
        self._run = with_config(self._left[0])

    @property
    def config(self) -> KernelConfig:
        """The configuration in use."""
        return self._left[0]

    def __call__(self, *arguments: Any) -> Any:
        """Compute the operator.

        Raises:
            OutOfResources: Triton's error, if no configuration fits.
        """
        while True:
            run = self._run
            try:
                return run(*arguments)
            except OutOfResources as error:
                if len(self._left) == 1:
                    raise
                failed = self._left.pop(0)
                warnings.warn(
                    f"{failed} does not fit on this GPU ({error}): using {self.config} instead; "
                    "`widekernel tune` finds the best configuration",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._run = self._with_config(self.config)


class PreparedSum:
    """Sums of rectangles for one problem: of one input or one for each rectangle, with one output or one for each."""

    def __init__(self, problem: Problem, config: KernelConfig, chip: Chip) -> None:
        self.problem, self.config = problem, config
        launch = {Toeplitz: _ToeplitzSum, Flat: _FlatSum, DirectNchw: _DirectNchwSum, DirectNhwc: _DirectNhwcSum}[
            type(config)
        ]
        self._launch: Callable[..., None] = launch(problem, config, chip)

    def __call__(
        self,
        x: Tensor,
        kernels: Sequence[Tensor],
        anchors: Sequence[Anchor],
        bias: Tensor | None,
        scale: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Compute relu(scale · sum + bias) in the layout of `x`; see `reference.depthwise_sum` and `reference.epilogue`."""
        scale, bias = (None if values is None else resolved(values).contiguous() for values in (scale, bias))
        return self._run((x,), kernels, 1, (scale, bias, relu))[0]

    def branches(self, x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> list[Tensor]:
        """Compute an output for each rectangle, reading `x` once."""
        return self._run((x,), kernels, len(kernels), PLAIN)

    def sum_of_branches(self, xs: Images, kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> Tensor:
        """Compute the sum of the rectangles, each applied to its own input."""
        return self._run(xs, kernels, 1, PLAIN)[0]

    def _run(self, xs: Images, kernels: Sequence[Tensor], outputs: int, epilogue: Epilogue) -> list[Tensor]:
        last = self.problem.channels_last
        stays = last and isinstance(self.config, DirectNhwc)
        layout = torch.channels_last if stays else torch.contiguous_format
        with on_device_of(xs[0]):
            ys = [
                torch.empty(xs[0].shape, dtype=xs[0].dtype, device=xs[0].device, memory_format=layout)
                for _ in range(outputs)
            ]
            self._launch([resolved(x) for x in xs], [resolved(kernel) for kernel in kernels], ys, epilogue)
            return [in_layout(y, torch.channels_last if last else torch.contiguous_format) for y in ys]


class PreparedWeightGrad:
    """Weight gradients for one problem."""

    def __init__(self, problem: Problem, config: KernelConfig, chip: Chip) -> None:
        self.problem, self.config = problem, config
        launch = {
            ToeplitzGrad: launch_weight_grad.ToeplitzWeightGrad,
            FlatGrad: launch_weight_grad.FlatWeightGrad,
            DirectNhwcGrad: launch_weight_grad.DirectNhwcWeightGrad,
        }[type(config)]
        self._launch: Callable[[Tensor, Tensor], Tensor] = launch(problem, config, chip)

    def __call__(self, x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
        """Compute `depthwise_weight_grad`, (C, 1, kh, kw)."""
        with on_device_of(x):
            return self._launch(resolved(x), resolved(grad)).to(x.dtype)


class _ToeplitzSum:
    def __init__(self, problem: Problem, config: Toeplitz, chip: Chip) -> None:
        problem = transposed(problem) if config.transposed else problem
        _, self.channels, self.height, self.width = problem.shape
        self.copies = 16 // itemsize(problem.dtype)
        self.config = config
        self.rects = tuple(self._rect(*rect) for rect in _rects(problem))
        self.tiles = math.ceil(self.height / (config.rows * config.row_blocks)) * math.ceil(self.width / config.columns)
        self.options = product_options(problem, config)
        self.one_warp = launch_options(problem, config) | {"num_warps": 1}

    def _rect(self, kh: int, kw: int, row: int, column: int, dilation: int) -> tuple[int, ...]:
        """Return a rectangle for the kernel.

        That is (kh, kw, row, column), the leading zeros of a kernel row, its padded length, where blocks begin, and the
        dilation.
        """
        width, middle = in_pixels(kw, column, dilation)
        lead = leading_columns(self.config, width, middle, self.copies)
        # Blocks begin at multiples of 16 bytes of the copies, for any number of leading columns. Reading starts one block of
        # outputs before the first taps.
        pad = -(-self.config.columns // self.copies) * self.copies + lead - middle
        return kh, kw, row, column, pad, expanded_length(self.config, pad, width), lead, dilation

    def __call__(self, xs: Images, kernels: Sequence[Tensor], ys: Images, epilogue: Epilogue) -> None:
        expanded = []
        for kernel, (kh, kw, _, _, pad, length, _, dilation) in zip(kernels, self.rects):
            kernel = kernel.transpose(2, 3) if self.config.transposed else kernel
            e = kernel.new_empty(self.channels, kh, self.copies, length)
            sizes = {
                "KH": kh,
                "KW": kw,
                "D": dilation,
                "PAD": pad,
                "L": length,
                "S": self.copies,
                "BL": min(128, next_power_of_two(length)),
            }
            toeplitz.expand[(self.channels * kh,)](kernel.contiguous(), e, **sizes, **self.one_warp)
            expanded.append(e)
        images, planes = zip(*(in_planes(x) for x in xs))
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
            TURNED=bool(c.transposed),
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
        self.each = flat_images_each(problem, config, self.splits)
        self.options = product_options(problem, config)

    def __call__(self, xs: Images, kernels: Sequence[Tensor], ys: Images, epilogue: Epilogue) -> None:
        images, planes = zip(*(in_planes(x) for x in xs))
        scale, shift, relu = epilogue
        flat.flat_sum[(self.channels * self.splits,)](
            images,
            tuple(kernel.contiguous() for kernel in kernels),
            tuple(ys),
            scale,
            shift,
            planes,
            self.batch,
            self.channels,
            self.each,
            RECTS=self.rects,
            H=self.height,
            W=self.width,
            RELU=relu,
            P=self.config.pixels,
            BN=self.config.images,
            **self.options,
        )


class _DirectNchwSum:
    def __init__(self, problem: Problem, config: DirectNchw, chip: Chip) -> None:
        batch, self.channels, self.height, self.width = problem.shape
        self.config, self.batch = config, batch
        self.rects = _rects(problem)
        blocks = math.ceil(self.height * self.width / config.pixels)
        self.programs = math.ceil(batch * self.channels / config.planes) * blocks
        self.options = launch_options(problem, config)

    def __call__(self, xs: Images, kernels: Sequence[Tensor], ys: Images, epilogue: Epilogue) -> None:
        scale, shift, relu = epilogue
        image, planes = in_planes(_single_input(xs, ys))
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


class _DirectNhwcSum:
    def __init__(self, problem: Problem, config: DirectNhwc, chip: Chip) -> None:
        batch, self.channels, self.height, self.width = problem.shape
        self.config, self.batch = config, batch
        self.rects = _rects(problem)
        tiles = math.ceil(self.height / config.rows) * math.ceil(self.width / config.columns)
        self.programs = math.ceil(self.channels / config.channels) * tiles * batch
        self.options = launch_options(problem, config)

    def __call__(self, xs: Images, kernels: Sequence[Tensor], ys: Images, epilogue: Epilogue) -> None:
        scale, shift, relu = epilogue
        x, strides = with_channels_inside(_single_input(xs, ys))
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


def _rects(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Return (kh, kw, row, column, dilation) of each rectangle."""
    rects = zip(problem.kernels, problem.anchors, problem.dilations)
    return tuple((*size, *anchor, dilation) for size, anchor, dilation in rects)


def _single_input(xs: Images, ys: Images) -> Tensor:
    if len(xs) != 1 or len(ys) != 1:
        raise ValueError(f"{len(xs)} inputs and {len(ys)} outputs: the direct kernels take exactly one of each")
    return xs[0]
