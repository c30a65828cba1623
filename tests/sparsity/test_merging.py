"""Masks and folding: the merged kernel stays within the union of its branches' masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.zoo import alive
from widekernel.errors import ArgumentError
from widekernel.layers import (
    KernelSource,
    LargeKernel,
    Rectangles,
    SharedStrips,
    ShiftTiles,
    ShuffledStrips,
    SourceGroup,
    SplitStrips,
    TruncatedTiles,
)
from widekernel.sparsity.merging import check_merged_support, merged_support, shared_mask, taps_outside


def _odd(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low // 2, high // 2).map(lambda n: 2 * n + 1)


@st.composite
def sources(draw: st.DrawFn) -> KernelSource:
    channels, big, small = draw(st.integers(1, 3)), draw(_odd(5, 13)), draw(st.sampled_from([1, 3]))
    kind = draw(st.sampled_from(["free", "split", "shared", "shift", "shuffled"]))
    if kind == "split":
        strips: KernelSource = SplitStrips(channels, big, small)
    elif kind == "shared":
        strips = SharedStrips(channels, big, small)
    elif kind == "shift":
        strips = ShiftTiles(channels, big, small, draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.booleans()))
    elif kind == "shuffled":
        strips = ShuffledStrips(channels, big, small, draw(st.integers(1, 2)))
    else:
        sizes = draw(st.lists(st.tuples(_odd(1, 9), _odd(1, 9)), min_size=1, max_size=4))
        return Rectangles(channels, sizes, draw(st.lists(st.integers(1, 3), min_size=len(sizes), max_size=len(sizes))))
    return SourceGroup([strips, Rectangles(channels, [(small, small)])]) if draw(st.booleans()) else strips


@st.composite
def masked_layers(draw: st.DrawFn) -> tuple[LargeKernel, dict[str, Tensor]]:
    """Draw a masked layer, and masks of single weights, tiles or whole channels for some or all of its parameters."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    source = draw(sources())
    norms = [nn.BatchNorm2d(source.channels) for _ in range(source.num_branches)] if draw(st.booleans()) else None
    layer = LargeKernel(source, norms, draw(st.booleans())).double().eval()
    for norm in layer.norms:
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
    masks = {}
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 4 and "gates" not in name and draw(st.integers(0, 3)):
            shape = draw(st.sampled_from([parameter.shape, (len(parameter), 1, 1, 1)]))
            mask = (torch.rand(shape) < draw(st.sampled_from([0.0, 0.3, 0.7]))).expand(parameter.shape).clone()
            masks[name] = mask
            parameter.data *= mask
    return layer, masks


@given(masked_layers())
@settings(max_examples=150, deadline=None)
def test_folding_adds_no_weight_outside_the_masks(masked: tuple[LargeKernel, dict[str, Tensor]]) -> None:
    layer, masks = masked
    assert not any(rect.kernel.any() for rect in taps_outside(layer, masks))
    check_merged_support(layer, masks)


@given(masked_layers())
@settings(max_examples=100, deadline=None)
def test_the_union_is_as_small_as_possible(masked: tuple[LargeKernel, dict[str, Tensor]]) -> None:
    """If nothing cancels out, every tap of the union is nonzero in the folded kernel."""
    layer, masks = masked
    layer.identity = False
    for norm in layer.norms:
        norm.weight.data.abs_().add_(0.1)
    for parameter in layer.source.parameters():
        parameter.data.abs_()
    for rect, folded in zip(merged_support(layer, masks), layer.folded().rects(), strict=True):
        assert rect.anchor == folded.anchor
        assert torch.equal(rect.kernel, folded.kernel != 0)


def test_a_union_computed_by_hand() -> None:
    """Crossed strips and a square that the first strip absorbs."""
    layer = LargeKernel(Rectangles(1, [(5, 3), (3, 5), (3, 3)]))
    masks = {
        f"source.kernels.{i}": torch.zeros(1, 1, *size, dtype=torch.bool) for i, size in enumerate(((5, 3), (3, 5), (3, 3)))
    }
    masks["source.kernels.0"][0, 0, 0, 1] = True
    masks["source.kernels.2"][0, 0, 2, 2] = True
    tall, wide = merged_support(layer, masks)
    assert tall.size == (5, 3)
    assert tall.kernel[0, 0].nonzero().tolist() == [[0, 1], [3, 2]]
    assert not wide.kernel.any()


def test_parameters_without_masks_are_live() -> None:
    (rect,) = merged_support(LargeKernel(Rectangles(2, [(5, 5), (3, 3)])), {})
    assert rect.kernel.dtype == torch.bool
    assert bool(rect.kernel.all())


def test_only_the_identity_is_excluded() -> None:
    layer = LargeKernel(Rectangles(2, [(5, 5)]), identity=True)
    masks = {"source.kernels.0": torch.zeros(2, 1, 5, 5, dtype=torch.bool)}
    with torch.no_grad():
        layer.source.kernels[0].zero_()
    check_merged_support(layer, masks)
    assert layer.folded().kernels[0][0, 0, 2, 2] == 1
    with torch.no_grad():
        layer.source.kernels[0][1, 0, 0, 4] = 1
    (outside,) = taps_outside(layer, masks)
    assert outside.kernel.nonzero().tolist() == [[1, 0, 0, 4]]


