"""Products over channels or patches in native code, with weights packed once."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.ops import recording
from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.prepared import addressable
from widekernel.ops.cpu.tensor_checks import (
    checked_kernels,
    checked_matrix,
    checked_vector,
    require_epsilon,
    require_floats,
    require_known,
    require_no_gradients,
)
from widekernel.ops.patch import NormAfter, Patch
from widekernel.ops.problem import memory_format

ACTIVATIONS = {"none": native.NO_ACTIVATION, "relu": native.RELU, "gelu": native.GELU, "gelu_tanh": native.GELU_TANH}
"""The activations by name: `gelu` is defined by the error function, `gelu_tanh` is the form with a hyperbolic tangent."""
PRECISIONS = {"float32": native.FLOAT32, "bfloat16": native.BFLOAT16, "int8": native.INT8}
"""The types of the factors of products by name."""


def reason_against(precision: str) -> str | None:
    """Return why products of this precision, a key of `PRECISIONS`, cannot run here; None if they can."""
    library = native.load()
    if library.reason is not None or precision == "float32":
        return library.reason
    reason = library.calls.wk_why_no_products(PRECISIONS[precision])
    if reason is None:
        return None
    return f"precision is {precision!r}, but {reason.decode()}: use 'float32', which runs on every processor"


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

    In bfloat16, the factors of both products are rounded to the nearest bfloat16, ties to even: the weights when they are
    packed, the (normalized) pixels, and hidden units after activation and response norm. Subnormal factors count as zero.
    Products are exact, and their sums, the norms, the activation, biases and residual remain float32, as do all tensors of
    the interface.

    In int8, weights become whole numbers with a scale for each output, and pixels and hidden units bytes with a scale and a
    zero for each pixel, and for each chunk of up to 512 hidden units, which follow from their range at each call
    (`ops.pointwise_reference` defines all of it). Sums of products are exact, and everything else is float32, as above.

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
        precision: `float32`, or `bfloat16` or `int8` if the processor has these products.

    Raises:
        ArgumentError: for shapes that do not fit together, tensors that are not float32 on a CPU, an unknown activation or
            precision, an impossible patch, a negative epsilon, or if the native library or products of that precision cannot
            run.
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
        precision: str = "float32",
    ) -> None:
        self._library = native.load()
        require_known("activation", activation, ACTIVATIONS)
        require_known("precision", precision, PRECISIONS)
        lacking = reason_against(precision)
        if lacking is not None:
            raise ArgumentError(f"products cannot be packed: {lacking}")
        after_eps = 0.0 if after is None else after.eps
        for name, eps in (("norm_eps", norm_eps), ("after.eps", after_eps), ("response_eps", response_eps)):
            require_epsilon(name, eps)
        hidden, inputs = checked_matrix("first", first) if patch is None else checked_kernels(first, patch)
        _require_parts_that_fit(second, second_bias, response, after)
        outputs = 0 if second is None else checked_matrix("second", second, hidden)[0]
        self.inputs, self.hidden, self.outputs = inputs, hidden, outputs or hidden
        self.activation, self.norm_eps, self.precision = activation, norm_eps, precision
        self.patch, self.after = patch, after
        scale, shift = (None, None) if after is None else (after.scale, after.shift)
        parts = [
            first,
            checked_vector("first_bias", first_bias, hidden),
            second,
            checked_vector("second_bias", second_bias, outputs),
            checked_vector("after.scale", scale, hidden),
            checked_vector("after.shift", shift, hidden),
            checked_vector("response", response, hidden),
        ]
        # Contiguous copies must live until the call returns.
        values = [None if part is None else part.detach().resolve_neg().contiguous() for part in parts]
        addresses = [None if value is None else value.data_ptr() for value in values]
        norm = (norm_eps is not None, norm_eps or 0.0)
        geometry = native.PatchGeometry(*((*patch.kernel, *patch.stride, *patch.padding) if patch else ()))
        sizes = (PRECISIONS[precision], inputs, hidden, outputs, ACTIVATIONS[activation])
        products, between = addresses[:4], addresses[4:]
        weights = native.PointwiseWeights(
            *sizes, *norm, *products, geometry, after is not None, after_eps, *between, response_eps
        )
        calls, packed = self._library.calls, native.Address()
        self._library.check(calls.wk_pointwise_pack(ctypes.byref(weights), ctypes.byref(packed)))
        self._packed, self._run = packed, calls.wk_pointwise_run_at
        weakref.finalize(self, calls.wk_pointwise_free, packed)
        # Multiply-accumulates for each pixel of the result.
        self.macs = first.numel() + (0 if second is None else second.numel())
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
        y = torch.empty_strided(call.shape, call.strides, dtype=torch.float32, device="cpu")
        if y.numel():
            added = None if residual is None else residual.data_ptr()
            scaled = None if factors is None else factors.data_ptr()
            error = self._run(self._packed, call.description, x.data_ptr(), scaled, added, y.data_ptr())
            if error:
                self._library.check(error)
            if recording.OPEN:
                recording.note(native.PRODUCTS_STEP, self, call.description, x, y, factors, residual, packed=self._packed)
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
    for_weight, for_bias = x.new_empty(outputs, inputs), x.new_empty(outputs if bias else 0)
    sizes = torch.get_num_threads(), images, height, width, inputs, outputs
    tensors = [native.Tensor(t.data_ptr(), *image_of(t)[1:]) for t in (x, grad)]
    call = native.PointwiseGrad(*sizes, *tensors, for_weight.data_ptr(), for_bias.data_ptr() if bias else None)
    loaded.check(loaded.calls.wk_pointwise_weight_grad(ctypes.byref(call)))
    return for_weight, for_bias


_MOST_PREPARED = 256
"""Number of shapes whose descriptions a block keeps."""


def _key(x: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
    added = None if residual is None else (residual.shape, residual.stride())
    return x.shape, x.stride(), added, torch.get_num_threads()


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


def _require_parts_that_fit(
    second: Tensor | None, second_bias: Tensor | None, response: Tensor | None, after: NormAfter | None
) -> None:
    if second is None and second_bias is not None:
        raise ArgumentError("second_bias is given without second; give both, or add the bias to first_bias")
    if second is None and response is not None:
        raise ArgumentError("response is given without second; give both, or leave the response norm to PyTorch")
    if second is not None and after is not None:
        raise ArgumentError("after is given with second; a norm between two products needs two blocks")
