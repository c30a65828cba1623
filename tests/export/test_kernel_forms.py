"""Large kernels as strips and as dense kernels, with padded channels."""

from __future__ import annotations

import pytest
import torch

from tests.models.zoo import alive, assert_near, images
from widekernel import fold
from widekernel.export.base import KernelRule
from widekernel.export.formats import FORMATS
from widekernel.export.kernel_forms import GraphKernels, dense_rect, prefers_dense, with_graph_kernels
from widekernel.layers import FoldedLargeKernel
from widekernel.layers.rect import Rect

ANYTHING, NOTHING = KernelRule(dense_up_to=1e9), KernelRule(dense_up_to=0.0)


def folded_layer(channels: int = 5) -> FoldedLargeKernel:
    """Return a layer of a wide and a tall strip whose anchors are not in the middle, and a small square."""
    sizes, anchors = [(3, 10), (9, 2), (3, 3)], [(1, 4), (6, 0), (1, 1)]
    rects = [Rect(torch.randn(channels, 1, *size), anchor) for size, anchor in zip(sizes, anchors)]
    return FoldedLargeKernel(rects, torch.randn(channels)).eval()


def test_the_dense_kernel_covers_all_rectangles() -> None:
    dense = dense_rect(folded_layer().rects())
    assert (dense.size, dense.anchor) == ((9, 10), (6, 4))


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("form", ["strips", "dense"])
@pytest.mark.parametrize("relu", [False, True])
def test_every_form_computes_the_same(form: str, multiple: int, relu: bool) -> None:
    layer, x = folded_layer(), torch.randn(2, 5, 12, 13)
    rects = [dense_rect(layer.rects())] if form == "dense" else layer.rects()
    with torch.no_grad():
        found = GraphKernels(rects, layer.bias, multiple)
        assert_near(found(x, relu), layer(x, relu), 1e-5)
    assert {kernel.shape[0] for kernel in found.kernels} == {8 if multiple == 4 else 5}


@pytest.mark.parametrize(
    ("long", "short", "dense"), [(51, 5, False), (11, 5, False), (9, 5, True), (7, 5, True), (9, 3, False)]
)
def test_short_strips_become_dense(long: int, short: int, dense: bool) -> None:
    rects = [Rect.centered(torch.randn(4, 1, *size)) for size in ((long, short), (short, long))]
    for form in FORMATS.values():
        assert prefers_dense(rects, dense_rect(rects), form.rule) is dense


@pytest.mark.parametrize("name", ["slak_nano", "shiftwise_nano", "replknet_nano"])
def test_networks_compute_the_same(name: str) -> None:
    network, x = fold(alive(name)), images()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for rule in (ANYTHING, NOTHING, KernelRule(0.0, channel_multiple=16)):
        copy, forms = with_graph_kernels(network, rule)
        kinds = [type(module) for module in copy.modules()]
        layers = sum(type(module) is FoldedLargeKernel for module in network.modules())
        assert FoldedLargeKernel not in kinds and kinds.count(GraphKernels) == layers
        assert sum(count for form, count in forms.items() if form != "padded channels") == layers
        with torch.no_grad():
            assert_near(copy(x), network(x))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_the_choice_can_be_forced() -> None:
    network = fold(alive("slak_nano"))
    assert "strips" not in with_graph_kernels(network, NOTHING, "dense")[1]
    assert "dense" not in with_graph_kernels(network, ANYTHING, "strips")[1]


def test_networks_that_are_not_folded_stay_as_they_are() -> None:
    network = alive("slak_nano")
    copy, forms = with_graph_kernels(network, ANYTHING)
    assert forms == {}
    assert [type(module) for module in copy.modules()] == [type(module) for module in network.modules()]
