"""Compacting: equal outputs, what is dead is not computed, and a report that does not flatter."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import widekernel
from tests.models.zoo import alive, assert_near, assert_same_state, images, snapshot
from tests.sparsity.nets import check_same_network
from widekernel import ops
from widekernel.errors import ArgumentError, ShapeError
from widekernel.layers import (
    DepthwiseConv2d,
    FoldedLargeKernel,
    FoldedPartialChannels,
    KernelSource,
    LargeKernel,
    PartialChannels,
    Rect,
    Rectangles,
)
from widekernel.layers.grouped import ChannelGroup, GroupedKernels
from widekernel.transforms.compaction import CostModel, compact, compact_report

# Only multiply-accumulates count, so that everything dead goes even in layers too small for it to pay.
FREE = CostModel(move=0, outside=0, call=0, group=0, block=1, ragged=1, fill=0)
NETWORKS = [
    "slak_nano",
    "slak_nano_square",
    "slak_nano_without_bn",
    "slak_reg_nano",
    "slak_pw_nano",
    "slak_pww_nano",
    "replknet_nano",
    "shiftwise_nano",
    "shiftwise_nano_without_ghosts",
    "shiftwise_v1_nano",
    "roadmap_nano",
]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def kernels(module: nn.Module) -> list[tuple[Tensor, int]]:
    """List the trained kernels of large-kernel layers and depthwise convolutions, with their channels."""
    found = []
    for part in module.modules():
        if isinstance(part, KernelSource) and hasattr(part, "rects"):
            found += [(p, part.channels) for p in part.parameters() if p.dim() == 4 and p.shape[-1] > 1]
        elif isinstance(part, DepthwiseConv2d):
            found.append((part.weight, part.out_channels))
    return found


@torch.no_grad()
def mask(module: nn.Module, granularity: str, share: float, seed: int = 0) -> nn.Module:
    """Set a share of the tiles, of the branches (a channel's kernel in one parameter) or of the channels to zero."""
    generator = torch.Generator().manual_seed(seed)
    dead: dict[int, Tensor] = {}
    for kernel, channels in kernels(module):
        if granularity == "channel":
            # The same channels in all kernels of a layer, which have as many and follow one another.
            chosen = dead.setdefault(channels, torch.rand(channels, generator=generator) < share)
            kernel.view(channels, -1)[chosen] = 0
        elif granularity == "branch":
            kernel.view(channels, -1)[torch.rand(channels, generator=generator) < share] = 0
        else:
            kernel[torch.rand(len(kernel), generator=generator) < share] = 0
    return module


def grouped(module: nn.Module) -> list[GroupedKernels]:
    return [part for part in module.modules() if isinstance(part, GroupedKernels)]


def folded_layer(*rects: tuple[Tensor, tuple[int, int]]) -> FoldedLargeKernel:
    channels = rects[0][0].shape[0]
    return FoldedLargeKernel([Rect(*rect) for rect in rects], torch.randn(channels, dtype=rects[0][0].dtype)).eval()


def crossed(channels: int = 4, big: int = 9, small: int = 3) -> FoldedLargeKernel:
    return folded_layer(
        (torch.randn(channels, 1, big, small, dtype=torch.float64), (big // 2, small // 2)),
        (torch.randn(channels, 1, small, big, dtype=torch.float64), (small // 2, big // 2)),
    )


# ---- Equal outputs


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.3, 0.9))])
@pytest.mark.parametrize("granularity", ["tile", "branch", "channel"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_of_networks(name: str, granularity: str, share: float) -> None:
    """Against the masked network in its training form, so that what folding rounds counts too."""
    model, x = alive(name), images(batch=1)
    with torch.no_grad():
        unmasked = model(x)
        mask(model, granularity, share)
        # The kernels have a say in the output that is far beyond the tolerance.
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
    """Random rectangles with random anchors, in which rows, columns, kernels and channels are dead."""
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
        assert row.realised <= row.dense
        assert row.channels_kept <= row.channels


@given(layers(), st.integers(0, 3), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_outputs_of_layers_on_some_channels(layer: FoldedLargeKernel, ghosts: int, seed: int) -> None:
    """The output holds worked channels first, then ghosts; so it must stay."""
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
    assert row.dense == row.nonzero == row.realised
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


# ---- What ran


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
    assert (row.channels, row.channels_kept, row.dense, row.nonzero, row.realised) == (4, 3, 4 * 54, 81, 81)
    assert row.reason == ""


def test_a_rectangle_that_is_dead_everywhere_vanishes() -> None:
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


def test_a_layer_that_is_dead_altogether_is_its_bias() -> None:
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
    """The first strip takes in the small square when the layer is folded; it must not be kept for it."""
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
    assert work == [sum(row.dense for row in mixers), sum(row.realised for row in mixers)]
    assert work[1] == sum(row.nonzero for row in mixers)
    assert 0.3 < work[1] / work[0] < 0.7


# ---- Groups and prices


def test_no_group_that_does_not_pay() -> None:
    layer = crossed()
    with torch.no_grad():
        for kernel in layer.kernels:
            kernel[1] = 0
    dear = compact(layer, CostModel(group=1e9))
    assert isinstance(dear, FoldedLargeKernel)
    (row,) = dear.compaction
    assert row.realised == row.dense
    assert row.reason == "computing 1 dead channels costs less than gathering the others"


def test_few_pixels_make_groups_dearer() -> None:
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
    assert row.realised == 64 * 279
    torch.testing.assert_close(small(x), layer(x), rtol=1e-5, atol=1e-4)


def test_extents_are_told_apart() -> None:
    layer = folded_layer((torch.randn(8, 1, 21, 1, dtype=torch.float64), (10, 0)))
    with torch.no_grad():
        layer.kernels[0][:4, :, :8] = 0
        layer.kernels[0][:4, :, -8:] = 0
    small, x = compact(layer, FREE), torch.randn(1, 8, 30, 4, dtype=torch.float64)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-12, atol=1e-12)
    assert sorted(kernel.kernels[0].shape[2] for kernel in small.kernels) == [5, 21]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_channels_of_an_extent_stay_together(count: int) -> None:
    """A few channels that keep the small square only must not be computed as the large ones that are many."""
    layer = folded_layer((torch.randn(8, 1, 9, 9, dtype=torch.float64), (4, 4)))
    with torch.no_grad():
        outer = torch.ones(9, 9, dtype=torch.bool)
        outer[3:6, 3:6] = False
        layer.kernels[0][:count, :, outer] = 0
    small = compact(layer, FREE)
    assert small.compaction.layers[0].realised == small.compaction.layers[0].nonzero == count * 9 + (8 - count) * 81


def test_many_extents_are_few_groups() -> None:
    layer, x = folded_layer((torch.randn(32, 1, 63, 1, dtype=torch.float64), (31, 0))), torch.randn(1, 32, 70, 2)
    with torch.no_grad():
        for channel in range(32):
            layer.kernels[0][channel, :, : 31 - channel] = 0
            layer.kernels[0][channel, :, 32 + channel :] = 0
    small = compact(layer, FREE)
    torch.testing.assert_close(small(x.double()), layer(x.double()), rtol=1e-12, atol=1e-12)
    (row,) = small.compaction
    assert row.nonzero < row.realised < 0.65 * row.dense
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


# ---- Hidden units


@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "convnext_isotropic_nano"])
def test_dead_hidden_units_are_removed(name: str) -> None:
    model = alive(name).double()
    pairs = [(m.fc1, m.fc2) for m in model.modules() if hasattr(m, "fc1") and hasattr(m, "fc2")]
    pairs += [(m.pw1.conv, m.pw2.conv) for m in model.modules() if hasattr(m, "preffn_bn")]
    with torch.no_grad():
        for first, second in pairs:
            first.weight[::3] = 0
            second.weight[:, 1::3] = 0
    small, x = compact(model), images().double()
    with torch.no_grad():
        assert_near(small(x), model(x), 1e-12)
    rows = [row for row in small.compaction if row.kind in ("Mlp", "FeedForwardBlock")]
    assert len(rows) == len(pairs) > 0
    for row, (first, _) in zip(rows, pairs):
        units = first.weight.shape[0]
        assert row.channels == units
        # RepLKNet folds a norm into the rows: the bias of a dead row is not zero, and its constant is moved.
        assert row.channels_kept == len(range(2, units, 3))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in widekernel.fold(model).parameters())


