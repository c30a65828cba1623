"""Depthwise convolutions of small kernels with any stride, and a ReLU, in one native call."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.ops import recording
from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.pointwise import image_of
from widekernel.ops.cpu.tensor_checks import checked_vector, require_floats, require_no_gradients
from widekernel.ops.patch import Patch


class _Call(NamedTuple):
    """A reference to the C structure of a call, and shape and strides of the result."""

    description: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class PackedDepthwiseConv:
    """`ops.depthwise_conv_reference.depthwise_conv` with given weights, which are copied; later changes have no effect.

    Args:
        weight: (C, 1, kh, kw), float32 on a CPU.
        bias: (C,), or None.
        patch: kernel, strides and padding.
        relu: whether to apply ReLU.

    Raises:
        ArgumentError: for shapes that do not fit together, tensors that are not float32 on a CPU, strides below 1,
            paddings below 0 and either above 65,535, or if the native library cannot run.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, patch: Patch, relu: bool = False) -> None:
        self._library = native.load()
        if self._library.reason is not None:
            raise ArgumentError(f"a depthwise convolution cannot be packed: {self._library.reason}")
        require_floats("weight", weight)
        rows, columns = patch.kernel
        if weight.dim() != 4 or weight.numel() == 0 or tuple(weight.shape[1:]) != (1, rows, columns):
            raise ArgumentError(
                f"weight has the shape {tuple(weight.shape)}, but must be (channels, 1, {rows}, {columns}), none of them 0"
            )
        if not all(1 <= step <= _MOST for step in patch.stride) or not all(0 <= pad <= _MOST for pad in patch.padding):
            raise ArgumentError(f"patch is {patch}, but strides must be 1 to {_MOST}, and paddings 0 to {_MOST}")
        self.channels, self.patch, self.relu = weight.shape[0], patch, relu
        bias = checked_vector("bias", bias, self.channels)
        self._weight = weight.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        self._bias = None if bias is None else bias.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        # (rows, columns, channels)
        self._taps = self._weight[:, 0].permute(1, 2, 0).contiguous()
        self._prepared: dict[tuple[Any, ...], _Call] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the convolution of images. PyTorch computes it unless their channels are adjacent (channels_last).

        Args:
            x: (N, C, H, W), float32 on a CPU.

        Returns:
            (N, C, H', W'), without gradients; channels_last if the channels of `x` are adjacent.

        Raises:
            ArgumentError: for another shape, type or device, for images that are smaller than the kernel, or if gradients
                are wanted.
        """
        call = self._prepared.get((x.shape, x.stride(), torch.get_num_threads()))
        if call is None or x.dtype is not torch.float32 or not x.is_cpu or x.is_neg() or x.requires_grad:
            x = self._checked(x)
            # PyTorch regards images that are also contiguous, such as those of one pixel, as contiguous.
            adjoin = self.channels == 1 or (x.stride(1) == 1 and not x.is_contiguous())
            if x.numel() == 0 or not adjoin:
                with torch.no_grad():
                    y = F.conv2d(x, self._weight, self._bias, self.patch.stride, self.patch.padding, 1, self.channels)
                    return y.relu_() if self.relu else y
            call = self._call(x)
        y = torch.empty_strided(call.shape, call.stride, dtype=torch.float32, device="cpu")
        error = self._library.calls.wk_depthwise_conv_run_at(call.description, x.data_ptr(), y.data_ptr())
        if error:
            self._library.check(error)
        if recording.OPEN:
            recording.note(native.CONV_STEP, self, call.description, x, y)
        return y

    def __deepcopy__(self, _memo: object) -> PackedDepthwiseConv:
        """Return the same object: its weights never change."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("packed weights belong to one process; save the layer and pack them again")

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels or min(self.patch.size(*x.shape[2:])) < 1:
            raise ArgumentError(
                f"x has the shape {tuple(x.shape)}, but must be (N, {self.channels}, H, W) and, with the padding on "
                f"both sides, at least as large as the kernel: {self.patch}"
            )
        require_floats("x", x)
        require_no_gradients("x", x)
        return x.resolve_neg()

    def _call(self, x: Tensor) -> _Call:
        key = x.shape, x.stride(), torch.get_num_threads()
        found = self._prepared.get(key)
        if found is None:
            sides = self.patch.size(*x.shape[2:])
            y = torch.empty((x.shape[0], self.channels, *sides), device="meta", memory_format=torch.channels_last)
            sizes = torch.get_num_threads(), *y.shape, *x.shape[2:], int(self.relu)
            images = [native.Tensor(*image_of(image)) for image in (x, y)]
            patch = native.PatchGeometry(*self.patch.kernel, *self.patch.stride, *self.patch.padding)
            shift = None if self._bias is None else self._bias.data_ptr()
            description = native.DepthwiseConv(*sizes, *images, patch, self._taps.data_ptr(), shift)
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            found = self._prepared[key] = _Call(ctypes.byref(description), tuple(y.shape), y.stride())
        return found


_MOST = 2**16 - 1
"""Largest stride and padding."""
_MOST_PREPARED = 256
"""Number of shapes whose descriptions a convolution keeps."""
