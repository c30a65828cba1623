"""Blocks composed at random: whatever is fused computes the same, and exactly the expected parts are fused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.testing import assert_close

from tests.transforms.fusion import calls_of, randomized
from widekernel import ops
from widekernel.ops.call_trace import FusedCall
from widekernel.transforms.acceleration.fusion import fuse
from widekernel.transforms.acceleration.fusion.fused import checked_plan
from widekernel.transforms.acceleration.fusion.plan import NOTHING_TO_FUSE

pytestmark = pytest.mark.usefixtures("packs")
ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Composition:
    """What a block is composed of.

    Attributes:
        shape: shape of the input; maps have the channels in the second place, rows in the last.
        permuted: whether maps are permuted for linear layers.
        norm: whether there is a norm before the first layer.
        batch: whether norms are batch norms.
        affine: whether an affine map follows the first layer.
        activation: the activation.
        second: whether there is a second layer.
        scale: the form of the factor after the last layer; "" for none.
        residual: what is added: "", "x", or "later" for the sum the other way round.
        bias: whether layers have a bias.
    """

    shape: tuple[int, ...]
    permuted: bool
    norm: bool
    batch: bool
    affine: bool
    activation: str
    second: bool
    scale: str
    residual: str
    bias: bool

    @property
    def is_map(self) -> bool:
        return len(self.shape) == 4

    @property
    def convolves(self) -> bool:
        return self.is_map and not self.permuted

    @property
    def is_fused(self) -> bool:
        return self.norm or self.affine or self.activation != "none" or self.scale != "" or self.residual != ""


class Composed(nn.Module):
    def __init__(self, made_of: Composition) -> None:
        super().__init__()
        dim = made_of.shape[1] if made_of.is_map else made_of.shape[-1]
        layer: Any = partial(nn.Conv2d, kernel_size=1) if made_of.convolves else nn.Linear
        norm: Any = nn.BatchNorm2d if made_of.batch else LayerNorm2d if made_of.convolves else nn.LayerNorm
        self.made_of = made_of
        self.norm = norm(dim) if made_of.norm else nn.Identity()
        hidden = 2 * dim if made_of.second else dim
        self.first = layer(dim, hidden, bias=made_of.bias)
        self.affine: Any = None
        if made_of.affine:
            self.affine = nn.BatchNorm2d(hidden) if made_of.convolves else nn.Parameter(torch.randn(hidden))
        self.second = layer(hidden, dim, bias=made_of.bias) if made_of.second else None
        shape = (dim, 1, 1) if made_of.convolves else (1, dim)
        self.scale = nn.Parameter(torch.randn(dim if made_of.scale == "reshaped" else shape)) if made_of.scale else None

    def forward(self, x: Tensor) -> Tensor:
        made_of = self.made_of
        y = self.norm(x.permute(0, 2, 3, 1) if made_of.permuted else x)
        y = self.first(y)
        if self.affine is not None:
            y = self.affine(y) if made_of.convolves else y + self.affine
        y = ACTIVATIONS[made_of.activation](y)
        if self.second is not None:
            y = self.second(F.dropout(y, 0.5, self.training))
        if self.scale is not None:
            scale = self.scale
            if made_of.scale == "reshaped" and made_of.convolves:
                scale = scale.reshape(1, -1, 1, 1)
            y = scale * y if made_of.scale == "first" else y.mul(scale)
        y = y.permute(0, 3, 1, 2) if made_of.permuted else y
        if made_of.residual:
            return x + y if made_of.residual == "x" else torch.add(y, x)
        return y


@st.composite
def compositions(draw: st.DrawFn) -> Composition:
    sizes = st.integers(1, 6)
    is_map = draw(st.booleans())
    dim = draw(st.integers(2, 9))
    maps, rows = st.tuples(sizes, st.just(dim), sizes, sizes), st.tuples(sizes, st.just(dim))
    shape = draw(maps if is_map else rows | st.tuples(sizes, sizes, st.just(dim)))
    permuted = is_map and draw(st.booleans())
    flags = {name: draw(st.booleans()) for name in ("norm", "affine", "second", "bias")}
    return Composition(
        shape,
        permuted,
        batch=is_map and not permuted and draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        scale=draw(st.sampled_from(["", "reshaped", "broadcast", "first"])),
        residual=draw(st.sampled_from(["", "x", "later"])),
        **flags,
    )


@settings(max_examples=30, deadline=None)
@given(compositions(), st.integers(0, 2**32 - 1))
def test_composed_blocks(made_of: Composition, seed: int) -> None:
    # Without a second layer, what follows the activation is no part of the call; two layers need an activation between them.
    assume(made_of.activation == "none" or made_of.second or not made_of.scale)
    assume(made_of.activation != "none" or not made_of.second)
    torch.manual_seed(seed)
    block, x = randomized(Composed(made_of)), torch.randn(made_of.shape)
    plan, reason = checked_plan(block, x)
    if not made_of.is_fused:
        assert reason == NOTHING_TO_FUSE
        return
    if made_of.activation == "relu" and "zero" in reason:
        return  # all of a few hidden values may be negative
    assert plan is not None, reason
    with torch.no_grad():
        want = block(x)
    fuse(block, plan)
    with torch.no_grad(), ops.trace() as traced:
        got = block(x)
    (call,) = traced.fused
    parts = made_of.norm, made_of.second, made_of.residual != ""
    assert call == FusedCall(made_of.shape, made_of.activation, *parts)
    assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1.0, want.abs().max().item()))
    assert calls_of(block, torch.randn(3, *made_of.shape[1:]))[1] == 1
