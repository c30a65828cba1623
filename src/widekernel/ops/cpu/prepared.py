"""Prepared calls of the native library: decisions are made once per problem, the rest at each call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.ops import recording
from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.plan import Pass, Plan
from widekernel.ops.problem import DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES, Anchor, Problem, memory_format

PACKED = "packed"
"""The form of a sum whose image is copied as a whole before it is computed."""
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
    """Calls of `depthwise_sum`, or of an operator of several branches, of one problem."""

    def __init__(self, problem: Problem, chosen: Plan) -> None:
        self.problem, self.plan = problem, chosen
        self._library = native.load()
        self._run = self._library.calls.wk_depthwise_sum_at
        branches = len(problem.kernels)
        self._inputs = branches if problem.op == DEPTHWISE_SUM_OF_BRANCHES else 1
        self._outputs = branches if problem.op == DEPTHWISE_BRANCHES else 1
        # Each branch has a pass of its own.
        ends = [(b if self._inputs > 1 else 0, b if self._outputs > 1 else 0) for b in range(len(chosen.passes))]
        passes = [_pass(step, *ends[b]) for b, step in enumerate(chosen.passes)]
        self._passes = (native.Pass * len(passes))(*passes)
        rows = zip(problem.kernels, problem.anchors, problem.dilations, chosen.targets)
        rects = [native.Rect(None, *size, *anchor, dilation, target) for size, anchor, dilation, target in rows]
        self._rects = (native.Rect * len(rects))(*rects)
        self._addresses = native.Address * branches
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
        error = self._run(call.description, x.data_ptr(), y.data_ptr(), addresses, factor, shift, relu, None)
        if error:
            self._library.check(error)
        if recording.OPEN:
            constants = (*taps, *[values for values in (scale, bias) if values is not None])
            made = native.DEPTHWISE_STEP, self, call.description, x, y
            recording.note(*made, taps=addresses, constants=constants, scale=factor, shift=shift, relu=relu)
        return y

    def branches(self, x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> list[Tensor]:
        """Compute `depthwise_branches` in the layout of `x`."""
        return self._run_branches([addressable(x)], kernels)

    def sum_of_branches(self, xs: Sequence[Tensor], kernels: Sequence[Tensor], anchors: Sequence[Anchor]) -> Tensor:
        """Compute `depthwise_sum_of_branches` in the layout of the first input."""
        xs = [addressable(x) for x in xs]
        if any(x.stride() != xs[0].stride() for x in xs):
            xs = [x.contiguous(memory_format=memory_format(xs[0])) for x in xs]
        return self._run_branches(xs, kernels)[0]

    def _run_branches(self, xs: Sequence[Tensor], kernels: Sequence[Tensor]) -> list[Tensor]:
        x = xs[0]
        call = self._calls.get(x.stride()) or self._calls.setdefault(x.stride(), self._call(x))
        ys = [torch.empty_like(x, memory_format=call.layout) for _ in range(self._outputs)]
        taps = [_floats(kernel) for kernel in kernels]
        inputs = (native.Address * len(xs))(*[x.data_ptr() for x in xs])
        outputs = (native.Address * len(ys))(*[y.data_ptr() for y in ys])
        addresses = self._addresses(*[tap.data_ptr() for tap in taps])
        self._library.check(self._library.calls.wk_depthwise_branches_at(call.description, inputs, outputs, addresses))
        return ys

    def workspace(self) -> tuple[int, int]:
        """Return the bytes of working memory of each thread, and of the memory that all share."""
        like = _like(self.problem)
        return _workspace(self._library.calls.wk_sum_workspace, self._description(like, like))

    def form(self) -> str:
        """Return how the image passes through memory, without `relu`: "packed", "in place" or "rolling rows"."""
        like = _like(self.problem)
        return str(self._library.calls.wk_sum_form(self._description(like, like)).decode())

    def _call(self, x: Tensor) -> _SumCall:
        layout = memory_format(x)
        return self._prepared_call(x, torch.empty_like(x, memory_format=layout, device="meta"), layout)

    def _prepared_call(self, x: Tensor, y: Tensor, layout: torch.memory_format) -> _SumCall:
        return _SumCall(ctypes.byref(self._description(x, y)), layout)

    def _description(self, x: Tensor, y: Tensor) -> native.Sum:
        images = [_image(x), _image(y)]
        ends = self._inputs, self._outputs, None, None
        parts = (len(self._passes), len(self._rects), self._passes, self._rects)
        return native.Sum(DTYPES[x.dtype], self.plan.threads, *self.problem.shape, *images, *ends, *parts)


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
        taps = torch.empty(x.shape[1], 1, *kernel_size, dtype=torch.float32, device="cpu")
        error = self._run(call, x.data_ptr(), grad.data_ptr(), taps.data_ptr())
        if error:
            self._library.check(error)
        return taps.to(x.dtype)

    def workspace(self) -> tuple[int, int]:
        """Return the bytes of working memory of each thread, and of the memory that all share."""
        like = _like(self.problem)
        return _workspace(self._library.calls.wk_weight_grad_workspace, self._description(like, like))

    def _description(self, x: Tensor, grad: Tensor) -> native.WeightGrad:
        images = [_image(x), _image(grad)]
        whole = (*self.problem.kernels[0], *self.problem.anchors[0], self.problem.dilations[0])
        step = _pass(self.plan.passes[0])
        return native.WeightGrad(DTYPES[x.dtype], self.plan.threads, *x.shape, *images, step, None, *whole)


def _pass(step: Pass, source: int = 0, target: int = 0) -> native.Pass:
    piece = step.piece
    return native.Pass(piece.rows, piece.columns, piece.row, piece.column, step.method, piece.dilation, source, target)


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
