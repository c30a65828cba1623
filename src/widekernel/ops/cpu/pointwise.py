"""Products over channels or patches in native code, with weights packed once."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.errors import ArgumentError, nearest
from widekernel.ops.cpu import library as native
from widekernel.ops.patch import NormAfter, Patch
from widekernel.ops.problem import memory_format

ACTIVATIONS = {"none": native.NO_ACTIVATION, "relu": native.RELU, "gelu": native.GELU, "gelu_tanh": native.GELU_TANH}
"""The activations by name: `gelu` is defined by the error function, `gelu_tanh` is the form with a hyperbolic tangent."""


class _Call(NamedTuple):
    """The state shared by calls whose tensors have the same shapes and strides. Immutable, so threads may share it.

    Attributes:
        description: a reference to the C structure.
        shape: shape of the result.
        strides: its strides.
    """

    description: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class PackedBlock:
    """Two matrix products with an activation between them, computed together for every pixel.

        y = residual + second · response(activation(first · norm(x · factors) + first_bias)) + second_bias

    or, without `second`, y = residual + activation(first · norm(x · factors) + first_bias). Hidden units stay in the cache,
    unless there is a response norm, which needs those of whole images. The weights are copied into the order in which they
    are used, for the instruction set that is in use at that time; later changes of the tensors have no effect.

    With a patch, the first product is a convolution: it acts on the patches of norm(x), with zeros around the image.

    Args:
        first: (hidden, channels), float32; with a patch, (hidden, channels, rows, columns).
        first_bias: (hidden), or None.
        activation: `none`, `relu`, `gelu` or `gelu_tanh`.
        second: (outputs, hidden), or None.
        second_bias: (outputs), or None.
        norm_eps: if given, each pixel is normalized over its channels (layer norm without factors), with this number added
            to the variance.
        patch: kernel, stride and padding of a convolution; None for a product over the channels of each pixel.
        after: a layer norm over the hidden units, before the activation; only without `second`.
        response: (hidden), the weight of a response norm of the hidden units of each image, as
            `ops.pointwise_reference.response_norm` defines it; None for none. It needs `second`.
        response_eps: epsilon of the response norm.

    Raises:
        ArgumentError: for shapes that do not fit together, tensors that are not float32 on a CPU, an unknown activation, an
            impossible patch, a negative epsilon, or if the native library cannot run.
        NativeMemoryError: if there is no memory for the packed weights.
    """

    def __init__(
        self,
        first: Tensor,
        first_bias: Tensor | None = None,
        activation: str = "none",
        second: Tensor | None = None,
        second_bias: Tensor | None = None,
        norm_eps: float | None = None,
        patch: Patch | None = None,
        after: NormAfter | None = None,
        response: Tensor | None = None,
        response_eps: float = 1e-6,
    ) -> None:
        self._library = native.load()
        if self._library.reason is not None:
            raise ArgumentError(f"products cannot be packed: {self._library.reason}")
        require_activation(activation)
        _check_epsilon("norm_eps", norm_eps)
        _check_epsilon("response_eps", response_eps)
        if patch is None:
            hidden, inputs = checked_matrix("first", first)
        else:
            hidden, inputs = _checked_kernels(first, patch)
        outputs = 0
        if second is not None:
            outputs, _ = checked_matrix("second", second, hidden)
        elif second_bias is not None:
            raise ArgumentError("second_bias is given without second; give both, or add the bias to first_bias")
        elif response is not None:
            raise ArgumentError("response is given without second; give both, or leave the response norm to PyTorch")
        if after is not None and second is not None:
            raise ArgumentError("after is given with second; a norm between two products needs two blocks")
        self.inputs, self.hidden, self.outputs = inputs, hidden, outputs or hidden
        self.activation, self.norm_eps = activation, norm_eps
        self.patch, self.after = patch, after
        scale, shift = (after.scale, after.shift) if after else (None, None)
        if after is not None:
            _check_epsilon("after.eps", after.eps)
        parts = [first, checked_vector("first_bias", first_bias, hidden), second]
        parts += [checked_vector("second_bias", second_bias, outputs), checked_vector("after.scale", scale, hidden)]
        parts += [checked_vector("after.shift", shift, hidden), checked_vector("response", response, hidden)]
        # Contiguous copies must live until the call returns.
        values = [None if part is None else part.detach().resolve_neg().contiguous() for part in parts]
        addresses = [None if value is None else value.data_ptr() for value in values]
        norm = (norm_eps is not None, norm_eps or 0.0)
        geometry = native.PatchGeometry(*((*patch.kernel, *patch.stride, *patch.padding) if patch else ()))
        sizes = inputs, hidden, outputs, ACTIVATIONS[activation]
        normalize_after = (after is not None, after.eps if after else 0.0)
        weights = native.PointwiseWeights(
            *sizes, *norm, *addresses[:4], geometry, *normalize_after, *addresses[4:], response_eps
        )
        calls, packed = self._library.calls, native.Address()
        self._library.check(calls.wk_pointwise_pack(ctypes.byref(weights), ctypes.byref(packed)))
        self._packed, self._run = packed, calls.wk_pointwise_run_at
        weakref.finalize(self, calls.wk_pointwise_free, packed)
        self._prepared: dict[tuple[Any, ...], _Call] = {}

    def __call__(self, x: Tensor, residual: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
        """Compute y.

        Contiguous channels (channels_last) or columns are fast; other strides are read element by element.

        Args:
            x: images (N, channels, height, width) in either layout, or, with any other number of dimensions, the rows of a
                matrix (..., channels), which count as the pixels of one image; float32 on a CPU. Images
                (N, height, width, channels) are passed permuted. With a patch, only images.
            residual: added to the result; has its shape and any strides.
            factors: (N, channels) for images, which all pixels are multiplied by before anything else; None for none.

        Returns:
            (N, outputs, height, width) or (..., outputs), in the layout of `x`. Without gradients. With a patch, height and
            width are `patch.size` of those of `x`.

        Raises:
            ArgumentError: for another shape, type or device, or if gradients are wanted.
            NativeMemoryError: if there is no memory for the working space.
        """
        if factors is not None:
            factors = self._checked_factors(factors, x)
        call = self._prepared.get(_key(x, residual))
        if call is None or not _is_ordinary(x) or (residual is not None and not _is_ordinary(residual)):
            self._check(x, residual)
            if x.dim() > 4:
                rows = None if residual is None else residual.reshape(-1, self.outputs)
                return self(x.reshape(-1, self.inputs), rows).view(*x.shape[:-1], self.outputs)
            x, residual = x.resolve_neg(), None if residual is None else residual.resolve_neg()
            call = self._prepare(x, residual)
        y = torch.empty_strided(call.shape, call.strides)
        if y.numel():
            added = None if residual is None else residual.data_ptr()
            scaled = None if factors is None else factors.data_ptr()
            error = self._run(self._packed, call.description, x.data_ptr(), scaled, added, y.data_ptr())
            if error:
                self._library.check(error)
        return y

    def __deepcopy__(self, _memo: object) -> PackedBlock:
        """Return the same object: packed weights never change."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("packed weights belong to one process and processor; save the layers and pack them again")

    def workspace(self) -> tuple[int, int]:
        """Return the most bytes that a call with PyTorch's current number of threads needs.

        With a response norm, threads also share the hidden units of one image, or of several that have at most 896 pixels
        together, and, if these are too few for all threads, their other activations. These are not counted.

        Returns:
            the bytes of each thread, and those that all share, including the packed weights.
        """
        own, shared = ctypes.c_int64(), ctypes.c_int64()
        function = self._library.calls.wk_pointwise_workspace
        function(self._packed, torch.get_num_threads(), ctypes.byref(own), ctypes.byref(shared))
        return own.value, shared.value

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        """Raise for tensors that this block cannot compute."""
        channels = 1 if x.dim() == 4 else x.dim() - 1
        if self.patch is not None and (x.dim() != 4 or x.shape[1] != self.inputs or min(self.patch.size(*x.shape[2:])) < 1):
            rows, columns = (taps - 2 * pad for taps, pad in zip(self.patch.kernel, self.patch.padding))
            raise ArgumentError(
                f"x has the shape {tuple(x.shape)}, but the block needs (N, {self.inputs}, height, width) of at least "
                f"{max(rows, 1)} rows and {max(columns, 1)} columns"
            )
        if x.dim() == 0 or x.shape[channels] != self.inputs:
            raise ArgumentError(
                f"x has the shape {tuple(x.shape)}, but the block needs (N, {self.inputs}, height, width) or, with another "
                f"number of dimensions, (..., {self.inputs})"
            )
        wanted = list(x.shape)
        wanted[channels] = self.outputs
        if self.patch is not None:
            wanted[2:] = self.patch.size(*x.shape[2:])
        if residual is not None and list(residual.shape) != wanted:
            raise ArgumentError(f"residual has the shape {tuple(residual.shape)}, but the result has {tuple(wanted)}")
        for name, tensor in (("x", x), ("residual", residual)):
            if tensor is not None:
                require_floats(name, tensor)
                require_no_gradients(name, tensor)

    def _checked_factors(self, factors: Tensor, x: Tensor) -> Tensor:
        """Return factors without gaps in memory; raise for those that do not fit the images."""
        if self.patch is not None:
            raise ArgumentError("factors are given to a block with patches; multiply x by them")
        wanted = (x.shape[0], self.inputs)
        if x.dim() != 4 or factors.shape != wanted:
            raise ArgumentError(
                f"factors have the shape {tuple(factors.shape)}, but must be {wanted} for images (N, {self.inputs}, height, "
                f"width); x has the shape {tuple(x.shape)}"
            )
        require_floats("factors", factors)
        require_no_gradients("factors", factors)
        return factors.resolve_neg().contiguous()

    def _prepare(self, x: Tensor, residual: Tensor | None) -> _Call:
        key = _key(x, residual)
        call = self._prepared.get(key)
        if call is None:
            like = torch.empty_like(x, device="meta")
            if x.dim() == 4:
                sides = x.shape[2:] if self.patch is None else self.patch.size(*x.shape[2:])
                y = like.new_empty((x.shape[0], self.outputs, *sides)).contiguous(memory_format=memory_format(x))
            else:
                y = like.new_empty((*x.shape[:-1], self.outputs))
            sizes = y.shape if x.dim() == 4 else (1, 0, *((1,) * (3 - x.dim())), *x.shape[:-1])
            images = [image_of(tensor) for tensor in (x, y if residual is None else residual, y)]
            sides = x.shape[2:] if self.patch else (0, 0)
            description = native.PointwiseCall(torch.get_num_threads(), sizes[0], *sizes[2:], *images, *sides)
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            call = self._prepared[key] = _Call(ctypes.byref(description), tuple(y.shape), y.stride())
        return call