def test_units_under_a_response_norm_stay() -> None:
    model = alive("shiftwise_nano").double()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "fc1") and hasattr(module, "norm"):
                module.fc2.weight[:, ::2] = 0
    small, x = compact(model), images().double()
    with torch.no_grad():
        assert_near(small(x), model(x), 1e-12)
    assert not any(row.kind == "Mlp" for row in small.compaction)


def test_an_mlp_of_dead_units_only() -> None:
    model = alive("slak_nano").double()
    mlp = model.stages[0].blocks[0].mlp
    with torch.no_grad():
        mlp.fc2.weight.zero_()
    small, x = compact(model), images().double()
    assert small.stages[0].blocks[0].mlp.fc1.out_features == 1
    with torch.no_grad():
        assert_near(small(x), model(x), 1e-12)


# ---- The report


def test_the_report_says_that_scattered_zeros_save_nothing() -> None:
    model = alive("slak_nano")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= torch.rand(weight.shape) < 0.6
    report = compact_report(model)
    for row in report:
        assert row.realised == row.dense
        assert row.nonzero < row.dense
        assert row.reason
    assert any("lie between live taps" in row.reason for row in report)
    assert any("computed like other weights" in row.reason for row in report)


def test_the_report_names_layers_that_cannot_be_folded() -> None:
    model = mask(alive("slak_pw_nano_truncated"), "channel", 0.5)
    with pytest.warns(UserWarning, match="not folded"):
        report = compact_report(model)
    row = next(row for row in report if row.name == "stages.0.blocks.0.mixer")
    assert row.reason == "not folded: a branch equals no single kernel near the borders"


