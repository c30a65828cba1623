"""Prepared calls of the native library that convolve some channels of an image, and scale and shift the others."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.ops import recording
from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.prepared import PreparedSum
from widekernel.ops.problem import memory_format


class Selection(NamedTuple):
    """The channels of an image that are convolved, and the others, which follow them in the result, scaled and shifted.

    Attributes:
        selected: S channels of the image, whole numbers.
        others: G channels of the image, whole numbers.
        scale: (G, 1, 1), factors of the others.
        shift: (G, 1, 1), summands of the others.
    """

    selected: Tensor
    others: Tensor
    scale: Tensor
    shift: Tensor


class PreparedPartialSum(PreparedSum):
    """Calls of `partial_depthwise_sum` of one problem: that of the selected channels alone."""

    def __call__(  # type: ignore[override]
        self, x: Tensor, kernels: Sequence[Tensor], bias: Tensor, selection: Selection
    ) -> Tensor:
        """Compute `partial_depthwise_sum`.

        Args:
            x: (N, C, H, W), stored as NCHW or NHWC, float32.
            kernels: (S, 1, kh, kw) each, contiguous.
            bias: (S,), contiguous.
            selection: channels in int32, factors and summands in float32, contiguous.

        Returns:
            (N, S + G, H, W), in the layout of `x`.

        Raises:
            ArgumentError: if a table names a channel that `x` does not have.
            NativeMemoryError: if there is no memory for the working space.
        """
        images, inputs, height, width = x.shape
        others = selection.others.numel()
        shape = images, selection.selected.numel() + others, height, width
        layout = memory_format(x)
        y = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=layout)
        key = x.stride()
        call = self._calls.get(key) or self._calls.setdefault(key, self._prepared_call(x, y, layout))
        taps = self._addresses(*[kernel.data_ptr() for kernel in kernels])
        partial = native.Partial(inputs, others, *[table.data_ptr() for table in selection])
        where = bias.data_ptr()
        error = self._run(call.description, x.data_ptr(), y.data_ptr(), taps, None, where, False, ctypes.byref(partial))
        if error == native.BAD_ARGUMENT:
            raise ArgumentError(f"the channels selected and others must lie in 0..{inputs - 1}, those of the image")
        self._library.check(error)
        if recording.OPEN:
            made = native.DEPTHWISE_STEP, self, call.description, x, y
            recording.note(*made, taps=taps, constants=(*kernels, bias, *selection), shift=where, partial=partial)
        return y