_MOST_PREPARED = 256
"""Number of shapes whose descriptions a block keeps."""


def _key(x: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
    return x.shape, x.stride(), None if residual is None else residual.stride(), torch.get_num_threads()


def _is_ordinary(x: Tensor) -> bool:
    """Return whether a tensor whose shape and strides are known needs no further checks."""
    floats = x.dtype is torch.float32 and x.is_cpu and not x.is_neg()
    return floats and not (x.requires_grad and torch.is_grad_enabled())


def image_of(x: Tensor) -> tuple[int | None, ...]:
    """Return the fields of the C structure of an image: an empty address, which each call fills in, and the strides.

    Rows of a matrix become the pixels of one image. The stride of a dimension of size 1 is arbitrary; 1 is fast.
    """
    strides = [1 if size == 1 else stride for size, stride in zip(x.shape, x.stride())]
    if x.dim() == 4:
        return None, *strides
    *leading, channel = strides
    return None, 0, channel, *((0,) * (2 - len(leading))), *leading


def require_activation(activation: str) -> None:
    """Raise for an unknown activation.

    Raises:
        ArgumentError: which names the known ones.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ArgumentError(f"activation is {activation!r}.{nearest(activation, ACTIVATIONS)} It must be one of {known}.")


def require_no_gradients(name: str, tensor: Tensor) -> None:
    """Raise for a tensor whose gradient is wanted.

    Raises:
        ArgumentError: which names the tensor.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(f"{name} requires gradients, which packed blocks do not compute; use torch.no_grad()")


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


def _checked_kernels(first: Tensor, patch: Patch) -> tuple[int, int]:
    """Return the numbers of output and input channels of a convolution."""
    require_floats("first", first)
    if first.dim() != 4 or first.numel() == 0 or tuple(first.shape[2:]) != tuple(patch.kernel):
        rows, columns = patch.kernel
        raise ArgumentError(
            f"first has the shape {tuple(first.shape)}, but must be (hidden, channels, {rows}, {columns}), none of them 0"
        )
    if min(patch.stride) < 1 or min(patch.padding) < 0:
        raise ArgumentError(f"patch is {patch}, but strides must be at least 1 and paddings at least 0")
    return first.shape[0], first.shape[1]


def _check_epsilon(name: str, eps: float | None) -> None:
    if eps is not None and not 0 <= eps < float("inf"):
        raise ArgumentError(f"{name} is {eps}, but must be None or a finite number that is not negative")
