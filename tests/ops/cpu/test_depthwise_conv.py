"""Depthwise convolutions with strides in native code against the definition in float64, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.native import needs_native
from widekernel.errors import ArgumentError
from widekernel.ops import recording
from widekernel.ops.cpu import library
from widekernel.ops.cpu.depthwise_conv import PackedDepthwiseConv
from widekernel.ops.depthwise_conv_reference import depthwise_conv
from widekernel.ops.patch import Patch


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def packed(channels: int, patch: Patch, relu: bool = False) -> tuple[PackedDepthwiseConv, Callable[[Tensor], Tensor]]:
    """Return a native convolution with random weights, and its definition in float64."""
    weight, bias = torch.randn(channels, 1, *patch.kernel), torch.randn(channels)
    return PackedDepthwiseConv(weight, bias, patch, relu), lambda x: depthwise_conv(
        x.double(), weight.double(), bias.double(), patch, relu
    )


def recorded(conv: PackedDepthwiseConv, x: Tensor) -> tuple[Tensor, list[int]]:
    """Return the result for an image, and the kinds of the native calls."""
    with recording.recording() as made:
        y = conv(x)
    return y, [call.kind for call in made.calls]


@st.composite
def patches(draw: st.DrawFn) -> Patch:
    pairs = [(draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((1, 5), (1, 3), (0, 3))]
    return Patch(*pairs)


@given(patches(), st.integers(1, 40), st.integers(5, 14), st.integers(5, 14), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_definition_is_pytorchs_convolution(patch: Patch, channels: int, height: int, width: int, relu: bool) -> None:
    x, weight, bias = image(2, channels, height, width).double(), torch.randn(channels, 1, *patch.kernel).double(), None
    want = F.conv2d(x, weight, bias, patch.stride, patch.padding, 1, channels)
    assert_close(depthwise_conv(x, weight, bias, patch, relu), F.relu(want) if relu else want)


@needs_native
@given(patches(), st.integers(1, 70), st.integers(5, 20), st.integers(5, 20), st.booleans(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_native_convolutions(patch: Patch, channels: int, height: int, width: int, relu: bool, images: int) -> None:
    conv, definition = packed(channels, patch, relu)
    x = image(images, channels, height, width)
    y, made = recorded(conv, x)
    assert made == [library.CONV_STEP]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y.double(), definition(x), rtol=0, atol=2e-5)


@needs_native
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "side"), [(128, 14), (1050, 7)])
def test_every_instruction_set_and_number_of_threads(
    isa: str, threads: Callable[[int], None], channels: int, side: int, stride: int
) -> None:
    conv, definition = packed(channels, Patch((3, 3), (stride, stride), (1, 1)), True)
    x = image(2, channels, side, side)
    for count in (1, 3):
        threads(count)
        y, made = recorded(conv, x)
        assert made == [library.CONV_STEP]
        assert_close(y.double(), definition(x), rtol=0, atol=2e-5)


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_only_what_depends_on_it(value: float) -> None:
    conv, definition = packed(20, Patch((3, 3), (2, 2), (1, 1)), True)
    x = image(2, 20, 11, 12)
    x[1, 17, 4, 7] = value
    assert_close(conv(x).double(), definition(x), rtol=0, atol=2e-5, equal_nan=True)


@needs_native
def test_pytorch_computes_contiguous_images() -> None:
    conv, definition = packed(20, Patch((3, 3), (2, 2), (1, 1)), True)
    x = image(2, 20, 11, 12).contiguous()
    y, made = recorded(conv, x)
    assert made == []
    assert_close(y.double(), definition(x), rtol=0, atol=2e-5)
    # Nor are there images.
    assert conv(x[:0]).shape == (0, 20, 6, 6)


@needs_native
def test_lazy_negation_and_parts_of_images() -> None:
    conv, definition = packed(20, Patch((3, 3), (2, 2), (1, 1)))
    x = image(2, 25, 11, 12)
    for part in (torch._neg_view(x[:, :20]), x[:, 3:23], x[:, :20, 1:8, 2:]):
        y, made = recorded(conv, part)
        assert made == [library.CONV_STEP]
        assert_close(y.double(), definition(part), rtol=0, atol=2e-5)


@needs_native
def test_what_is_refused() -> None:
    weight, patch = torch.randn(8, 1, 3, 3), Patch((3, 3), (2, 2), (0, 0))
    conv = PackedDepthwiseConv(weight, None, patch)
    for x in (torch.randn(1, 7, 9, 9), torch.randn(8, 9, 9), torch.randn(1, 8, 2, 9)):
        with pytest.raises(ArgumentError, match=r"must be \(N, 8, H, W\)"):
            conv(x)
    with pytest.raises(ArgumentError, match=r"x is torch.float64 on cpu"):
        conv(torch.randn(1, 8, 9, 9).double())
    with pytest.raises(ArgumentError, match="x requires gradients"):
        conv(torch.randn(1, 8, 9, 9, requires_grad=True))
    with pytest.raises(ArgumentError, match=r"must be \(channels, 1, 3, 3\)"):
        PackedDepthwiseConv(weight[..., :2], None, patch)
    with pytest.raises(ArgumentError, match=r"bias has the shape \(7,\), but must be \(8,\)"):
        PackedDepthwiseConv(weight, torch.randn(7), patch)
    with pytest.raises(ArgumentError, match="strides must be 1 to 65535"):
        PackedDepthwiseConv(weight, None, patch._replace(stride=(0, 1)))
    assert copy.deepcopy(conv) is conv
    with pytest.raises(ArgumentError, match="belong to one process"):
        pickle.dumps(conv)
