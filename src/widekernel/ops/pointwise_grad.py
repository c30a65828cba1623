"""A pointwise convolution in training: PyTorch's convolution, with the gradients of weight and bias from our kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from widekernel.errors import ArgumentError
from widekernel.ops import call_trace
from widekernel.ops.call_trace import PointwiseGradCall
from widekernel.ops.cpu import library, pointwise
from widekernel.ops.eager import are_ordinary, is_ordinary_call, is_unobserved_call
from widekernel.ops.registration import LIBRARY, has_batched_gradients, register_fake, register_implementation

LIBRARY.define(
    "pointwise_weight_grad(Tensor x, Tensor grad, bool bias) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with a 1x1 kernel, as `F.conv2d` does.

    If a gradient of the weight is wanted, our kernels compute it and that of the bias, with tiles of the weight in
    registers. On the shapes of ConvNeXt, SLaK and RepLKNet they took 0.66 to 0.97 of PyTorch's time (AVX-512). The forward
    pass and the input gradient are PyTorch's. Differentiable to any order. PyTorch computes higher derivatives, and
    everything that `reasons_against_weight_grad` lists. Under `torch.compile`, graphs for CPUs contain our operator, which
    computes a matrix product where the native library cannot run. Sums are divided among the threads, so their rounding
    depends on the number of threads, but not on timing.

    Args:
        x: (N, C, H, W) in any layout.
        weight: (C', C, 1, 1).
        bias: (C',) or None.

    Returns:
        (N, C', H, W) in the layout that `F.conv2d` gives it.
    """
    if (
        x.dim() != 4
        or _needs_no_rule(x, weight)
        or (not torch.compiler.is_compiling() and not _is_ordinary(x, weight, bias))
    ):
        return F.conv2d(x, weight, bias)
    return _PointwiseConv.apply(x, weight, bias)


def reasons_against_weight_grad(x: Tensor) -> list[str]:
    """List why our kernels cannot compute the gradients of a pointwise layer with this input; empty if they can."""
    if x.device.type != "cpu":
        return [f"it runs on a CPU, not on {x.device}"]
    if x.dtype is not torch.float32:
        return [f"it computes float32, not {x.dtype}"]
    reason = library.load().reason
    return [] if reason is None else [reason]


def _needs_no_rule(x: Tensor, weight: Tensor) -> bool:
    """Return whether no gradient of the weight is wanted, or by something that PyTorch's own rule serves better."""
    if not (torch.is_grad_enabled() and weight.requires_grad) or x.numel() == 0 or x.dtype is not torch.float32:
        return True
    # Other devices come first: for some, such as meta, there is no autocast to ask for.
    if x.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting()


def _is_ordinary(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return is_unobserved_call() and are_ordinary(x, bias) and weight.dtype is x.dtype and not reasons_against_weight_grad(x)


class _PointwiseConv(torch.autograd.Function):
    """The rule of a pointwise convolution."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.biases = None if bias is None else [weight.shape[0]]
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad)
        # PyTorch's gradients have derivatives of their own.
        transformed = has_batched_gradients(grad) or torch._C._are_functorch_transforms_active()
        plain = transformed or (torch.is_grad_enabled() and not torch.compiler.is_compiling())
        if plain or not wanted[1]:
            return _backward(ctx, x, weight, grad, wanted)
        for_x = _backward(ctx, x, weight, grad, [True, False, False])[0] if wanted[0] else None
        for_weight, for_bias = run_pointwise_weight_grad(x, grad, wanted[2])
        return for_x, for_weight.view(weight.shape), for_bias if wanted[2] else None


def _backward(ctx: Any, x: Tensor, weight: Tensor, grad: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    settings = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    found: tuple[Tensor | None, ...]
    found = torch.ops.aten.convolution_backward(grad, x, weight, ctx.biases, *settings, wanted)
    return found


def run_pointwise_weight_grad(x: Tensor, grad: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a pointwise layer, without derivatives of their own.

    Args:
        x: input of the layer, (N, C, H, W).
        grad: gradient of its output, (N, C', H, W).
        bias: whether to compute the gradient of the bias, too.

    Returns:
        (C', C), the gradient of the weight, and (C',), that of the bias, or an empty tensor.
    """
    if is_ordinary_call() and are_ordinary(x, grad):
        return _weight_grad(x, grad, bias)
    return pointwise_weight_grad_op(x, grad, bias)  # type: ignore[no-any-return]


@register_implementation("pointwise_weight_grad")
def pointwise_weight_grad_op(x: Tensor, grad: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Compute `run_pointwise_weight_grad` with our kernels, or with a matrix product where these cannot run."""
    return _weight_grad(x, grad, bias)


def _weight_grad(x: Tensor, grad: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    fits = x.dim() == grad.dim() == 4 and (grad.shape[0], grad.shape[2:]) == (x.shape[0], x.shape[2:])
    if not fits or grad.device != x.device:
        raise ArgumentError(
            f"grad has the shape {tuple(grad.shape)} on {grad.device}, and x {tuple(x.shape)} on {x.device}: both must be "
            "(N, channels, height, width), on one device, and equal except for the channels"
        )
    native = not reasons_against_weight_grad(x) and grad.dtype is x.dtype and x.numel() > 0
    if call_trace.OPEN_TRACES:
        call_trace.record_pointwise_grad(
            PointwiseGradCall("native" if native else "portable", tuple(x.shape), grad.shape[1])
        )
    if native:
        return pointwise.weight_grad(x, grad, bias)
    return plain_pointwise_weight_grad(x, grad, bias)


def plain_pointwise_weight_grad(x: Tensor, grad: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """The definition of `pointwise_weight_grad`, in PyTorch's own operators."""
    weight = grad.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).t()
    return weight, grad.sum((0, 2, 3)) if bias else grad.new_empty(0)


@register_fake("pointwise_weight_grad")
def _(x: Tensor, grad: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    outputs = grad.shape[1]
    return grad.new_empty((outputs, x.shape[1])), grad.new_empty((outputs if bias else 0,))


def _flops(x: Any, grad: Any, *others: Any, **named: Any) -> int:
    batch, inputs, height, width = x
    return int(2 * batch * height * width * inputs * grad[1])


_OPERATOR = torch.ops.widekernel.pointwise_weight_grad
if _OPERATOR not in flop_registry:  # the registry refuses a second entry, as when a module is reloaded
    register_flop_formula(_OPERATOR)(_flops)