def test_a_network_is_checked_by_layer() -> None:
    model = alive("slak_nano")
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.dim() > 1}
    with pytest.raises(ArgumentError, match=r"stages.0.blocks.0.mixer: \d+ taps of the folded 31x3 kernel .* multiply the"):
        check_merged_support(model, masks)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    check_merged_support(model, masks)


def test_the_message_names_the_tap() -> None:
    layer = LargeKernel(Rectangles(2, [(5, 3)]))
    masks = {"source.kernels.0": torch.ones(2, 1, 5, 3, dtype=torch.bool)}
    masks["source.kernels.0"][1, 0, 0, 2] = False
    with pytest.raises(ArgumentError, match=r"the layer: 1 taps of the folded 5x3 .* in channel 1 at \(-2, \+1\) from"):
        check_merged_support(layer, masks)


@given(
    st.lists(st.tuples(st.tuples(_odd(1, 9), _odd(1, 9)), st.integers(1, 3)), min_size=1, max_size=4), st.integers(0, 2**20)
)
@settings(max_examples=80, deadline=None)
def test_shared_masks(branches: list[tuple[tuple[int, int], int]], seed: int) -> None:
    """Branches become denser, the merged kernel does not, and sharing again changes nothing."""
    torch.manual_seed(seed)
    sizes, steps = [size for size, _ in branches], [step for _, step in branches]
    layer = LargeKernel(Rectangles(2, sizes, steps))
    masks = {f"source.kernels.{i}": torch.rand(2, 1, *size) < 0.4 for i, size in enumerate(sizes)}
    shared = shared_mask(layer, masks)
    assert list(shared) == list(masks)
    assert all(bool((new | ~old).all()) for new, old in zip(shared.values(), masks.values()))
    again = shared_mask(layer, shared)
    assert all(torch.equal(again[name], shared[name]) for name in shared)

    def offsets(some: dict[str, Tensor]) -> set[tuple[int, ...]]:
        """Return the live taps of all rectangles by their distance from the output pixel."""
        return {
            (channel, row - rect.anchor[0], column - rect.anchor[1])
            for rect in merged_support(layer, some)
            for channel, row, column in rect.kernel[:, 0].nonzero().tolist()
        }

    assert offsets(shared) == offsets(masks)
    live = offsets(shared)
    for name, ((kh, kw), step) in zip(shared, branches):
        places = shared[name][:, 0].nonzero().tolist()
        own = {(c, (row - kh // 2) * step, (column - kw // 2) * step) for c, row, column in places}
        at = {(r * step, k * step) for r in range(-(kh // 2), kh // 2 + 1) for k in range(-(kw // 2), kw // 2 + 1)}
        assert own == {(c, r, k) for c, r, k in live if (r, k) in at}


def test_a_prefix_selects_the_layer() -> None:
    model = alive("slak_nano")
    mixer = model.stages[1].blocks[0].mixer
    prefix = "stages.1.blocks.0.mixer."
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.dim() > 1}
    own = {name.removeprefix(prefix): mask for name, mask in masks.items() if name.startswith(prefix)}
    for ours, theirs in zip(merged_support(mixer, masks, prefix), merged_support(mixer, own), strict=True):
        assert torch.equal(ours.kernel, theirs.kernel)
    assert all(name.startswith(prefix) for name in shared_mask(mixer, masks, prefix))


# ---- Errors


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("source.kernel.0", torch.ones(2, 1, 5, 5) > 0, r"no such parameter\. Did you mean 'source\.kernels\.0'"),
        ("source.kernels.0", torch.ones(2, 1, 5, 5), r"is torch.float32 \(2, 1, 5, 5\): it must be torch.bool"),
        ("source.kernels.0", torch.ones(2, 1, 5, 3) > 0, r"of the shape of the parameter, \(2, 1, 5, 5\)"),
    ],
)
def test_masks_that_do_not_fit_the_layer(name: str, mask: Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        merged_support(LargeKernel(Rectangles(2, [(5, 5)])), {name: mask})


def test_layers_without_a_merged_kernel() -> None:
    layer = LargeKernel(TruncatedTiles(ShuffledStrips(2, 9, 3)))
    with pytest.raises(ArgumentError, match="TruncatedTiles has no merged kernel"):
        merged_support(layer, {})
    check_merged_support(layer, {})


def test_shared_masks_of_tiles() -> None:
    with pytest.raises(ArgumentError, match="has a SplitStrips source: a mask shared by all branches"):
        shared_mask(LargeKernel(SplitStrips(2, 9, 3)), {})


def test_a_folded_form_of_another_layer() -> None:
    layer, other = LargeKernel(Rectangles(2, [(5, 5)])), LargeKernel(Rectangles(2, [(3, 3)]))
    with pytest.raises(ArgumentError, match=r"has rectangles \[\(3, 3\)\] but the layer folds to \[\(5, 5\)\]"):
        taps_outside(layer, {}, folded=other.folded())
