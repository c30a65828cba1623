"""Gradients of pointwise layers by our kernels: values, what runs, derivatives, compilation and exceptions to the rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tests.native import needs_native, thread_count
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.ops.pointwise_grad import plain_pointwise_weight_grad, pointwise_conv, reasons_against_weight_grad

OPERATOR = torch.ops.widekernel.pointwise_weight_grad.default
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "neither": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}


def arguments(bias: bool = True, inputs: int = 5, outputs: int = 7) -> list[Tensor]:
    tensors = [torch.randn(2, inputs, 4, 6), torch.randn(outputs, inputs, 1, 1)] + [torch.randn(outputs)] * bias
    return [tensor.requires_grad_() for tensor in tensors]


def gradients(function: object, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    y = function(*tensors, *[None] * (3 - len(tensors)))  # type: ignore[operator]
    return list(torch.autograd.grad(y, tensors, grad))


@needs_native
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS)), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_equals_the_definition_in_float64(
    images: int, inputs: int, outputs: int, height: int, width: int, of_x: str, of_grad: str, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = LAYOUTS[of_x](torch.randn(images, inputs, height, width))
    grad = LAYOUTS[of_grad](torch.randn(images, outputs, height, width))
    with ops.trace() as trace:
        got = OPERATOR(x, grad, bias)
    assert [(call.backend, call.shape, call.outputs) for call in trace.pointwise_grads] == [("native", x.shape, outputs)]
    # The bound of a sum of n products in any order, n · 2⁻²⁴ · Σ|x·g|: equal products
    # round the same way, so that their errors add up.
    most = plain_pointwise_weight_grad(x.double().abs(), grad.double().abs(), bias)
    for value, want, sum_of_magnitudes in zip(got, plain_pointwise_weight_grad(x.double(), grad.double(), bias), most):
        assert ((value.double() - want).abs() <= images * height * width * 2**-24 * sum_of_magnitudes).all()


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_and_pieces(threads: int) -> None:
    # Several parts of the weights; several pieces of the pixels, which threads share if there are fewer parts.
    for shape, outputs in (((1, 450, 9, 33), 530), ((2, 20, 30, 30), 33)):
        x, grad = torch.randn(shape), torch.randn(shape[0], outputs, *shape[2:])
        with thread_count(threads):
            first, again = (OPERATOR(x, grad, True) for _ in range(2))
        for value, same, want in zip(first, again, plain_pointwise_weight_grad(x.double(), grad.double(), True)):
            assert torch.equal(value, same)
            assert_close(value.double(), want, rtol=1e-5, atol=1e-3)


@needs_native
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
def test_gradients_are_those_of_the_convolution(layout: str, bias: bool) -> None:
    tensors = arguments(bias)
    tensors[0] = LAYOUTS[layout](tensors[0].detach()).requires_grad_()
    grad = torch.randn(2, 7, 4, 6)
    with ops.trace() as trace:
        got = gradients(pointwise_conv, tensors, grad)
    assert [call.backend for call in trace.pointwise_grads] == ["native"]
    for value, want in zip(got, gradients(F.conv2d, tensors, grad)):
        assert_close(value, want, rtol=1e-5, atol=1e-5)


def test_what_is_left_to_pytorch() -> None:
    x, weight, bias = arguments()
    frozen, grad = weight.detach(), torch.randn(2, 7, 4, 6)

    def bfloat16(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return pointwise_conv(x, weight, bias)

    with ops.trace() as trace:
        torch.autograd.grad(pointwise_conv(x, frozen, bias), [x, bias], grad)
        torch.autograd.grad(pointwise_conv(x.double(), weight.double(), bias.double()), [x, weight], grad.double())
        assert bfloat16(x, weight, bias).dtype is torch.bfloat16
        torch.autograd.grad(bfloat16(x, weight, bias), [weight], grad.bfloat16())
        torch.func.grad(lambda w: pointwise_conv(x.detach(), w, bias.detach()).square().sum())(frozen)
        torch.autograd.grad(pointwise_conv(x, weight, bias), [weight], torch.stack([grad] * 2), is_grads_batched=True)
        with torch.no_grad():
            pointwise_conv(x, weight, bias)
    assert trace.pointwise_grads == []
    assert reasons_against_weight_grad(x.double()) == ["it computes float32, not torch.float64"]
    assert "meta" in reasons_against_weight_grad(x.to("meta"))[0]


def test_images_without_a_batch_and_without_data() -> None:
    x, weight, bias = torch.randn(5, 4, 6), *arguments()[1:]
    for tensors in ([x, weight, bias], [tensor.detach().to("meta").requires_grad_() for tensor in arguments()]):
        y = pointwise_conv(*tensors)
        assert y.shape == F.conv2d(*tensors).shape
        y.sum().backward()


def test_transforms_get_pytorchs_gradients() -> None:
    x, weight, bias = (tensor.detach() for tensor in arguments())

    def slope(w: Tensor) -> Tensor:
        return torch.func.grad(lambda v: pointwise_conv(x, v, bias).square().sum())(w)

    weights = torch.stack([weight, 2 * weight])
    want = torch.stack([slope(w) for w in weights])
    assert_close(torch.vmap(slope)(weights), want)
    torch._dynamo.reset()
    assert_close(torch.compile(torch.vmap(slope), backend="aot_eager")(weights), want)


def test_gradients_of_another_shape_are_refused() -> None:
    x, grad = torch.randn(4, 5, 3, 2), torch.randn(4, 7, 3, 2)
    for other in (grad[:1], grad[:, :, :1], grad[0]):
        with pytest.raises(ArgumentError, match="equal except for the channels"):
            OPERATOR(x, other, True)


def test_only_the_bias_or_only_the_weight() -> None:
    x, weight, bias = arguments()
    y = pointwise_conv(x.detach(), weight, bias.detach())
    (got,) = torch.autograd.grad(y.square().sum(), [weight])
    (want,) = torch.autograd.grad(F.conv2d(x.detach(), weight, bias.detach()).square().sum(), [weight])
    assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_second_derivatives() -> None:
    tensors = [tensor.detach()[:2].double().requires_grad_() for tensor in arguments(inputs=2, outputs=2)]
    assert gradcheck(pointwise_conv, tensors)
    assert gradgradcheck(pointwise_conv, tensors)
    x, weight, bias = arguments()
    penalties = []
    for function in (pointwise_conv, F.conv2d):
        (slope,) = torch.autograd.grad(function(x, weight, bias).square().sum(), [weight], create_graph=True)
        penalties.append(torch.autograd.grad(slope.square().sum(), [x, weight]))
    for got, want in zip(*penalties):
        assert_close(got, want, rtol=1e-4, atol=1e-2)


@needs_native
def test_the_same_compiled() -> None:
    tensors, grad = arguments(), torch.randn(2, 7, 4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(pointwise_conv, fullgraph=True, backend="aot_eager")
    with ops.trace() as trace:
        got = gradients(compiled, tensors, grad)
    assert [call.backend for call in trace.pointwise_grads] == ["native"]
    want = gradients(pointwise_conv, tensors, grad)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator_checks(dtype: torch.dtype, bias: bool) -> None:
    x, grad = torch.randn(2, 5, 4, 6, dtype=dtype), torch.randn(2, 7, 4, 6, dtype=dtype)
    torch.library.opcheck(OPERATOR, (x, grad, bias))
    decomposed = ops.decompositions()[OPERATOR](x, grad, bias)
    for value, want in zip(OPERATOR(x, grad, bias), decomposed):
        assert_close(value, want, rtol=1e-5, atol=1e-4)


def test_operations_are_counted() -> None:
    x, grad = torch.randn(2, 5, 4, 6), torch.randn(2, 7, 4, 6)
    with FlopCounterMode(display=False) as counter:
        OPERATOR(x, grad, True)
    assert counter.get_total_flops() == 2 * 2 * 24 * 5 * 7
