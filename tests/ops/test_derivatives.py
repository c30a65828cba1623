"""Derivatives: numerical checks of first and second order, function transforms, and what must raise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from tests.ops.cases import assert_close, definition
from tests.ops.derivatives import (
    MAPPED,
    assert_equal_gradients,
    assert_equal_hessians,
    assert_equal_per_sample_gradients,
    assert_equal_third_derivatives,
    assert_equal_vmap,
    assert_forward_mode_raises,
    assert_no_graph_without_gradients,
    assert_vectorized_jacobian,
)
from widekernel import ops

Dilations = tuple[int, int] | None
ANCHORS = [(0, 3), (1, 0)]
GAPS = pytest.mark.parametrize("dilations", [None, (1, 2), (2, 1)], ids=str)
NAMES = ("x", "wide", "square", "bias")


def arguments(batch: int | None = None) -> list[Tensor]:
    """Return x, two kernels and a bias, each with a leading dimension if `batch` is given."""
    lead = () if batch is None else (batch,)
    shapes = [(2, 2, 3, 3), (2, 1, 2, 4), (2, 1, 2, 2), (2,)]
    return [torch.randn(*lead, *shape, dtype=torch.float64) for shape in shapes]


def ours(x: Tensor, wide: Tensor, square: Tensor, bias: Tensor, dilations: Dilations = None) -> Tensor:
    return ops.depthwise_sum(x, [wide, square], ANCHORS, bias, dilations=dilations)


def theirs(x: Tensor, wide: Tensor, square: Tensor, bias: Tensor, dilations: Dilations = None) -> Tensor:
    return definition(x, [wide, square], ANCHORS, bias, dilations)


def both(dilations: Dilations) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return our function and PyTorch's, with dilations."""
    return partial(ours, dilations=dilations), partial(theirs, dilations=dilations)


@GAPS
@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients_of_the_sum(check, backend: str, dilations: Dilations) -> None:
    inputs = [t.requires_grad_() for t in arguments()]

    def function(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return ops.depthwise_sum(x, [a, b], ANCHORS, c, backend=backend, dilations=dilations)

    assert check(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients_of_the_weight_gradient(check, backend: str, dilation: int) -> None:
    x, g = (torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x: Tensor, g: Tensor) -> Tensor:
        return ops.depthwise_weight_grad(x, g, (2, 4), (0, 3), backend=backend, dilation=dilation)

    assert check(function, [x, g], fast_mode=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_numerical_gradients_with_a_wide_kernel(layout: str) -> None:
    """Wide kernels take another path through the portable backend than narrow ones."""
    x = torch.randn(1, 2, 3, 5, dtype=torch.float64)
    x = x.contiguous(memory_format=getattr(torch, layout.replace("contiguous", "contiguous_format")))
    kernel = torch.randn(2, 1, 1, 11, dtype=torch.float64)
    inputs = (x.requires_grad_(), kernel.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, k: ops.depthwise_sum(x, [k], [(0, 7)]), inputs)
    assert torch.autograd.gradgradcheck(lambda x, k: ops.depthwise_sum(x, [k], [(0, 7)]), inputs)


@GAPS
def test_func_grad(dilations: Dilations) -> None:
    assert_equal_gradients(*both(dilations), arguments())


def mapped_id(which: tuple[bool, ...]) -> str:
    return "+".join(name for name, mapped in zip(NAMES, which) if mapped)


@pytest.mark.parametrize("which", MAPPED, ids=mapped_id)
def test_per_sample_gradients(which: tuple[bool, ...]) -> None:
    assert_equal_per_sample_gradients(ours, theirs, which, arguments(3), arguments())


@pytest.mark.parametrize("which", MAPPED, ids=mapped_id)
def test_vmap_of_the_outputs(which: tuple[bool, ...]) -> None:
    assert_equal_vmap(ours, theirs, which, arguments(3), arguments())


@pytest.mark.parametrize("which", [(True,) * 4, (True, False, False, False), (False, True, False, False)], ids=mapped_id)
def test_function_transforms_of_dilated_kernels(which: tuple[bool, ...]) -> None:
    functions = both((2, 1))
    assert_equal_vmap(*functions, which, arguments(3), arguments())
    assert_equal_per_sample_gradients(*functions, which, arguments(3), arguments())


def test_second_derivatives_of_dilated_kernels() -> None:
    args = [t[:, :1] if t.dim() == 4 and t.shape[1] == 2 else t[:1] for t in arguments()]
    for first, second in ((0, 0), (0, 1), (2, 0), (1, 2)):
        assert_equal_hessians(*both((2, 1)), args, first, second)


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)], ids=["both", "x", "gradient"])
def test_vmap_of_the_weight_gradient(which: tuple[bool, bool]) -> None:
    x, g = (torch.randn(*([3] if mapped else []), 2, 2, 3, 3, dtype=torch.float64) for mapped in which)
    for step in (1, 2):
        of = partial(ops.depthwise_weight_grad, kernel_size=(2, 4), anchor=(0, 3), dilation=step)
        got = vmap(of, tuple(0 if m else None for m in which))(x, g)
        for i in range(3):
            args = [t[i] if mapped else t for mapped, t in zip(which, (x, g))]
            assert_close(got[i], of(*args, backend="reference"))


