"""Products over channels in native code: y = residual + second · activation(first · norm(x)), with weights packed once."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.errors import ArgumentError, nearest
from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.prepared import addressable
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

        y = residual + second · activation(first · norm(x) + first_bias) + second_bias

    or, without `second`, y = residual + activation(first · norm(x) + first_bias). Hidden units stay in the cache. The
    weights are copied into the order in which they are used, for the instruction set that is in use at that time; later
    changes of the tensors have no effect.

    Args:
        first: (hidden, channels), float32.
        first_bias: (hidden), or None.
        activation: `none`, `relu`, `gelu` or `gelu_tanh`.
        second: (outputs, hidden), or None.
        second_bias: (outputs), or None.
        norm_eps: if given, each pixel is normalized over its channels (layer norm without factors), with this number added
            to the variance.

    Raises:
        ArgumentError: for shapes that do not fit together, tensors that are not float32 on a CPU, an unknown activation, or
            if the native library cannot run.
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
    ) -> None:
        self._library = native.load()
        if self._library.reason is not None:
            raise ArgumentError(f"products cannot be packed: {self._library.reason}")
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ArgumentError(
                f"activation is {activation!r}.{nearest(activation, ACTIVATIONS)} It must be one of {known}."
            )
        if norm_eps is not None and not 0 <= norm_eps < float("inf"):
            raise ArgumentError(f"norm_eps is {norm_eps}, but must be None or a finite number that is not negative")
        hidden, inputs = _checked_matrix("first", first)
        outputs = 0
        if second is not None:
            outputs, _ = _checked_matrix("second", second, hidden)
        elif second_bias is not None:
            raise ArgumentError("second_bias is given without second; give both, or add the bias to first_bias")
        self.inputs, self.hidden, self.outputs = inputs, hidden, outputs or hidden
        self.activation, self.norm_eps = activation, norm_eps
        sizes = (("first_bias", first_bias, hidden), ("second_bias", second_bias, outputs))
        parts = [first, _checked_bias(*sizes[0]), second, _checked_bias(*sizes[1])]
        # Contiguous copies must live until the call returns.
        values = [None if part is None else part.detach().resolve_neg().contiguous() for part in parts]
        addresses = [None if value is None else value.data_ptr() for value in values]
        norm = (norm_eps is not None, norm_eps or 0.0)
        weights = native.PointwiseWeights(inputs, hidden, outputs, ACTIVATIONS[activation], *norm, *addresses)
        calls, packed = self._library.calls, native.Address()
        self._library.check(calls.wk_pointwise_pack(ctypes.byref(weights), ctypes.byref(packed)))
        self._packed, self._run = packed, calls.wk_pointwise_run_at
        weakref.finalize(self, calls.wk_pointwise_free, packed)
        self._prepared: dict[tuple[Any, ...], _Call] = {}

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute y.

        Contiguous channels (channels_last) or columns are fast; other strides are read element by element.

        Args:
            x: images (N, channels, height, width) in either layout, or, with any other number of dimensions, the rows of a
                matrix (..., channels); float32 on a CPU. Images (N, height, width, channels) are passed permuted.
            residual: added to the result; has its shape and any strides.

        Returns:
            (N, outputs, height, width) or (..., outputs), in the layout of `x`. Without gradients.

        Raises:
            ArgumentError: for another shape, type or device, or if gradients are wanted.
            NativeMemoryError: if there is no memory for the working space.
        """
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
            error = self._run(self._packed, call.description, x.data_ptr(), added, y.data_ptr())
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
        if x.dim() == 0 or x.shape[channels] != self.inputs:
            raise ArgumentError(
                f"x has the shape {tuple(x.shape)}, but the block needs (N, {self.inputs}, height, width) or, with another "
                f"number of dimensions, (..., {self.inputs})"
            )
        wanted = list(x.shape)
        wanted[channels] = self.outputs
        if residual is not None and list(residual.shape) != wanted:
            raise ArgumentError(f"residual has the shape {tuple(residual.shape)}, but the result has {tuple(wanted)}")
        for name, tensor in (("x", x), ("residual", residual)):
            if tensor is not None:
                _require_floats(name, tensor)
                if tensor.requires_grad and torch.is_grad_enabled():
                    raise ArgumentError(
                        f"{name} requires gradients, which packed blocks do not compute; use torch.no_grad()"
                    )

    def _prepare(self, x: Tensor, residual: Tensor | None) -> _Call:
        key = _key(x, residual)
        call = self._prepared.get(key)
        if call is None:
            like = torch.empty_like(x, device="meta")
            if x.dim() == 4:
                y = like.new_empty((x.shape[0], self.outputs, *x.shape[2:])).contiguous(memory_format=memory_format(x))
            else:
                y = like.new_empty((*x.shape[:-1], self.outputs))
            sizes = x.shape if x.dim() == 4 else (1, 0, *((1,) * (3 - x.dim())), *x.shape[:-1])
            images = [_image(tensor) for tensor in (x, y if residual is None else residual, y)]
            description = native.PointwiseCall(torch.get_num_threads(), sizes[0], *sizes[2:], *images)
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            call = self._prepared[key] = _Call(ctypes.byref(description), tuple(y.shape), y.stride())
        return call


