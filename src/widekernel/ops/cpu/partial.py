"""Prepared calls of the native library that convolve some channels of an image, and scale and shift the others."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.ops import recording
from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.prepared import PreparedSum
from widekernel.ops.problem import memory_format


class PreparedPartialSum(PreparedSum):
    """Calls of `partial_depthwise_sum` of one problem: that of the selected channels alone."""

    def __call__(  # type: ignore[override]
        self,
        x: Tensor,
        kernels: Sequence[Tensor],
        bias: Tensor,
        selected: Tensor,
        others: Tensor,
        scale: Tensor,
        shift: Tensor,
    ) -> Tensor:
        """Compute `partial_depthwise_sum`.

        Args:
            x: (N, C, H, W), stored as NCHW or NHWC, float32.
            kernels: (S, 1, kh, kw) each, contiguous.
            bias: (S,), contiguous.
            selected: S channels, int32, contiguous.
            others: the channels behind them in the result, int32, contiguous.
            scale: one factor for each of the others, contiguous.
            shift: one summand for each of the others, contiguous.

        Returns:
            (N, S + number of others, H, W), in the layout of `x`.

        Raises:
            ArgumentError: if a table names a channel that `x` does not have.
            NativeMemoryError: if there is no memory for the working space.
        """
        images, inputs, height, width = x.shape
        shape = images, selected.numel() + others.numel(), height, width
        layout = memory_format(x)
        y = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=layout)
        key = x.stride()
        call = self._calls.get(key) or self._calls.setdefault(key, self._prepared_call(x, y, layout))
        taps = self._addresses(*[kernel.data_ptr() for kernel in kernels])
        tables = (selected, others, scale, shift)
        partial = native.Partial(inputs, others.numel(), *[table.data_ptr() for table in tables])
        where = bias.data_ptr()
        error = self._run(call.description, x.data_ptr(), y.data_ptr(), taps, None, where, False, ctypes.byref(partial))
        if error == native.BAD_ARGUMENT:
            raise ArgumentError(f"the channels selected and others must lie in 0..{inputs - 1}, those of the image")
        self._library.check(error)
        if recording.OPEN:
            made = recording.NativeCall(
                kind=native.DEPTHWISE_STEP,
                owner=self,
                call=call.description,
                x=recording.Value.of(x),
                y=recording.Value.of(y),
                taps=taps,
                constants=(*kernels, bias, *tables),
                shift=where,
                partial=partial,
            )
            recording.note(made)
        return y
