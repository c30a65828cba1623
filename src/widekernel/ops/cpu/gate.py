"""Squeeze-excite's factors in native code: one call for the mean over pixels, both products and the sigmoid."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.ops import recording
from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.pointwise import ACTIVATIONS, image_of
from widekernel.ops.cpu.tensor_checks import (
    checked_matrix,
    checked_vector,
    require_floats,
    require_known,
    require_no_gradients,
)


class Gate:
    """sigmoid(second · activation(first · mean(x) + first_bias) + second_bias), for every image.

    The weights are copied; later changes of the tensors have no effect.

    Args:
        first: (hidden, channels), float32.
        first_bias: (hidden), or None.
        activation: `none`, `relu`, `gelu` or `gelu_tanh`.
        second: (channels, hidden).
        second_bias: (channels), or None.

    Raises:
        ArgumentError: for shapes that do not fit together, tensors that are not float32 on a CPU, an unknown activation, or
            if the native library cannot run.
    """

    def __init__(
        self, first: Tensor, first_bias: Tensor | None, activation: str, second: Tensor, second_bias: Tensor | None
    ) -> None:
        self._library = native.load()
        if self._library.reason is not None:
            raise ArgumentError(f"a gate cannot be computed: {self._library.reason}")
        require_known("activation", activation, ACTIVATIONS)
        hidden, channels = checked_matrix("first", first)
        outputs, _ = checked_matrix("second", second, hidden)
        if outputs != channels:
            raise ArgumentError(f"second has {outputs} rows, but must have {channels}, one for each channel")
        parts = [first, checked_vector("first_bias", first_bias, hidden)]
        parts += [second, checked_vector("second_bias", second_bias, channels)]
        self._weights = [None if part is None else part.detach().resolve_neg().contiguous().clone() for part in parts]
        self.channels, self.hidden, self.activation = channels, hidden, activation
        self._prepared: dict[tuple[Any, ...], Any] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the factors of images.

        Contiguous channels (channels_last) or columns are fast; other strides are read element by element.

        Args:
            x: (N, channels, height, width), float32 on a CPU.

        Returns:
            (N, channels), without gradients.

        Raises:
            ArgumentError: for another shape, type or device, for images without pixels, or if gradients are wanted.
            NativeMemoryError: if there is no memory for the working space.
        """
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ArgumentError(f"x has the shape {tuple(x.shape)}, but must be (N, {self.channels}, height, width)")
        require_floats("x", x)
        require_no_gradients("x", x)
        if x.shape[2] * x.shape[3] == 0:
            raise ArgumentError(f"x has the shape {tuple(x.shape)}: there is no mean of no pixels")
        x = x.resolve_neg()
        y = x.new_empty(x.shape[:2])
        if y.numel():
            call = self._description(x)
            self._library.check(self._library.calls.wk_gate_run_at(call, x.data_ptr(), y.data_ptr()))
            if recording.OPEN:
                recording.note(native.GATE_STEP, self, call, x, y)
        return y

    def __deepcopy__(self, _memo: object) -> Gate:
        """Return the same object: its weights never change."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("a gate belongs to one process; save the layers and make it again")

    def _description(self, x: Tensor) -> Any:
        key = x.shape, x.stride(), torch.get_num_threads()
        found = self._prepared.get(key)
        if found is None:
            first, first_bias, second, second_bias = [None if part is None else part.data_ptr() for part in self._weights]
            sizes = torch.get_num_threads(), *x.shape, native.Tensor(*image_of(x))
            weights = self.hidden, ACTIVATIONS[self.activation], first, first_bias, second, second_bias, None
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            found = self._prepared[key] = ctypes.byref(native.Gate(*sizes, *weights))
        return found


_MOST_PREPARED = 256
"""Number of shapes whose descriptions a gate keeps."""
