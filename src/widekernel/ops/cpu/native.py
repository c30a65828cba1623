"""The backend of our own kernels for CPUs: float32, bfloat16 and float16, any rectangle, both layouts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.plan import Plan, plan, reason_for_pytorch
from widekernel.ops.problem import DEPTHWISE_SUM, Anchor, Problem, memory_format

name = "native"

_DTYPES = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16, torch.float16: native.FLOAT16}


def reasons_against(problem: Problem) -> list[str]:
    """List why the backend cannot, or should not unasked, compute the problem; empty if it will."""
    reasons = _obstacles(problem)
    if reasons:
        return reasons
    slower = reason_for_pytorch(problem)
    return [slower] if slower else []


def can_run(problem: Problem) -> bool:
    """Whether the backend can run when asked for by name."""
    return not _obstacles(problem)


def _obstacles(problem: Problem) -> list[str]:
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"it runs on a CPU, not on {problem.device}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"it computes float32, bfloat16 and float16, not {problem.dtype}")
    if len(problem.kernels) > native.MOST_RECTS:
        reasons.append(f"it adds up at most {native.MOST_RECTS} kernels, not {len(problem.kernels)}")
    if not reasons and native.load().reason is not None:
        native.warn_once_if_missing()
        reasons.append(str(native.load().reason))
    return reasons


def describe(problem: Problem) -> str:
    """Say how the problem would be computed: the passes, threads and working memory."""
    prepared = prepare(problem)
    if not isinstance(prepared, (PreparedSum, PreparedWeightGrad)):
        return "nothing to compute"
    chosen = prepared.plan
    own, shared = prepared.workspace()
    library = native.load()
    threads = f"{chosen.threads} thread{'s' if chosen.threads > 1 else ''}"
    memory = f"working memory {own / 2**20:.2f} MiB a thread and {shared / 2**20:.2f} MiB shared"
    return f"{chosen}; {library.isa}, {threads}, {memory}"


def prepare(problem: Problem) -> Callable[..., Tensor]:
    """Decide everything that follows from shapes and the number of threads; the result computes calls of that problem."""
    if 0 in problem.shape:
        return _empty_sum if problem.op == DEPTHWISE_SUM else _empty_weight_grad
    chosen = plan(problem, torch.get_num_threads(), native.load().lanes)
    return PreparedSum(problem, chosen) if problem.op == DEPTHWISE_SUM else PreparedWeightGrad(problem, chosen)


class PreparedSum:
    """Calls of `depthwise_sum` of one problem."""

    def __init__(self, problem: Problem, chosen: Plan) -> None:
        self.problem, self.plan = problem, chosen
        self._library = native.load()
        self._run = self._library.calls.wk_depthwise_sum_at
        self._passes = (native.Pass * len(chosen.passes))(
            *[native.Pass(p.piece.rows, p.piece.columns, p.piece.row, p.piece.column, p.method) for p in chosen.passes]
        )
        sizes = zip(problem.kernels, problem.anchors, chosen.targets)
        rects = [native.Rect(None, *size, *anchor, target) for size, anchor, target in sizes]
        self._rects = (native.Rect * len(rects))(*rects)
        self._addresses = native.Address * len(problem.kernels)
        # By the strides of input and output. What is in it never changes, so that threads may share it.
        self._calls: dict[tuple[int, ...], native.Sum] = {}

    def __call__(
        self,
        x: Tensor,
        kernels: Sequence[Tensor],
        anchors: Sequence[Anchor],
        bias: Tensor | None,
        scale: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Compute relu(scale · sum + bias), in the layout of `x`; see `reference.depthwise_sum` and `epilogue`."""
        x = addressable(x)
        y = torch.empty_like(x, memory_format=memory_format(x))
        strides = x.stride() + y.stride()
        call = self._calls.get(strides)
        if call is None:
            call = self._calls.setdefault(strides, self._call(x, y))
        taps = [_floats(kernel) for kernel in kernels]
        addresses = self._addresses(*[tap.data_ptr() for tap in taps])
        scale, bias = (None if v is None else _floats(v) for v in (scale, bias))
        factors = (None if v is None else v.data_ptr() for v in (scale, bias))
        error = self._run(call, x.data_ptr(), y.data_ptr(), addresses, *factors, relu)
        if error:
            self._library.check(error)
        return y

    def workspace(self) -> tuple[int, int]:
        """Give the bytes of working memory of each thread, and those that all share."""
        like = _like(self.problem)
        return _workspace(self._library.calls.wk_sum_workspace, self._call(like, like))

    def _call(self, x: Tensor, y: Tensor) -> native.Sum:
        images = [_image(x), _image(y)]
        parts = (len(self._passes), len(self._rects), self._passes, self._rects)
        return native.Sum(_DTYPES[x.dtype], self.plan.threads, *x.shape, *images, *parts)


