"""Checks of the weights and settings of native products over channels."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from widekernel.errors import ArgumentError, nearest
from widekernel.ops.patch import Patch


def require_known(name: str, value: str, known: Collection[str]) -> None:
    """Raise for a setting that is none of the known ones.

    Raises:
        ArgumentError: which names the setting, the one that was probably meant, and all others.
    """
    if value not in known:
        raise ArgumentError(f"{name} is {value!r}.{nearest(value, known)} It must be one of {', '.join(known)}.")


def require_no_gradients(name: str, tensor: Tensor) -> None:
    """Raise for a tensor whose gradient is wanted.

    Raises:
        ArgumentError: which names the tensor.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(f"{name} requires gradients, which packed weights do not have; use torch.no_grad()")


def require_floats(name: str, tensor: Tensor) -> None:
    """Raise for anything but a strided float32 tensor on a CPU.

    Raises:
        ArgumentError: which says what the tensor is.
    """
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        kind = f"{tensor.dtype} on {tensor.device}, {tensor.layout}"
        raise ArgumentError(f"{name} is {kind}, but must be a strided torch.float32 tensor on a CPU")


def checked_matrix(name: str, matrix: Tensor, columns: int | None = None) -> tuple[int, int]:
    """Return rows and columns of a matrix of weights.

    Raises:
        ArgumentError: if it is not float32 on a CPU, is empty, or has other than `columns` columns.
    """
    require_floats(name, matrix)
    fits = matrix.dim() == 2 and matrix.numel() > 0 and columns in (None, matrix.shape[1])
    if not fits:
        wanted = f"(outputs, {columns})" if columns else "(hidden, channels)"
        raise ArgumentError(f"{name} has the shape {tuple(matrix.shape)}, but must be {wanted}, none of them 0")
    return matrix.shape[0], matrix.shape[1]


def checked_vector(name: str, vector: Tensor | None, size: int) -> Tensor | None:
    """Return a bias or another vector, if there is one, after a check.

    Raises:
        ArgumentError: if it is not float32 on a CPU or has another size.
    """
    if vector is not None:
        require_floats(name, vector)
        if tuple(vector.shape) != (size,):
            raise ArgumentError(f"{name} has the shape {tuple(vector.shape)}, but must be ({size},)")
    return vector


def checked_kernels(first: Tensor, patch: Patch) -> tuple[int, int]:
    """Return the numbers of output and input channels of a convolution.

    Raises:
        ArgumentError: if its kernels are not float32 on a CPU, are empty or unlike those of `patch`, or if the patch is
            impossible.
    """
    require_floats("first", first)
    if first.dim() != 4 or first.numel() == 0 or tuple(first.shape[2:]) != tuple(patch.kernel):
        rows, columns = patch.kernel
        raise ArgumentError(
            f"first has the shape {tuple(first.shape)}, but must be (hidden, channels, {rows}, {columns}), none of them 0"
        )
    if min(patch.stride) < 1 or min(patch.padding) < 0:
        raise ArgumentError(f"patch is {patch}, but strides must be at least 1 and paddings at least 0")
    return first.shape[0], first.shape[1]


def require_epsilon(name: str, eps: float | None) -> None:
    """Raise for an epsilon that is neither None nor a finite number from 0 on.

    Raises:
        ArgumentError: which states the value.
    """
    if eps is not None and not 0 <= eps < float("inf"):
        raise ArgumentError(f"{name} is {eps}, but must be None or a finite number that is not negative")
