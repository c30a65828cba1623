"""Unneeded work is not done: graphs of calls without gradients, and gradients of frozen kernels."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import widekernel
from tests.layers.helpers import randomized
from widekernel import ops
from widekernel.layers import FoldedLargeKernel, LargeKernel, Rectangles

SUM = torch.ops.widekernel.depthwise_sum.default


def targets(module: nn.Module, x: torch.Tensor) -> list[str]:
    with torch.no_grad():
        program = torch.export.export(module, (x,))
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("frozen", [False, True], ids=["parameters", "frozen"])
def test_a_folded_layer_is_one_operator(frozen: bool) -> None:
    layer = randomized(
        LargeKernel(Rectangles(4, [(9, 3), (3, 9), (3, 3)]), [nn.BatchNorm2d(4) for _ in range(3)], identity=True)
    )
    folded = widekernel.fold(layer).requires_grad_(not frozen)
    assert len(folded.kernels) == 2  # more than one, which would be joined for the sake of their gradients
    assert targets(folded, torch.randn(2, 4, 8, 8, dtype=torch.float64)) == [str(SUM)]


def test_a_folded_network_has_one_operator_a_layer() -> None:
    folded = widekernel.fold(timm.create_model("slak_nano"))
    layers = sum(isinstance(module, FoldedLargeKernel) for module in folded.modules())
    found = targets(folded, torch.randn(1, 3, 32, 32))
    assert found.count(str(SUM)) == layers == 5
    assert not [target for target in found if target.startswith("aten.cat")]


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, True), (False, False, False)])
def test_no_gradient_is_computed_for_frozen_kernels(trained: tuple[bool, ...]) -> None:
    sizes = [(7, 3), (3, 7), (1, 1)]
    x = torch.randn(2, 3, 8, 9, requires_grad=True)
    kernels = [torch.randn(3, 1, *size, requires_grad=wanted) for size, wanted in zip(sizes, trained)]
    with ops.trace() as trace:
        ops.depthwise_sum(x, kernels).square().sum().backward()
    of_kernels = [problem.kernels for _, problem in trace.calls if problem.op == "depthwise_weight_grad"]
    assert of_kernels == [(size,) for size, wanted in zip(sizes, trained) if wanted]
    with_all = [kernel.detach().requires_grad_() for kernel in kernels]
    ops.depthwise_sum(x.detach(), with_all).square().sum().backward()
    for kernel, other in zip(kernels, with_all):
        assert torch.equal(kernel.grad, other.grad) if kernel.requires_grad else kernel.grad is None


def test_no_gradient_is_computed_for_an_input_without_one() -> None:
    kernel = torch.randn(3, 1, 5, 5, requires_grad=True)
    with ops.trace() as trace:
        ops.depthwise_sum(torch.randn(2, 3, 8, 9), [kernel]).sum().backward()
    assert [problem.op for _, problem in trace.calls] == ["depthwise_sum", "depthwise_weight_grad"]
