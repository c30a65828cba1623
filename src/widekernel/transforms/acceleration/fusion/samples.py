"""Samples of tensors, by which writes are noticed that PyTorch does not count."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from widekernel.ops.cpu import library as native

_MOST = 32
"""How many values of a tensor are compared."""


class Samples:
    """A few values of each tensor, spread over it, as they were when this object was made.

    Bits are compared, so that NaN equals itself.

    Args:
        tensors: float32 tensors on the CPU without gaps in memory, which must not be resized.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._views = [_spread(tensor).view(torch.int32) for tensor in tensors]
        self._values = torch.cat([*self._views, torch.empty(0, dtype=torch.int32, device="cpu")])
        library = native.load()
        self._compare = None if library.reason is not None else library.calls.wk_samples_equal
        sets = [native.Samples(view.data_ptr(), view.numel(), view.stride(0)) for view in self._views]
        array = (native.Samples * len(sets))(*sets)
        # The array is part of the tuple, so that its memory lives as long as its address.
        self._call = ctypes.addressof(array), len(sets), self._values.data_ptr(), array

    def unchanged(self) -> bool:
        """Return whether all of them are what they were. The memory of the tensors must still be where it was."""
        if self._compare is not None:
            return bool(self._compare(*self._call[:3]))
        return torch.equal(torch.cat([*self._views, self._values[:0]]), self._values)


def _spread(tensor: Tensor) -> Tensor:
    """Return a view of some values of a tensor without gaps, from its beginning to its end in memory."""
    count = tensor.numel()
    # An odd step, so that not all of them lie in a few columns of a matrix whose width is a power of two.
    step = count // _MOST | 1 if count > _MOST else 1
    return tensor.detach().as_strided(((count + step - 1) // step,), (step,), tensor.storage_offset())
