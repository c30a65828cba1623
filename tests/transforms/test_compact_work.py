"""The work of a compacted network: dead parts are left out, and channels are grouped where this pays off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import widekernel
from tests.models.zoo import alive, images
from tests.transforms.compaction import FREE, crossed, folded_layer, mask
from widekernel import ops
from widekernel.layers import (
    DepthwiseConv2d,
    FoldedLargeKernel,
    LargeKernel,
    PartialChannels,
    Rectangles,
)
from widekernel.layers.grouped import GroupedKernels
from widekernel.transforms.compaction import CostModel, compact


def test_dead_channels_are_not_convolved() -> None:
    layer = crossed()
    with torch.no_grad():
        for kernel in layer.kernels:
            kernel[[1, 3]] = 0
    small = compact(layer, FREE)
    with ops.trace() as trace:
        small(torch.randn(1, 4, 8, 8, dtype=torch.float64))
    ((_, problem),) = trace.calls
    assert problem.shape == (1, 2, 8, 8)
    assert problem.kernels == ((9, 3), (3, 9))


def test_a_dead_branch_of_a_channel_is_not_convolved() -> None:
    layer = crossed()
    with torch.no_grad():
        layer.kernels[0][:3] = 0
        layer.kernels[1][2:] = 0
    small = compact(layer, FREE)
    with ops.trace() as trace:
        small(torch.randn(1, 4, 8, 8, dtype=torch.float64))
    assert sorted((problem.shape[1], problem.kernels) for _, problem in trace.calls) == [(1, ((9, 3),)), (2, ((3, 9),))]
    (row,) = small.compaction
    assert (row.channels, row.channels_kept, row.dense, row.nonzero, row.realized) == (4, 3, 4 * 54, 81, 81)
    assert row.reason == ""


def test_a_rectangle_that_is_dead_in_all_channels_is_removed() -> None:
    layer = crossed()
    with torch.no_grad():
        layer.kernels[0].zero_()
    small = compact(layer)
    with ops.trace() as trace:
        small(torch.randn(1, 4, 8, 8, dtype=torch.float64))
    assert [problem.kernels for _, problem in trace.calls] == [((3, 9),)]
    assert isinstance(small, FoldedLargeKernel)


def test_strips_become_narrower_and_their_anchors_move() -> None:
    layer = crossed()
    with torch.no_grad():
        layer.kernels[0][:, :, :3] = 0
        layer.kernels[1][..., 6:] = 0
    small = compact(layer)
    with ops.trace() as trace:
        small(torch.randn(1, 4, 8, 8, dtype=torch.float64))
    ((_, problem),) = trace.calls
    assert problem.kernels == ((6, 3), (3, 6))
    assert problem.anchors == ((1, 1), (1, 4))


def test_an_entirely_dead_layer_is_its_bias() -> None:
    layer = crossed()
    with torch.no_grad():
        for kernel in layer.kernels:
            kernel.zero_()
    small = compact(layer)
    with ops.trace() as trace:
        y = small(torch.randn(2, 4, 8, 8, dtype=torch.float64))
    assert trace.calls == []
    assert torch.equal(y, layer.bias.view(-1, 1, 1).expand(2, 4, 8, 8))


def test_a_small_kernel_moves_to_the_strip_that_is_alive() -> None:
    """The first strip absorbs the small square when the layer is folded; it must not be kept for that reason."""
    source = Rectangles(4, [(9, 3), (3, 9), (3, 3)])
    layer = LargeKernel(source, identity=True).double().eval()
    with torch.no_grad():
        source.kernels[0].zero_()
    small, x = compact(layer), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-12, atol=1e-12)
    assert [tuple(kernel.shape) for kernel in small.kernels] == [(4, 1, 3, 9)]


def test_dead_channels_beside_the_identity_become_ghosts() -> None:
    source = Rectangles(3, [(9, 3), (3, 9)])
    layer = LargeKernel(source, [nn.BatchNorm2d(3) for _ in range(2)], identity=True)
    model = PartialChannels(layer, [0, 2, 3], 5).double().eval()
    with torch.no_grad():
        for kernel in source.kernels:
            kernel[1] = 0
    small, x = compact(model, FREE), torch.randn(2, 5, 8, 8, dtype=torch.float64)
    with ops.trace() as trace:
        y = small(x)
    torch.testing.assert_close(y, model(x), rtol=1e-12, atol=1e-12)
    assert [problem.shape[1] for _, problem in trace.calls] == [2]


def test_depthwise_convolutions() -> None:
    conv = DepthwiseConv2d(6, 6, 7, padding=3, groups=6).double().eval()
    with torch.no_grad():
        conv.weight[:3] = 0
        conv.weight[:, :, :2] = 0
    small, x = compact(conv, FREE), torch.randn(1, 6, 9, 9, dtype=torch.float64)
    with ops.trace() as trace:
        y = small(x)
    torch.testing.assert_close(y, conv(x), rtol=1e-12, atol=1e-12)
    assert [(problem.shape[1], problem.kernels) for _, problem in trace.calls] == [(3, ((5, 7),))]


def test_networks_compute_less() -> None:
    model = mask(alive("slak_nano"), "channel", 0.5)
    whole, small = widekernel.fold(model), compact(model, FREE)
    work = []
    for network in (whole, small):
        with torch.no_grad(), ops.trace() as trace:
            network(images())
        work.append(sum(p.shape[1] * kh * kw for _, p in trace.calls for kh, kw in p.kernels))
    report = small.compaction
    mixers = [row for row in report if "mixer" in row.name]
    assert work == [sum(row.dense for row in mixers), sum(row.realized for row in mixers)]
    assert work[1] == sum(row.nonzero for row in mixers)
    assert 0.3 < work[1] / work[0] < 0.7


def test_groups_that_do_not_pay_off_are_not_made() -> None:
    layer = crossed()
    with torch.no_grad():
        for kernel in layer.kernels:
            kernel[1] = 0
    dear = compact(layer, CostModel(group=1e9))
    assert isinstance(dear, FoldedLargeKernel)
    (row,) = dear.compaction
    assert row.realized == row.dense
    assert row.reason == "computing 1 dead channels costs less than gathering the others"


def test_few_pixels_make_groups_more_expensive() -> None:
    layer = folded_layer((torch.randn(64, 1, 31, 9), (15, 4)))
    with torch.no_grad():
        layer.kernels[0][::2] = 0
    assert isinstance(compact(layer, input_size=(4, 64, 224, 224)), GroupedKernels)
    assert isinstance(compact(layer, input_size=(1, 64, 7, 7)), FoldedLargeKernel)


def test_calls_cost_little_on_one_thread() -> None:
    layer = folded_layer((torch.randn(64, 1, 31, 9), (15, 4)))
    with torch.no_grad():
        layer.kernels[0][::2] = 0
    size = (1, 64, 36, 36)
    assert isinstance(compact(layer, input_size=size), FoldedLargeKernel)
    assert isinstance(compact(layer, CostModel.one_thread(), input_size=size), GroupedKernels)


def test_groups_are_filled_up_to_blocks() -> None:
    layer = folded_layer((torch.randn(128, 1, 31, 9), (15, 4)))
    with torch.no_grad():
        layer.kernels[0][:70] = 0
    small, x = compact(layer, input_size=(4, 128, 56, 56)), torch.randn(1, 128, 8, 8)
    (row,) = small.compaction
    assert row.channels_kept == 64  # 58 and 6 dead ones, four whole blocks of 16
    assert row.nonzero == 58 * 279
    assert row.realized == 64 * 279
    torch.testing.assert_close(small(x), layer(x), rtol=1e-5, atol=1e-4)


def test_extents_are_distinguished() -> None:
    layer = folded_layer((torch.randn(8, 1, 21, 1, dtype=torch.float64), (10, 0)))
    with torch.no_grad():
        layer.kernels[0][:4, :, :8] = 0
        layer.kernels[0][:4, :, -8:] = 0
    small, x = compact(layer, FREE), torch.randn(1, 8, 30, 4, dtype=torch.float64)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-12, atol=1e-12)
    assert sorted(kernel.kernels[0].shape[2] for kernel in small.kernels) == [5, 21]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_channels_of_an_extent_stay_together(count: int) -> None:
    """A few channels that only keep the small square must not be computed with the large kernel of the others."""
    layer = folded_layer((torch.randn(8, 1, 9, 9, dtype=torch.float64), (4, 4)))
    with torch.no_grad():
        outer = torch.ones(9, 9, dtype=torch.bool)
        outer[3:6, 3:6] = False
        layer.kernels[0][:count, :, outer] = 0
    small = compact(layer, FREE)
    assert small.compaction.layers[0].realized == small.compaction.layers[0].nonzero == count * 9 + (8 - count) * 81


def test_many_extents_are_few_groups() -> None:
    layer, x = folded_layer((torch.randn(32, 1, 63, 1, dtype=torch.float64), (31, 0))), torch.randn(1, 32, 70, 2)
    with torch.no_grad():
        for channel in range(32):
            layer.kernels[0][channel, :, : 31 - channel] = 0
            layer.kernels[0][channel, :, 32 + channel :] = 0
    small = compact(layer, FREE)
    torch.testing.assert_close(small(x.double()), layer(x.double()), rtol=1e-12, atol=1e-12)
    (row,) = small.compaction
    assert row.nonzero < row.realized < 0.65 * row.dense
    assert 2 <= len(small.kernels) <= 5


def test_deterministic() -> None:
    model = mask(alive("slak_nano"), "tile", 0.5)
    first, second = compact(model, FREE), compact(model, FREE)
    assert list(first.state_dict()) == list(second.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_random_numbers_are_left_alone() -> None:
    model = mask(alive("shiftwise_nano"), "channel", 0.5)
    state = torch.get_rng_state()
    compact(model, FREE)
    assert torch.equal(torch.get_rng_state(), state)
