"""Single layers as TorchScript, by scripting and by tracing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.layers.helpers import assert_close, image
from tests.layers.test_large_kernel import SOURCES, layer
from widekernel import ops
from widekernel.layers import DepthwiseConv2d, LargeKernel, PartialChannels, PointwiseConv2d, PointwiseLinear, Rect
from widekernel.layers.grouped import ChannelGroup, GroupedKernels
from widekernel.layers.sources import RectSource

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning")


def check(module: nn.Module, *images: Tensor, scripted: bool = True) -> None:
    """Compare with the trace of the first image, and with the scripted module."""
    module = module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        forms = [torch.jit.trace(module, images[0], check_trace=False)]
    forms += [torch.jit.script(module)] if scripted else []
    for form in forms:
        assert not [name for name in torch.jit.export_opnames(form) if name.startswith("widekernel")]
        for x in images:
            assert_close(form(x), module(x))


@pytest.mark.parametrize("norm", ["bn", None], ids=["bn", "no-norm"])
@pytest.mark.parametrize("name", SOURCES)
def test_large_kernels(name: str, norm: str | None) -> None:
    check(layer(name, norm, identity=True), image(), image(height=21, width=4, batch=3))


@pytest.mark.parametrize("name", SOURCES)
def test_folded_large_kernels(name: str) -> None:
    folded = layer(name).folded()
    x = image()
    check(folded, x, image(height=21, width=4, batch=3))
    assert_close(torch.jit.script(folded)(x, True), folded(x, relu=True))


def test_some_channels_only() -> None:
    partial = PartialChannels(layer("crossed"), [0, 2, 4], 6)
    check(partial, image(6), image(6, 5, 12))
    check(partial.folded(), image(6), image(6, 5, 12))
    check(PartialChannels(layer("crossed"), [0, 1, 2], 3), image())


@pytest.mark.parametrize("scale", [0.0, 1.0], ids=["constant", "passing"])
@pytest.mark.parametrize("source", [None, [1, 0, 2, 3, 4, 5, 6]], ids=["in-place", "reordered"])
def test_groups_of_channels(source: list[int] | None, scale: float) -> None:
    wide, tall, square = (torch.randn(n, 1, *size).double() for n, size in ((3, (2, 12)), (3, (5, 5)), (2, (3, 3))))
    groups = [
        ChannelGroup([Rect.centered(tall), Rect(wide, (0, 11))], torch.randn(3).double(), [0, 2, 4], [1, 3, 0]),
        ChannelGroup([Rect.centered(square)], torch.randn(2).double(), [5, 1], [4, 5]),
    ]
    module = GroupedKernels(groups, torch.full((7,), scale).double(), torch.randn(7).double(), source)
    with torch.no_grad():
        check(module, image(7), image(7, 4, 11, 1))


def test_convolutions_and_linear_layers() -> None:
    check(DepthwiseConv2d(3, 3, 7, padding=3, groups=3).double(), image(), image(3, 4, 12))
    check(DepthwiseConv2d(3, 3, 7, stride=2, padding=3, groups=3).double(), image())
    check(PointwiseConv2d(3, 5, 1).double(), image(), image(3, 4, 12))
    check(PointwiseLinear(3, 5).double(), image().permute(0, 2, 3, 1), image(3, 4, 12).permute(0, 2, 3, 1))


class CustomSource(RectSource):
    channels, num_branches = 3, 1

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 1, 4, 9))

    def rects(self) -> list[Rect]:
        return [Rect(self.kernel, (self.kernel.shape[2] - 1, 0))]

    def published_macs(self, height: int, width: int) -> int:
        return self.kernel.numel() * height * width


def test_a_source_with_rectangles_alone_is_recorded() -> None:
    module = LargeKernel(CustomSource(), [nn.BatchNorm2d(3)]).double().eval()
    x = image()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks the graph for a size
        graph = torch.jit.trace(module, x, check_trace=False)
    with ops.trace() as trace:
        assert_close(graph(x), module(x))
    assert len(trace.calls) == 1
