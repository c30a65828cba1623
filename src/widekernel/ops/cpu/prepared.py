"""Prepared calls of the native library: decisions are made once per problem, the rest at each call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.plan import Plan
from widekernel.ops.problem import Anchor, Problem, memory_format

DTYPES = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16, torch.float16: native.FLOAT16}


class _SumCall(NamedTuple):
    """The state shared by calls whose inputs have the same strides. Immutable, so threads may share it.

    Attributes:
        description: a reference to the C structure.
        layout: memory format of the result.
    """

    description: Any
    layout: torch.memory_format


class PreparedSum:
    """Calls of `depthwise_sum` of one problem."""

    def __init__(self, problem: Problem, chosen: Plan) -> None:
        self.problem, self.plan = problem, chosen
        self._library = native.load()
        self._run = self._library.calls.wk_depthwise_sum_at
        self._passes = (native.Pass * len(chosen.passes))(
            *[native.Pass(p.piece.rows, p.piece.columns, p.piece.row, p.piece.column, p.method, 1) for p in chosen.passes]
        )
        sizes = zip(problem.kernels, problem.anchors, chosen.targets)
        rects = [native.Rect(None, *size, *anchor, target) for size, anchor, target in sizes]
        self._rects = (native.Rect * len(rects))(*rects)
        self._addresses = native.Address * len(problem.kernels)
        self._calls: dict[tuple[int, ...], _SumCall] = {}

    def __call__(
        self,
        x: Tensor,
        kernels: Sequence[Tensor],
        anchors: Sequence[Anchor],
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Compute `reference.depthwise_sum` in the layout of `x`."""
        call = None if x.is_neg() else self._calls.get(x.stride())
        if call is None:
            x = addressable(x)
            call = self._calls.get(x.stride()) or self._calls.setdefault(x.stride(), self._call(x))
        y = torch.empty_like(x, memory_format=call.layout)
        # Converted kernels must live until the call returns, so they are kept in a list.
        taps = [_floats(kernel) for kernel in kernels]
        addresses = self._addresses(*[tap.data_ptr() for tap in taps])
        factor = shift = None
        if scale is not None:
            scale = _floats(scale)
            factor = scale.data_ptr()
        if bias is not None:
            bias = _floats(bias)
            shift = bias.data_ptr()
        error = self._run(call.description, x.data_ptr(), y.data_ptr(), addresses, factor, shift, relu)
        if error:
            self._library.check(error)
        return y

    def workspace(self) -> tuple[int, int]:
        """Return the bytes of working memory of each thread, and of the memory that all share."""
        like = _like(self.problem)
        return _workspace(self._library.calls.wk_sum_workspace, self._description(like, like))

    def _call(self, x: Tensor) -> _SumCall:
        layout = memory_format(x)
        y = torch.empty_like(x, memory_format=layout, device="meta")
        return _SumCall(ctypes.byref(self._description(x, y)), layout)

    def _description(self, x: Tensor, y: Tensor) -> native.Sum:
        images = [_image(x), _image(y)]
        parts = (len(self._passes), len(self._rects), self._passes, self._rects)
        return native.Sum(DTYPES[x.dtype], self.plan.threads, *x.shape, *images, *parts)


class PreparedWeightGrad:
    """Calls of `depthwise_weight_grad` of one problem."""

    def __init__(self, problem: Problem, chosen: Plan) -> None:
        self.problem, self.plan = problem, chosen
        self._library = native.load()
        self._run = self._library.calls.wk_depthwise_weight_grad_at
        # Keyed by the strides of both images.
        self._calls: dict[tuple[int, ...], native.WeightGrad] = {}

    def __call__(self, x: Tensor, grad: Tensor, kernel_size: tuple[int, int], anchor: Anchor) -> Tensor:
        """Compute `reference.depthwise_weight_grad`, (C, 1, kh, kw)."""
        x, grad = addressable(x), addressable(grad)
        strides = x.stride() + grad.stride()
        call = self._calls.get(strides)
        if call is None:
            call = self._calls.setdefault(strides, self._description(x, grad))
        taps = torch.empty(x.shape[1], 1, *kernel_size, dtype=torch.float32)
        error = self._run(call, x.data_ptr(), grad.data_ptr(), taps.data_ptr())
        if error:
            self._library.check(error)
        return taps.to(x.dtype)

    def workspace(self) -> tuple[int, int]:
        """Return the bytes of working memory of each thread, and of the memory that all share."""
        like = _like(self.problem)
        return _workspace(self._library.calls.wk_weight_grad_workspace, self._description(like, like))

    def _description(self, x: Tensor, grad: Tensor) -> native.WeightGrad:
        step = self.plan.passes[0]
        extent = (step.piece.rows, step.piece.columns, step.piece.row, step.piece.column, step.method, 1)
        images = [_image(x), _image(grad)]
        whole = (*self.problem.kernels[0], *self.problem.anchors[0])
        return native.WeightGrad(DTYPES[x.dtype], self.plan.threads, *x.shape, *images, extent, None, *whole)


def addressable(x: Tensor) -> Tensor:
    """Return `x` in a form that the kernels can read: contiguous channels or columns, and no lazy negation."""
    if x.is_neg():
        x = x.resolve_neg()
    strides = x.stride()
    return x if strides[1] == 1 or strides[3] == 1 else x.contiguous()


def _like(problem: Problem) -> Tensor:
    """Return a tensor without data that has the strides of the problem's images."""
    like = torch.empty(problem.shape, dtype=problem.dtype, device="meta")
    return like.contiguous(memory_format=torch.channels_last) if problem.channels_last else like


def _workspace(function: Any, description: Any) -> tuple[int, int]:
    own, shared = ctypes.c_int64(), ctypes.c_int64()
    function(description, ctypes.byref(own), ctypes.byref(shared))
    return own.value, shared.value


def _image(x: Tensor) -> tuple[int | None, ...]:
    """Return the fields of the C structure of an image: an empty address, which each call fills in, and the strides.

    The stride of a dimension of size 1 is arbitrary; the kernels need 1 for channels and columns.
    """
    image, channel, row, column = x.stride()
    return None, image, 1 if x.shape[1] == 1 else channel, row, 1 if x.shape[3] == 1 else column


def _floats(values: Tensor) -> Tensor:
    """Return contiguous float32 numbers; converting a kernel is cheap because it is small compared to the images."""
    if values.is_neg():
        values = values.resolve_neg()
    if values.dtype is not torch.float32:
        values = values.to(torch.float32)
    return values if values.is_contiguous() else values.contiguous()
