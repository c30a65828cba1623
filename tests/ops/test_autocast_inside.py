"""Autocast that is on while an operator runs, but was off when its arguments were made: nothing is converted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.cases import CASES
from widekernel import ops
from widekernel.layers import LargeKernel, Rectangles

CROSS = next(case for case in CASES if case.name == "crossed-strips")
BACKENDS = pytest.mark.parametrize("backend", ["portable", "reference"])


def inside() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def gradients(backend: str, autocast: bool, twice: bool = False) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    x, kernels, bias = CROSS.tensors(torch.float32)
    inputs = [t.requires_grad_() for t in (x, *kernels, bias)]
    y = ops.depthwise_sum(x, kernels, CROSS.anchors, bias, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if not twice:
            return torch.autograd.grad(y, inputs, torch.ones_like(y).cumsum(-1))
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs[:-1])


@BACKENDS
@pytest.mark.parametrize("twice", [False, True], ids=["first", "second"])
def test_backward_under_autocast_of_a_forward_without_it(backend: str, twice: bool) -> None:
    for got, want in zip(gradients(backend, True, twice), gradients(backend, False, twice)):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


@BACKENDS
def test_the_backward_pass_runs_in_the_type_of_the_forward_pass(backend: str) -> None:
    with ops.trace() as trace:
        gradients(backend, True)
    assert {problem.dtype for _, problem in trace.calls} == {torch.float32}


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["data", "trained"])
def test_the_weight_gradient_computes_in_the_type_of_its_arguments(backend: str, dtype: torch.dtype, trained: bool) -> None:
    x, grad = (torch.randn(2, 3, 6, 14, dtype=torch.float64).to(dtype).requires_grad_(trained) for _ in range(2))
    want = ops.depthwise_weight_grad(x, grad, (3, 11), (0, 8), backend=backend)
    with inside():
        got = ops.depthwise_weight_grad(x, grad, (3, 11), (0, 8), backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_the_whole_layer() -> None:
    def step(autocast: bool) -> list[Tensor]:
        torch.manual_seed(3)
        layer = LargeKernel(Rectangles(3, [(13, 3), (3, 13), (3, 3)]), [torch.nn.BatchNorm2d(3) for _ in range(3)])
        y = layer(torch.randn(2, 3, 8, 9))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return list(torch.autograd.grad(y, list(layer.parameters()), torch.ones_like(y).cumsum(-1)))

    for got, want in zip(step(True), step(False)):
        assert torch.equal(got, want)