def test_the_report_as_text_and_as_json() -> None:
    report = compact_report(mask(alive("slak_nano"), "channel", 0.5), FREE)
    assert "stages.0.blocks.0.mixer: 16 -> " in str(report)
    rows = json.loads(json.dumps(report.to_dict()))
    assert rows[0]["name"] == "stages.0.blocks.0.mixer"
    assert rows[0]["realised"] < rows[0]["dense"]


def test_compacting_twice_changes_nothing() -> None:
    once = compact(mask(alive("shiftwise_nano"), "channel", 1.0), FREE)
    twice = compact(once, FREE)
    assert list(twice.state_dict()) == list(once.state_dict())
    assert compact_report(twice) == compact_report(once)


# ---- What can be done with the result


@pytest.fixture
def small() -> nn.Module:
    return compact(mask(alive("slak_nano"), "branch", 0.5), FREE)


def test_state_dicts(small: nn.Module) -> None:
    other = compact(mask(alive("slak_nano"), "branch", 0.5), FREE)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        other.head.fc.weight.add_(1)
        other.load_state_dict(torch.load(file))
    check_same_network(other, small, images())


def test_a_state_of_other_groups_is_refused() -> None:
    kernel = torch.randn(2, 1, 3, 3)
    ours, theirs = (
        GroupedKernels([ChannelGroup([Rect.centered(kernel)], torch.zeros(2), put, put)], torch.zeros(4), torch.zeros(4))
        for put in ([0, 2], [1, 3])
    )
    with pytest.raises(RuntimeError, match="take_0 names other channels in the file: compact the same masked network"):
        ours.load_state_dict(theirs.state_dict())


def test_copies_and_pickles(small: nn.Module) -> None:
    assert len(grouped(small))
    check_same_network(copy.deepcopy(small), small, images())
    check_same_network(pickle.loads(pickle.dumps(small)), small, images())
    assert compact_report(copy.deepcopy(small)) == small.compaction


def test_other_types(small: nn.Module) -> None:
    with torch.no_grad():
        double = copy.deepcopy(small).double()(images().double())
        assert_near(small(images()).double(), double, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert_near(small(images()).float(), double.float(), 0.1)


@pytest.mark.parametrize("name", ["slak_nano", "shiftwise_nano"])
def test_compiled_and_exported(name: str) -> None:
    torch._dynamo.reset()
    share = 0.5 if name == "slak_nano" else 1.0
    small = compact(mask(alive(name).double(), "branch", share), FREE)
    assert grouped(small)
    x = images(batch=3).double()
    with torch.no_grad():
        want = small(x)
        assert_near(torch.compile(small, fullgraph=True, backend="aot_eager")(x), want, 1e-12)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(small, (images().double(),), dynamic_shapes=({0: batch},))
        assert_near(program.module()(x), want, 1e-12)


@pytest.mark.gpu
def test_on_a_gpu(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    # By default the convolutions of PyTorch, with which ours are compared, round to TF32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.no_grad():
        want = small(images())
        assert_near(copy.deepcopy(small).cuda()(images().cuda()).cpu(), want, 1e-3)


# ---- Errors


def test_not_a_module() -> None:
    with pytest.raises(ArgumentError, match=r"given a dict: it takes a network"):
        compact({})  # type: ignore[type-var]


def test_no_weights() -> None:
    with pytest.raises(ArgumentError, match="meta device: zeros can be told from weights only"):
        compact(nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize("size", [(3, 64, 64), (1, 3, 0, 64)])
def test_a_wrong_batch(size: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="must be four positive numbers"):
        compact(nn.Linear(2, 2), input_size=size)


@pytest.mark.parametrize("wrong", [{"mac": -1}, {"block": 0}, {"ragged": 0.5}])
def test_wrong_prices(wrong: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="prices must be at least 0, block and ragged at least 1"):
        CostModel(**wrong)


def test_groups_that_overlap() -> None:
    group = ChannelGroup([Rect.centered(torch.randn(2, 1, 3, 3))], torch.zeros(2), [0, 1], [0, 1])
    with pytest.raises(ArgumentError, match=r"must be different channels of 0\.\.3"):
        GroupedKernels([group, group], torch.zeros(4), torch.zeros(4))