class PreparedWeightGrad:
    """Calls of `depthwise_weight_grad` of one problem."""

    def __init__(self, problem: Problem, chosen: Plan) -> None:
        self.problem, self.plan = problem, chosen
        self._library = native.load()
        self._run = self._library.calls.wk_depthwise_weight_grad_at
        self._calls: dict[tuple[int, ...], native.WeightGrad] = {}

    def __call__(self, x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
        """Compute the gradient, (C, 1, kh, kw); see `reference.depthwise_weight_grad`."""
        x, grad = addressable(x), addressable(grad)
        strides = x.stride() + grad.stride()
        call = self._calls.get(strides)
        if call is None:
            call = self._calls.setdefault(strides, self._call(x, grad))
        taps = torch.empty(x.shape[1], 1, *kernel, dtype=torch.float32)
        error = self._run(call, x.data_ptr(), grad.data_ptr(), taps.data_ptr())
        if error:
            self._library.check(error)
        return taps.to(x.dtype)

    def workspace(self) -> tuple[int, int]:
        """Give the bytes of working memory of each thread, and those that all share."""
        like = _like(self.problem)
        return _workspace(self._library.calls.wk_weight_grad_workspace, self._call(like, like))

    def _call(self, x: Tensor, grad: Tensor) -> native.WeightGrad:
        step = self.plan.passes[0]
        extent = (step.piece.rows, step.piece.columns, step.piece.row, step.piece.column, step.method)
        images = [_image(x), _image(grad)]
        whole = (*self.problem.kernels[0], *self.problem.anchors[0])
        return native.WeightGrad(_DTYPES[x.dtype], self.plan.threads, *x.shape, *images, extent, None, *whole)


def _empty_sum(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _empty_weight_grad(x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
    return x.new_zeros(x.shape[1], 1, *kernel)


def _like(problem: Problem) -> Tensor:
    """Give a tensor without data that has the strides of the problem's images."""
    like = torch.empty(problem.shape, dtype=problem.dtype, device="meta")
    return like.contiguous(memory_format=torch.channels_last) if problem.channels_last else like


def _workspace(function: Any, call: Any) -> tuple[int, int]:
    own, shared = ctypes.c_int64(), ctypes.c_int64()
    function(call, ctypes.byref(own), ctypes.byref(shared))
    return own.value, shared.value


def depthwise_sum(x: Tensor, kernels: Sequence[Tensor], anchors: Sequence[Anchor], bias: Tensor | None) -> Tensor:
    """Compute one call without preparation; see `reference.depthwise_sum`."""
    return prepare(Problem.of_sum(x, kernels, anchors))(x, kernels, anchors, bias)


def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel: tuple[int, int], anchor: Anchor) -> Tensor:
    """Compute one call without preparation; see `reference.depthwise_weight_grad`."""
    return prepare(Problem.of_weight_grad(x, kernel, anchor))(x, grad, kernel, anchor)


def addressable(x: Tensor) -> Tensor:
    """Give `x` in a form that the kernels can read: channels or columns next to each other, and no lazy negation."""
    if x.is_neg():
        x = x.resolve_neg()
    strides = x.stride()
    return x if strides[1] == 1 or strides[3] == 1 else x.contiguous()


def _image(x: Tensor) -> tuple[int | None, ...]:
    """Give the address, which each call fills in, and the strides; that of a dimension of size 1 means nothing."""
    image, channel, row, column = x.stride()
    return None, image, 1 if x.shape[1] == 1 else channel, row, 1 if x.shape[3] == 1 else column


def _floats(values: Tensor) -> Tensor:
    """Give contiguous float32 numbers; a kernel is small beside the images."""
    if values.is_neg():
        values = values.resolve_neg()
    if values.dtype != torch.float32:
        values = values.to(torch.float32)
    return values if values.is_contiguous() else values.contiguous()
