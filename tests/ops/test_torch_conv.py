"""The portable backend calls PyTorch's convolutions only in the forms that are fast on a CPU; nothing is timed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.ops.backends import use_portable_and_reference
from widekernel import ops
from widekernel.ops import torch_conv


class Spy:
    """Replacement of `torch.nn.functional` that records the arguments of its convolutions."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        self.calls.append(SimpleNamespace(x=x, weight=weight, bias=bias, **options))
        return F.conv2d(x, weight, bias, **options)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    monkeypatch.setattr(torch_conv, "F", spy)
    return spy


@pytest.fixture(autouse=True)
def _no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the native kernels: these tests are about the code that runs without them, including gradients."""
    use_portable_and_reference(monkeypatch)


def is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("size", [(31, 31), (5, 51), (1, 9)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_wide_kernels_run_channels_last(spy: Spy, size: tuple[int, int], layout: torch.memory_format) -> None:
    x = torch.randn(2, 4, 56, 56).contiguous(memory_format=layout)
    y = ops.depthwise_sum(x, [torch.randn(4, 1, *size)])
    (call,) = spy.calls
    assert is_nhwc(call.x)
    assert call.groups == 4
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("size", [(3, 3), (7, 7), (51, 5)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_narrow_kernels_run_in_the_layout_of_the_image(spy: Spy, size: tuple[int, int], layout: torch.memory_format) -> None:
    x = torch.randn(2, 4, 56, 56).contiguous(memory_format=layout)
    ops.depthwise_sum(x, [torch.randn(4, 1, *size)])
    (call,) = spy.calls
    assert call.x.data_ptr() == x.data_ptr()
    assert is_nhwc(call.x) == (layout is torch.channels_last)


def test_the_kernel_has_the_layout_of_the_image(spy: Spy) -> None:
    ops.depthwise_sum(torch.randn(2, 4, 20, 20), [torch.randn(4, 1, 5, 15)])
    assert spy.calls[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_image_is_converted_once_for_all_rectangles(spy: Spy) -> None:
    ops.depthwise_sum(torch.randn(2, 4, 20, 20), [torch.randn(4, 1, *size) for size in [(15, 5), (5, 15), (3, 3)]])
    assert len(spy.calls) == 3
    assert len({call.x.data_ptr() for call in spy.calls}) == 1


def test_taps_that_see_no_pixel_are_left_out(spy: Spy) -> None:
    ops.depthwise_sum(torch.randn(2, 4, 7, 8), [torch.randn(4, 1, 51, 51), torch.randn(4, 1, 31, 5)])
    assert [tuple(call.weight.shape[2:]) for call in spy.calls] == [(13, 15), (13, 5)]
    spy.calls.clear()
    x = torch.randn(2, 4, 7, 8)
    ops.depthwise_weight_grad(x, x, (51, 51))
    assert spy.calls[0].padding == (6, 7)


def test_dilated_taps_that_see_no_pixel_are_left_out(spy: Spy) -> None:
    x = torch.randn(2, 4, 7, 9)
    ops.depthwise_sum(x, [torch.randn(4, 1, 9, 5), torch.randn(4, 1, 3, 3)], dilations=[3, 9])
    assert [(tuple(call.weight.shape[2:]), call.dilation) for call in spy.calls] == [((5, 5), 3), ((1, 1), 9)]
    spy.calls.clear()
    ops.depthwise_weight_grad(x, x, (9, 5), dilation=3)
    (call,) = spy.calls
    assert (call.padding, call.stride) == ((6, 6), 3)  # from tap to tap


def test_the_input_gradient_is_a_forward_convolution(spy: Spy) -> None:
    x = torch.randn(2, 4, 20, 20, requires_grad=True)
    y = ops.depthwise_sum(x, [torch.randn(4, 1, 15, 15)])
    spy.calls.clear()
    y.sum().backward()
    (call,) = spy.calls
    assert is_nhwc(call.x)
    assert tuple(call.weight.shape) == (4, 1, 15, 15)


@pytest.mark.parametrize("size", [(31, 31), (5, 51)], ids=str)
def test_the_weight_gradient_is_a_forward_convolution(spy: Spy, size: tuple[int, int]) -> None:
    """It has N·C channels and the gradient as its kernel, and is channels_last because many taps are computed."""
    x, g = torch.randn(2, 4, 28, 28), torch.randn(2, 4, 28, 28)
    ops.depthwise_weight_grad(x, g, size)
    (call,) = spy.calls
    assert tuple(call.x.shape) == (1, 8, 28, 28)
    assert tuple(call.weight.shape) == (8, 1, 28, 28)
    assert call.groups == 8
    assert is_nhwc(call.x)
    assert call.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_gradient_of_half_precision_runs_in_float32(spy: Spy, dtype: torch.dtype) -> None:
    """A bfloat16 convolution with a kernel of 28x30 taps takes minutes if it is compiled for the processor's tile unit."""
    x = torch.randn(2, 4, 28, 30).to(dtype)
    assert ops.depthwise_weight_grad(x, x, (31, 31)).dtype == dtype
    assert spy.calls[0].x.dtype == spy.calls[0].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_convolutions_keep_the_size(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Padding further than the kernel needs takes minutes for 5x51 taps in bfloat16 on such processors."""
    shapes, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **options: shapes.append((y := conv2d(*args, **options)).shape) or y)
    x = torch.randn(2, 3, 28, 30).to(dtype)
    ops.depthwise_sum(x, [torch.randn(3, 1, 5, 51).to(dtype)], [(2, 24)])
    ops.depthwise_sum(x, [torch.randn(3, 1, 5, 9).to(dtype)], [(2, 1)], dilations=[3])
    assert shapes == 2 * [(2, 3, 28, 30)]


def names_of_a_step(function) -> set[str]:
    x = torch.randn(2, 4, 12, 12, requires_grad=True)
    kernels = [torch.randn(4, 1, *size, requires_grad=True) for size in [(11, 11), (11, 3), (3, 11), (3, 3)]]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function(x, kernels).square().sum().backward()
    return {event.key for event in profiler.key_averages()}


def test_pytorch_convolution_backward_is_never_called() -> None:
    ours = names_of_a_step(ops.depthwise_sum)
    assert "aten::conv2d" in ours
    assert not {name for name in ours if "convolution_backward" in name}
    theirs = names_of_a_step(lambda x, kernels: sum(F.conv2d(x, k, padding="same", groups=4) for k in kernels))
    assert "aten::convolution_backward" in theirs  # the profiler would have seen it