def test_nested_vmap() -> None:
    x, kernels, squares, biases = torch.randn(3, 2, 2, 3, 3, dtype=torch.float64), *arguments(2)[1:]
    got = vmap(vmap(ours, (None, 0, 0, 0)), (0, None, None, None))(x, kernels, squares, biases)
    want = [torch.stack([theirs(one, *rest) for rest in zip(kernels, squares, biases)]) for one in x]
    assert_close(got, torch.stack(want))


@pytest.mark.parametrize("second", range(4), ids=NAMES)
@pytest.mark.parametrize("first", range(4), ids=NAMES)
def test_hessians(first: int, second: int) -> None:
    args = [t[:, :1] if t.dim() == 4 and t.shape[1] == 2 else t[:1] for t in arguments()]
    assert_equal_hessians(ours, theirs, args, first, second)


@pytest.mark.parametrize("dilations", [None, (2, 1)], ids=str)
@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("position", range(4), ids=NAMES)
def test_vectorized_jacobians(position: int, backend: str, dilations: Dilations) -> None:
    args = arguments()

    def of_one(value: Tensor) -> Tensor:
        x, wide, square, bias = (*args[:position], value, *args[position + 1 :])
        return ops.depthwise_sum(x, [wide, square], ANCHORS, bias, backend=backend, dilations=dilations).sin()

    assert_vectorized_jacobian(of_one, args[position])


@pytest.mark.parametrize("position", [0, 1], ids=["x", "gradient"])
def test_vectorized_jacobians_of_the_weight_gradient(position: int) -> None:
    args = [torch.randn(2, 2, 3, 3, dtype=torch.float64) for _ in range(2)]

    def of_one(value: Tensor) -> Tensor:
        x, g = (value, args[1]) if position == 0 else (args[0], value)
        return ops.depthwise_weight_grad(x, g, (2, 4), (0, 3), dilation=2)

    jacobian = torch.autograd.functional.jacobian
    assert_close(jacobian(of_one, args[position], vectorize=True), jacobian(of_one, args[position]))


def test_third_derivatives() -> None:
    assert_equal_third_derivatives(ours, theirs, [t.requires_grad_() for t in arguments()])


def test_per_sample_gradients_of_a_layer() -> None:
    from widekernel.layers import DepthwiseConv2d

    layer = DepthwiseConv2d(2, 2, 3, padding=1, groups=2).double()
    parameters = dict(layer.named_parameters())
    images = torch.randn(4, 2, 5, 5, dtype=torch.float64)

    def square(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(layer, parameters, (image,)).square().sum()

    got = vmap(grad(square), (None, 0))({k: v.detach() for k, v in parameters.items()}, images)
    for i, image in enumerate(images):
        layer.zero_grad()
        layer(image).square().sum().backward()
        for name, parameter in parameters.items():
            assert_close(got[name][i], parameter.grad)


@pytest.mark.parametrize("position", range(4), ids=NAMES)
def test_forward_mode_raises(position: int) -> None:
    assert_forward_mode_raises(ours, arguments(), position)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda t: ops.depthwise_weight_grad(t, arguments()[0], (3, 3)), (arguments()[0],), (arguments()[0],))


def test_no_graph_without_gradients() -> None:
    assert_no_graph_without_gradients(ours, arguments())
