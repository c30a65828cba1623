"""Compacting keeps outputs: of networks, of random layers, and of unusual arrangements."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.models.zoo import alive, assert_near, assert_same_state, images, snapshot
from tests.sparsity.nets import check_same_network
from tests.transforms.compaction import FREE, NETWORKS, TOLERANCE, crossed, folded_layer, mask
from widekernel.layers import (
    FoldedLargeKernel,
    FoldedPartialChannels,
    LargeKernel,
    Rectangles,
)
from widekernel.layers.grouped import GroupedKernels
from widekernel.transforms.compaction import CostModel, compact, compact_report

# Masks of nothing and of everything are the same for all granularities.
MASKS = [("tile", 0.0), ("tile", 1.0), *((granularity, 0.5) for granularity in ("tile", "branch", "channel"))]
MORE_MASKS = [(granularity, share) for granularity in ("tile", "branch", "channel") for share in (0.3, 0.9)]
# Networks that differ from another one only in how their kernels are made: one mask is short.
ALIKE = ("slak_nano_square", "slak_nano_without_bn", "slak_reg_nano", "slak_pww_nano", "shiftwise_v1_nano")
# The first network with every mask, the others with one of them and with that of branches, which all kernels have.
BRANCHES = ("branch", 0.5)


def _is_short(number: int, name: str, pair: tuple[str, float]) -> bool:
    one = MASKS[number % len(MASKS)]
    return pair in MASKS and (number == 0 or pair == BRANCHES or (pair == one and name not in ALIKE))


CASES = [
    pytest.param(name, *pair, marks=[] if _is_short(number, name, pair) else [pytest.mark.slow])
    for number, name in enumerate(NETWORKS)
    for pair in (*MASKS, *MORE_MASKS)
]


@pytest.mark.parametrize(("name", "granularity", "share"), CASES)
def test_outputs_of_networks(name: str, granularity: str, share: float) -> None:
    """The reference is the masked network in its training form, so that rounding in folding counts, too."""
    model, x = alive(name), images(batch=1)
    with torch.no_grad():
        unmasked = model(x)
        mask(model, granularity, share)
        # The kernels contribute far more to the output than the tolerance.
        assert share == 0 or (model(x) - unmasked).abs().max() > 1e-4 * unmasked.abs().max()
    before = snapshot(model)
    for dtype, tolerance in TOLERANCE.items():
        other, x = copy.deepcopy(model).to(dtype), x.to(dtype)
        with torch.no_grad():
            want = other(x)
            for cost in (None, FREE):
                assert_near(compact(other, cost)(x), want, tolerance)
    assert_same_state(model.state_dict(), before)


@st.composite
def layers(draw: st.DrawFn) -> FoldedLargeKernel:
    """Draw random rectangles with random anchors, in which rows, columns, kernels and channels are dead."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    channels = draw(st.integers(1, 7))
    rects = []
    for _ in range(draw(st.integers(1, 4))):
        kh, kw = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        anchor = draw(st.integers(0, kh - 1)), draw(st.integers(0, kw - 1))
        kernel = torch.randn(channels, 1, kh, kw, dtype=torch.float64)
        kernel *= torch.rand(channels, 1, 1, 1) >= draw(st.sampled_from([0.0, 0.5, 1.0]))
        kernel *= torch.rand(channels, 1, kh, 1) >= draw(st.sampled_from([0.0, 0.6]))
        kernel *= torch.rand(channels, 1, 1, kw) >= draw(st.sampled_from([0.0, 0.6]))
        rects.append((kernel, anchor))
    return folded_layer(*rects)


@st.composite
def costs(draw: st.DrawFn) -> CostModel:
    price = st.sampled_from([0.0, 1.0, 100.0])
    names = ("move", "outside", "call", "group")
    return CostModel(**{name: draw(price) for name in names}, block=draw(st.sampled_from([1, 2, 4])), fill=draw(price))


@given(layers(), costs(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_outputs_of_single_layers(layer: FoldedLargeKernel, cost: CostModel, channels_last: bool) -> None:
    x = torch.randn(2, layer.bias.numel(), 6, 5, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    small = compact(layer, cost)
    want, got = layer(x), small(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # Strides of dimensions of size 1 mean nothing.
    assert x.shape[1] == 1 or got.is_contiguous() == want.is_contiguous()
    for row in small.compaction:
        assert row.realized <= row.dense
        assert row.channels_kept <= row.channels


@given(layers(), st.integers(0, 3), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_outputs_of_layers_on_some_channels(layer: FoldedLargeKernel, ghosts: int, seed: int) -> None:
    """The output holds convolved channels first, then ghosts; this order must stay."""
    worked = layer.bias.numel()
    order = torch.randperm(worked + ghosts, generator=torch.Generator().manual_seed(seed)).int()
    numbers = torch.randn(2, ghosts, dtype=torch.float64)
    partial = FoldedPartialChannels(layer, order[:worked], order[worked:], *numbers).eval()
    x = torch.randn(2, worked + ghosts, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(compact(partial, FREE)(x), partial(x), rtol=1e-12, atol=1e-12)


def test_nothing_dead() -> None:
    layer, x = crossed(), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    small = compact(layer, FREE)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-12, atol=1e-12)
    assert isinstance(small, FoldedLargeKernel)
    (row,) = compact_report(small)
    assert row.dense == row.nonzero == row.realized
    assert row.reason == ""


def test_a_network_without_depthwise_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = torch.randn(1, 3, 8, 8)
    check_same_network(compact(model), model, x)
    assert len(compact_report(model)) == 0


def test_training_mode_is_not_kept_and_not_changed() -> None:
    model = mask(alive("slak_nano"), "channel", 0.5).train()
    small = compact(model, FREE)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in small.modules())
    x = images()
    with torch.no_grad():
        assert_near(small(x), model.eval()(x), 2e-6)


def test_frozen_networks_stay_frozen_and_shared_layers_shared() -> None:
    layer = LargeKernel(Rectangles(4, [(9, 3), (3, 9)]))
    model = mask(nn.Sequential(layer, nn.ReLU(), layer), "channel", 0.5).requires_grad_(False)
    small = compact(model, FREE)
    assert small[0] is small[2]
    assert isinstance(small[0], GroupedKernels)
    assert not any(parameter.requires_grad for parameter in small.parameters())
    assert len(small.compaction) == 1
