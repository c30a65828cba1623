"""The definition of a block of pointwise products agrees with the native one, and with formulas."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.pointwise import PackedBlock
from widekernel.ops.pointwise_reference import ACTIVATIONS, ReferenceBlock


def test_one_pixel_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0]])
    first, bias = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, -1.0]]), torch.tensor([0.5, 0.0, 1.0])
    second, shift = torch.tensor([[1.0, -1.0, 10.0]]), torch.tensor([0.25])
    assert_close(ReferenceBlock(first, bias, "relu", second, shift, None)(x), torch.tensor([[4.5 - 2.0 + 0.25]]))
    got = ReferenceBlock(first, bias, "none", None, None, 1.0)(x, torch.tensor([[10.0, 20.0, 30.0]]))
    root = math.sqrt(2.0)
    assert_close(got, torch.tensor([[10.5, 20 - 2 / root, 31 - 1 / root]]))


@pytest.mark.skipif(native.load().reason is not None, reason="the native library is not there")
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
