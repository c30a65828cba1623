"""The calls that tuning compares on the same inputs: our kernels, PyTorch's alternatives, and an exact computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.ops import torch_conv
from widekernel.ops.gpu.kernel_configs import Chip, KernelConfig
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    LAYOUTS,
    Anchor,
    Problem,
)

Call = Callable[[], Any]


def fallback_name(problem: Problem) -> str:
    """Return the name of the PyTorch call that computes a problem, in the same layout, if our kernels do not."""
    return f"PyTorch {problem.layout}" if problem.op != DEPTHWISE_WEIGHT_GRAD else "PyTorch, as a forward convolution"


class Inputs(NamedTuple):
    """The tensors of a problem: images (N, C, H, W), kernels (C, 1, kh, kw), and a gradient shaped like the images."""

    xs: list[Tensor]
    kernels: list[Tensor]
    grad: Tensor | None

    @classmethod
    def random(cls, problem: Problem, device: torch.device) -> Inputs:
        """Draw random tensors, in the layout of the problem."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(problem.dtype)

        layout = LAYOUTS[problem.layout]
        images = len(problem.kernels) if problem.op == DEPTHWISE_SUM_OF_BRANCHES else 1
        xs = [draw(*problem.shape).contiguous(memory_format=layout) for _ in range(images)]
        kernels = [draw(problem.shape[1], 1, *size) for size in problem.kernels]
        is_grad = problem.op == DEPTHWISE_WEIGHT_GRAD
        return cls(xs, kernels, draw(*problem.shape).contiguous(memory_format=layout) if is_grad else None)

    def with_compared_gradients(self) -> Inputs:
        """Return a copy whose gradient is zero except for the compared images, because weight gradients sum over images."""
        if self.grad is None:
            return self
        few, chosen = torch.zeros_like(self.grad), _compared_images(self.grad)
        few[chosen] = self.grad[chosen]
        return self._replace(grad=few)

    def in_layout(self, layout: torch.memory_format) -> Inputs:
        """Return a copy whose images and gradient are stored in another layout."""
        grad = None if self.grad is None else self.grad.contiguous(memory_format=layout)
        return self._replace(xs=[x.contiguous(memory_format=layout) for x in self.xs], grad=grad)

    def in_float64(self) -> Inputs:
        """Return the compared images, and the kernels and gradient that belong to them, in float64."""
        chosen = _compared_images(self.xs[0])
        grad = None if self.grad is None else self.grad[chosen].double()
        return Inputs([x[chosen].double() for x in self.xs], [kernel.double() for kernel in self.kernels], grad)


def _compared_images(x: Tensor) -> list[int]:
    """Return the indices of the images to compare: the first and the last of the timed call."""
    return sorted({0, len(x) - 1})


def kernel_call(problem: Problem, config: KernelConfig, chip: Chip, inputs: Inputs) -> Call:
    """Return the call of our kernels, prepared as at run time."""
    from widekernel.ops.gpu import launch

    xs, kernels, grad = inputs
    anchors = problem.anchors
    if problem.op == DEPTHWISE_WEIGHT_GRAD:
        assert grad is not None
        weight_grad = launch.PreparedWeightGrad(problem, config, chip)
        return lambda: weight_grad(xs[0], grad, problem.kernels[0], anchors[0])
    prepared = launch.PreparedSum(problem, config, chip)
    calls: dict[str, Call] = {
        DEPTHWISE_SUM: lambda: prepared(xs[0], kernels, anchors, None),
        DEPTHWISE_BRANCHES: lambda: prepared.branches(xs[0], kernels, anchors),
        DEPTHWISE_SUM_OF_BRANCHES: lambda: prepared.sum_of_branches(xs, kernels, anchors),
    }
    return calls[problem.op]


def pytorch_calls(problem: Problem, inputs: Inputs) -> dict[str, Call]:
    """Return the PyTorch calls that compute a problem, by name, in both layouts."""
    calls: dict[str, Call] = {}
    if problem.op == DEPTHWISE_WEIGHT_GRAD:
        calls[fallback_name(problem)] = _portable(problem, inputs)
    for name, layout in LAYOUTS.items():
        stored = inputs.in_layout(layout)
        if problem.op != DEPTHWISE_WEIGHT_GRAD:
            calls[f"PyTorch {name}"] = _portable(problem, stored)
        elif _is_centered(problem):
            calls[f"PyTorch {name}"] = _backward(problem, stored)
    return calls


def _portable(problem: Problem, inputs: Inputs) -> Call:
    xs, kernels, grad = inputs
    rects = list(zip(kernels, problem.anchors, problem.dilations))
    dilations = problem.dilations
    if problem.op == DEPTHWISE_SUM:
        return lambda: torch_conv.depthwise_sum(xs[0], kernels, problem.anchors, None, dilations=dilations)
    if problem.op == DEPTHWISE_BRANCHES:
        return lambda: [_one_rectangle(xs[0], *rect) for rect in rects]
    if problem.op == DEPTHWISE_WEIGHT_GRAD:
        assert grad is not None
        of = problem.kernels[0], problem.anchors[0], dilations[0]
        return lambda: torch_conv.depthwise_weight_grad(xs[0], grad, *of)

    def sum_of_branches() -> Tensor:
        parts = (_one_rectangle(x, *rect) for x, rect in zip(xs, rects))
        total = next(parts)
        for part in parts:
            total.add_(part)
        return total

    return sum_of_branches


def _one_rectangle(x: Tensor, kernel: Tensor, anchor: Anchor, dilation: int) -> Tensor:
    return torch_conv.depthwise_sum(x, [kernel], [anchor], None, dilations=(dilation,))


def _is_centered(problem: Problem) -> bool:
    """Return whether a convolution that pads both sides equally has this gradient."""
    (kh, kw), anchor = problem.kernels[0], problem.anchors[0]
    return kh % 2 == kw % 2 == 1 and anchor == (kh // 2, kw // 2)


def _backward(problem: Problem, inputs: Inputs) -> Call:
    (x,), (kernel,), grad = inputs
    dilation, channels = problem.dilations[0], problem.shape[1]
    padding = [dilation * taps for taps in problem.anchors[0]]
    backward = torch.ops.aten.convolution_backward
    mask = [False, True, False]
    return lambda: backward(grad, x, kernel, None, [1, 1], padding, [dilation] * 2, False, [0, 0], channels, mask)[1]


def exact_outputs(problem: Problem, inputs: Inputs) -> list[Tensor]:
    """Compute, in float64 with PyTorch's convolutions, the outputs to compare."""
    return _listed(_portable(problem, inputs.in_float64())())


def compared_outputs(problem: Problem, result: Any) -> list[Tensor]:
    """Return the part of a result to compare."""
    outputs = _listed(result)
    return outputs if problem.op == DEPTHWISE_WEIGHT_GRAD else [y[_compared_images(y)] for y in outputs]


def fill_free_memory_with_nan(problem: Problem, device: torch.device) -> None:
    """Fill memory that outputs are likely to reuse with NaN: it may hold correct results of an earlier candidate."""
    shape = (problem.shape[1], 1, *problem.kernels[0]) if problem.op == DEPTHWISE_WEIGHT_GRAD else problem.shape
    outputs = len(problem.kernels) if problem.op == DEPTHWISE_BRANCHES else 1
    held = [torch.full(shape, math.nan, dtype=problem.dtype, device=device) for _ in range(outputs + 1)]
    held.clear()


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
