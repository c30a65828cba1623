"""The definition of a block of pointwise products agrees with the native one, and with formulas."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from tests.native import needs_native
from widekernel.ops.cpu.pointwise import PackedBlock
from widekernel.ops.patch import NormAfter, Patch
from widekernel.ops.pointwise_reference import ACTIVATIONS, ReferenceBlock


def test_one_pixel_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0]])
    first, bias = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, -1.0]]), torch.tensor([0.5, 0.0, 1.0])
    second, shift = torch.tensor([[1.0, -1.0, 10.0]]), torch.tensor([0.25])
    assert_close(ReferenceBlock(first, bias, "relu", second, shift, None)(x), torch.tensor([[4.5 - 2.0 + 0.25]]))
    got = ReferenceBlock(first, bias, "none", None, None, 1.0)(x, torch.tensor([[10.0, 20.0, 30.0]]))
    root = math.sqrt(2.0)
    assert_close(got, torch.tensor([[10.5, 20 - 2 / root, 31 - 1 / root]]))


def test_a_patch_by_hand() -> None:
    """Two taps of a 1x2 kernel, at the left border: the first one lies outside the image."""
    x = torch.tensor([[[[1.0, 2.0, 3.0]], [[10.0, 20.0, 30.0]]]])
    first = torch.tensor([[[[1.0, 2.0]], [[0.0, 1.0]]]])
    block = ReferenceBlock(first, torch.tensor([0.5]), "none", None, None, None, Patch((1, 2), (1, 2), (0, 1)))
    assert_close(block(x), torch.tensor([[[[2.0 + 10 + 0.5, 2.0 + 2 * 3 + 30 + 0.5]]]]))
    # The border is zero after the norm, too, which turns each pixel into -1 and 1.
    block = ReferenceBlock(first, None, "none", None, None, 0.0, Patch((1, 2), (1, 2), (0, 1)))
    assert_close(block(x), torch.tensor([[[[-2.0 + 1, -1.0 - 2 + 1]]]]))


def test_a_norm_after_the_product_by_hand() -> None:
    after = NormAfter(0.0, torch.tensor([10.0, 1.0]), torch.tensor([0.0, 5.0]))
    block = ReferenceBlock(torch.tensor([[1.0], [3.0]]), None, "relu", None, None, None, after=after)
    assert_close(block(torch.tensor([[2.0]])), torch.tensor([[0.0, 1.0 + 5.0]]))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_sizes_of_results(stride: int) -> None:
    for side in range(3, 9):
        patch = Patch((3, 2), (stride, 1), (1, 0))
        y = ReferenceBlock(torch.randn(1, 1, 3, 2), None, "none", None, None, None, patch)(torch.randn(1, 1, side, side))
        assert y.shape[2:] == patch.size(side, side)


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    pixels=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    flags=st.tuples(*[st.booleans()] * 5),
    layout=st.sampled_from(["NCHW", "NHWC", "rows"]),
)
def test_native_blocks(
    sizes: tuple[int, int, int], pixels: tuple[int, int, int], activation: str, flags: tuple[bool, ...], layout: str
) -> None:
    (dim, hidden, outputs), (pair, norm, bias, second_bias, residual) = sizes, flags
    weights: list[Tensor | None] = [torch.randn(hidden, dim), torch.randn(hidden) if bias else None]
    seconds = [torch.randn(outputs, hidden) if pair else None, torch.randn(outputs) if pair and second_bias else None]
    eps = 1e-3 if norm else None
    outputs = outputs if pair else hidden
    x, added = torch.randn(pixels[0], dim, *pixels[1:]), torch.randn(pixels[0], outputs, *pixels[1:])
    if layout == "NHWC":
        x, added = (t.contiguous(memory_format=torch.channels_last) for t in (x, added))
    elif layout == "rows":
        x, added = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (x, added))
    block = PackedBlock(*weights, activation, *seconds, eps)  # type: ignore[arg-type]
    exact = [None if weight is None else weight.double() for weight in (*weights, *seconds)]
    oracle = ReferenceBlock(*exact[:2], activation, *exact[2:], eps)  # type: ignore[arg-type]
    want = oracle(x.double(), added.double() if residual else None)
    got = block(x, added if residual else None)
    assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * max(1.0, want.abs().max().item()))
