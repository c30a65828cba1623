"""The calls that tuning compares: our kernels in a configuration, PyTorch's ways, and what is exact, on the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widekernel.ops import torch_conv
from widekernel.ops.gpu.configs import Chip, Config
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    LAYOUTS,
    Problem,
)

Call = Callable[[], Any]


def in_place(problem: Problem) -> str:
    """Name the way of PyTorch's that computes a problem which we leave to it: the portable backend, in the same layout."""
    layout = "NHWC" if problem.channels_last else "NCHW"
    return f"PyTorch {layout}" if problem.op != DEPTHWISE_WEIGHT_GRAD else "PyTorch, as a forward convolution"


class Numbers(NamedTuple):
    """What a problem is computed with: images (N, C, H, W), kernels (C, 1, kh, kw), gradients like the images."""

    xs: list[Tensor]
    kernels: list[Tensor]
    grad: Tensor | None

    @classmethod
    def drawn(cls, problem: Problem, device: torch.device) -> Numbers:
        """Draw them, in the layout of the problem."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(problem.dtype)

        layout = LAYOUTS["NHWC" if problem.channels_last else "NCHW"]
        images = len(problem.kernels) if problem.op == DEPTHWISE_SUM_OF_BRANCHES else 1
        xs = [draw(*problem.shape).contiguous(memory_format=layout) for _ in range(images)]
        kernels = [draw(problem.shape[1], 1, *size) for size in problem.kernels]
        is_grad = problem.op == DEPTHWISE_WEIGHT_GRAD
        return cls(xs, kernels, draw(*problem.shape).contiguous(memory_format=layout) if is_grad else None)

    def with_few_gradients(self) -> Numbers:
        """Give the same with a gradient of zero but for the images that are compared: weight gradients sum over images."""
        if self.grad is None:
            return self
        few, chosen = torch.zeros_like(self.grad), _chosen(self.grad)
        few[chosen] = self.grad[chosen]
        return self._replace(grad=few)

    def in_layout(self, layout: torch.memory_format) -> Numbers:
        """Give the same with images and gradients stored in another layout."""
        grad = None if self.grad is None else self.grad.contiguous(memory_format=layout)
        return self._replace(xs=[x.contiguous(memory_format=layout) for x in self.xs], grad=grad)

    def exactly(self) -> Numbers:
        """Give the images that are compared, and what belongs to them, in float64."""
        chosen = _chosen(self.xs[0])
        grad = None if self.grad is None else self.grad[chosen].double()
        return Numbers([x[chosen].double() for x in self.xs], [kernel.double() for kernel in self.kernels], grad)


def _chosen(x: Tensor) -> list[int]:
    """Number the images that are compared: the first and the last of the very call that is timed."""
    return sorted({0, len(x) - 1})


def our_call(problem: Problem, config: Config, chip: Chip, numbers: Numbers) -> Call:
    """Give the call of our kernels, prepared as it is at run time."""
    from widekernel.ops.gpu import launch

    xs, kernels, grad = numbers
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


def pytorchs_calls(problem: Problem, numbers: Numbers) -> dict[str, Call]:
    """Give PyTorch's ways of computing a problem, in both layouts."""
    ways: dict[str, Call] = {}
    if problem.op == DEPTHWISE_WEIGHT_GRAD:
        ways[in_place(problem)] = _portable(problem, numbers)
    for name, layout in LAYOUTS.items():
        stored = numbers.in_layout(layout)
        if problem.op != DEPTHWISE_WEIGHT_GRAD:
            ways[f"PyTorch {name}"] = _portable(problem, stored)
        elif _is_centred(problem):
            ways[f"PyTorch {name}"] = _backward(problem, stored)
    return ways


def _portable(problem: Problem, numbers: Numbers) -> Call:
    xs, kernels, grad = numbers
    rects = list(zip(kernels, problem.anchors))
    if problem.op == DEPTHWISE_SUM:
        return lambda: torch_conv.depthwise_sum(xs[0], kernels, problem.anchors, None)
    if problem.op == DEPTHWISE_BRANCHES:
        return lambda: [torch_conv.depthwise_sum(xs[0], [kernel], [anchor], None) for kernel, anchor in rects]
    if problem.op == DEPTHWISE_WEIGHT_GRAD:
        assert grad is not None
        return lambda: torch_conv.depthwise_weight_grad(xs[0], grad, problem.kernels[0], problem.anchors[0])

    def add_up() -> Tensor:
        parts = (torch_conv.depthwise_sum(x, [kernel], [anchor], None) for x, (kernel, anchor) in zip(xs, rects))
        total = next(parts)
        for part in parts:
            total.add_(part)
        return total

    return add_up


def _is_centred(problem: Problem) -> bool:
    """Whether the gradient is one of a convolution that pads both sides alike."""
    (kh, kw), anchor = problem.kernels[0], problem.anchors[0]
    return kh % 2 == kw % 2 == 1 and anchor == (kh // 2, kw // 2)


def _backward(problem: Problem, numbers: Numbers) -> Call:
    (x,), (kernel,), grad = numbers
    padding, channels = list(problem.anchors[0]), problem.shape[1]
    backward = torch.ops.aten.convolution_backward
    mask = [False, True, False]
    return lambda: backward(grad, x, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], channels, mask)[1]


def exact(problem: Problem, numbers: Numbers) -> list[Tensor]:
    """Compute in float64, by PyTorch's convolutions, what is compared."""
    return _listed(_portable(problem, numbers.exactly())())


def compared(problem: Problem, result: Any) -> list[Tensor]:
    """Give of a result what is compared."""
    outputs = _listed(result)
    return outputs if problem.op == DEPTHWISE_WEIGHT_GRAD else [y[_chosen(y)] for y in outputs]


def poison(problem: Problem, device: torch.device) -> None:
    """Fill memory that outputs are going to get with NaN: it may hold the right results of the candidate before."""
    shape = (problem.shape[1], 1, *problem.kernels[0]) if problem.op == DEPTHWISE_WEIGHT_GRAD else problem.shape
    outputs = len(problem.kernels) if problem.op == DEPTHWISE_BRANCHES else 1
    held = [torch.full(shape, math.nan, dtype=problem.dtype, device=device) for _ in range(outputs + 1)]
    held.clear()


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