def weight_grad(x: Tensor, grad: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the weight and the bias of a pointwise layer.

        weight[o, c] = Σ grad[n, o, i, j] · x[n, c, i, j],  bias[o] = Σ grad[n, o, i, j]

    Args:
        x: (N, C, H, W), not empty, float32 on a CPU.
        grad: (N, C', H, W), the gradient of the layer's output, float32 on a CPU.
        bias: whether to compute the gradient of the bias, too.

    Returns:
        (C', C), and (C',) or an empty tensor.

    Raises:
        NativeMemoryError: if there is no memory for the working space.
    """
    loaded = native.load()
    x, grad = addressable(x), addressable(grad)
    images, inputs, height, width = x.shape
    outputs = grad.shape[1]
    for_weight, for_bias = torch.empty(outputs, inputs), torch.empty(outputs if bias else 0)
    sizes = torch.get_num_threads(), images, height, width, inputs, outputs
    tensors = [native.Tensor(t.data_ptr(), *_image(t)[1:]) for t in (x, grad)]
    call = native.PointwiseGrad(*sizes, *tensors, for_weight.data_ptr(), for_bias.data_ptr() if bias else None)
    loaded.check(loaded.calls.wk_pointwise_weight_grad(ctypes.byref(call)))
    return for_weight, for_bias


_MOST_PREPARED = 256
"""Number of shapes whose descriptions a block keeps."""


def _key(x: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
    return x.shape, x.stride(), None if residual is None else residual.stride(), torch.get_num_threads()


def _is_ordinary(x: Tensor) -> bool:
    """Return whether a tensor whose shape and strides are known needs no further checks."""
    floats = x.dtype is torch.float32 and x.is_cpu and not x.is_neg()
    return floats and not (x.requires_grad and torch.is_grad_enabled())


def _image(x: Tensor) -> tuple[int | None, ...]:
    """Return the fields of the C structure of an image: an empty address, which each call fills in, and the strides.

    Rows of a matrix become the pixels of one image. The stride of a dimension of size 1 is arbitrary; 1 is fast.
    """
    strides = [1 if size == 1 else stride for size, stride in zip(x.shape, x.stride())]
    if x.dim() == 4:
        return None, *strides
    *leading, channel = strides
    return None, 0, channel, *((0,) * (2 - len(leading))), *leading


def _require_floats(name: str, tensor: Tensor) -> None:
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        kind = f"{tensor.dtype} on {tensor.device}, {tensor.layout}"
        raise ArgumentError(f"{name} is {kind}, but must be a strided torch.float32 tensor on a CPU")


def _checked_matrix(name: str, matrix: Tensor, columns: int | None = None) -> tuple[int, int]:
    """Return rows and columns of a matrix of weights."""
    _require_floats(name, matrix)
    fits = matrix.dim() == 2 and matrix.numel() > 0 and columns in (None, matrix.shape[1])
    if not fits:
        wanted = f"(outputs, {columns})" if columns else "(hidden, channels)"
        raise ArgumentError(f"{name} has the shape {tuple(matrix.shape)}, but must be {wanted}, none of them 0")
    return matrix.shape[0], matrix.shape[1]


def _checked_bias(name: str, bias: Tensor | None, size: int) -> Tensor | None:
    if bias is not None:
        _require_floats(name, bias)
        if tuple(bias.shape) != (size,):
            raise ArgumentError(f"{name} has the shape {tuple(bias.shape)}, but must be ({size},)")
    return bias
