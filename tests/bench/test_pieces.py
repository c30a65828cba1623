"""Pieces of a network: what is observed, what runs while it is, and how pieces add up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from widekernel import ops
from widekernel.bench import pieces
from widekernel.bench.pieces import Calls, PieceRow, accelerated, flop_of, measure_pieces, observe, piece_of, rows_of
from widekernel.bench.precision import BFLOAT16, FLOAT32, INT8, Precision
from widekernel.bench.spans import Span, Spans, native_callers
from widekernel.bench.timing import WallClock
from widekernel.layers import DepthwiseConv2d, FoldedLargeKernel, Rect
from widekernel.layers.pointwise import PointwiseConv2d, PointwiseGradConv2d, PointwiseLinear
from widekernel.ops.cpu import library
from widekernel.ops.cpu.pointwise import PackedBlock, reason_against
from widekernel.transforms.acceleration.fusion.fused import FusedBlock

pytestmark = pytest.mark.usefixtures("untimed")
needs_native = pytest.mark.skipif(library.load().reason is not None, reason="the native library cannot run")


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = DepthwiseConv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.fc1, self.act, self.fc2 = nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.fc2(self.act(self.fc1(y))).permute(0, 3, 1, 2)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.GELU())
        self.stages = nn.Sequential(Block(32), nn.Sequential(nn.Conv2d(32, 64, 2, 2), Block(64)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)))


def ticking(times: list[float]):
    return lambda: times.pop(0)


def test_time_inside_a_module_belongs_to_the_innermost_one() -> None:
    network = nn.Sequential(nn.Sequential(nn.ReLU()), nn.GELU())
    x = torch.zeros(1)
    # begin, begin 0, begin 0.0, end, end, begin 1, end, end
    spans = Spans(network, ticking([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0]))
    with spans.observing():
        network(x)
    found = {span.path: span.seconds for span in spans.take()}
    assert found == {"0.0": 3.0, "0": 2.0 + 4.0, "1": 6.0, "": 1.0 + 5.0 + 7.0}
    assert sum(found.values()) == 28.0 and not spans.take()


def test_nothing_is_observed_outside_of_the_block_or_of_the_network() -> None:
    before = [vars(kind)["__call__"] for kind in (nn.Module, FusedBlock, *native_callers())]
    network, other = nn.Sequential(nn.ReLU()), nn.ReLU()
    spans = Spans(network)
    with spans.observing():
        other(torch.zeros(1))
    with pytest.raises(TypeError), spans.observing():
        network(None)
    assert [span.path for span in spans.take()] == ["0", ""], "calls that fail are recorded as well"
    network(torch.zeros(1))
    assert not spans.take()
    assert [vars(kind)["__call__"] for kind in (nn.Module, FusedBlock, *native_callers())] == before


@needs_native
def test_a_block_is_fused_while_it_is_observed() -> None:
    network = Network().eval()
    x = torch.randn(1, 3, 32, 32)
    fast = accelerated(network, x, "NCHW")
    spans = Spans(fast)
    with torch.inference_mode(), ops.trace() as alone:
        want = fast(x)
    with torch.inference_mode(), spans.observing(), ops.trace() as watched:
        got = fast(x)
    assert torch.equal(want, got) and alone.fused == watched.fused and alone.calls == watched.calls
    found = spans.take()
    packed = [span for span in found if span.is_native and isinstance(span.owner, PackedBlock)]
    assert len(packed) == len(watched.fused)
    assert len({id(span) for span in found if not span.is_native}) == len(
        {span.path for span in found if not span.is_native}
    )


def test_a_native_call_counts_its_operations() -> None:
    if library.load().reason is not None:
        pytest.skip("the native library cannot run")
    block = PackedBlock(torch.randn(12, 5), None, "relu", torch.randn(7, 12))
    span = Span("stages.0.block", block, True, (), block(torch.randn(2, 5, 3, 4)))
    assert flop_of(span) == 2 * (5 * 12 + 12 * 7) * 2 * 3 * 4 and piece_of(span) == pieces.FUSED


def test_operations_of_depthwise_layers_are_those_on_pixels() -> None:
    problem = ops.problem.Problem("depthwise_sum", "cpu", torch.float32, (2, 3, 4, 5), ((7, 3),), ((3, 1),))
    ones = torch.ones(2, 3, 4, 5), torch.ones(3, 1, 7, 3)
    taps = torch.nn.functional.conv2d(*ones, padding=(3, 1), groups=3).sum().item()
    assert pieces._flop_of_problem(problem) == 2 * taps


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (PointwiseLinear(5, 7), (3, 4, 5)),
        (PointwiseConv2d(5, 7, 1), (5, 3, 4)),
        (PointwiseGradConv2d(5, 7, 1), (5, 3, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_swapped_layers_count_their_operations(layer: nn.Module, size: tuple[int, ...], batch: int) -> None:
    (span,) = observed(layer, torch.randn(batch, *size))
    assert not span.has_native and flop_of(span) == 2 * 5 * 7 * 3 * 4 * batch


@pytest.mark.parametrize("on_pytorch", [True, False])
def test_depthwise_layers_count_once_whatever_computes_them(on_pytorch: bool, spoil) -> None:
    if on_pytorch:
        spoil(lambda problem: True)
    folded = FoldedLargeKernel([Rect(torch.ones(8, 1, 7, 5), (3, 2))], torch.zeros(8))
    for layer in (DepthwiseConv2d(8, 8, (7, 5), padding=(3, 2), groups=8), folded):
        with ops.trace() as ran:
            found = observed(layer, torch.randn(2, 8, 16, 16))
        assert len(ran.calls) == 1 and any(span.has_native for span in found) == (ran.backends() == ["native"])
        assert not (on_pytorch and found[-1].has_native)
        taps = nn.functional.conv2d(torch.ones(2, 8, 16, 16), torch.ones(8, 1, 7, 5), padding=(3, 2), groups=8).sum()
        assert sum(map(flop_of, found)) == 2 * taps.item()


@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2), st.sampled_from([1, 2])
)
@settings(max_examples=40, deadline=None)
def test_operations_of_convolutions(extent: int, taps: int, stride: int, pad: int, dilation: int, groups: int) -> None:
    assume(extent + 2 * pad > (taps - 1) * dilation)
    layer = nn.Conv2d(4, 6, (taps, 1), (stride, 1), (pad, 0), (dilation, 1), groups, bias=False)
    nn.init.ones_(layer.weight)
    (span,) = observed(layer, torch.ones(1, 4, extent, 3))
    assert flop_of(span) == 2 * span.output.sum().item()


@torch.inference_mode()
def observed(layer: nn.Module, x: torch.Tensor) -> list[Span]:
    spans = Spans(layer)
    with spans.observing():
        layer(x)
    return spans.take()


@pytest.mark.parametrize(
    ("path", "owner", "piece"),
    [
        ("stem.0", nn.Conv2d(3, 8, 4, 4), pieces.STEM),
        ("stages.1.downsample.1", nn.LayerNorm(8), pieces.DOWN),
        ("stages.0.blocks.0.conv_dw", nn.Conv2d(8, 8, 7, groups=8), pieces.DEPTHWISE),
        ("stages.0.blocks.0.pw1", nn.Conv2d(8, 8, 1), pieces.PRODUCTS),
        ("stages.0.blocks.0.norm", nn.LayerNorm(8), pieces.NORMS),
        ("stages.0.blocks.0.act", nn.GELU(), pieces.ACTIVATIONS),
        ("head.fc", nn.Linear(8, 8), pieces.HEAD),
        ("stages.0", nn.Sequential(), pieces.OTHER),
        ("", nn.Sequential(), pieces.OTHER),
    ],
)
def test_pieces(path: str, owner: nn.Module, piece: str) -> None:
    assert piece_of(Span(path, owner, False)) == piece


def test_pieces_add_up() -> None:
    network = Network().eval()
    made = {"some": lambda: (network, 32)}
    rows = list(measure_pieces(made, [1, 2], None, [FLOAT32], {FLOAT32: 100.0}, 1e-3))
    assert {(row.model, row.batch, row.size, row.layout) for row in rows} == {
        ("some", batch, 32, layout) for batch in (1, 2) for layout in ("NCHW", "NHWC")
    }
    for batch in (1, 2):
        for layout in ("NCHW", "NHWC"):
            *parts, whole = [row for row in rows if (row.batch, row.layout) == (batch, layout)]
            assert whole.piece == pieces.WHOLE and {pieces.STEM, pieces.HEAD, pieces.DEPTHWISE} <= {
                row.piece for row in parts
            }
            for total, key in ((whole.ms, "ms"), (whole.gflop, "gflop"), (whole.calls, "calls"), (1.0, "share")):
                assert math.isclose(sum(getattr(row, key) for row in parts), total, rel_tol=1e-6)
            products = 2 * batch * (64 * 8 * 32 * 32 + 16 * 8 * 64 * 64)
            assert whole.gflop > products / 1e9 and whole.unobserved_ms > 0
    assert [name for name, _ in pieces.columns(rows)][1] == "images" and "products in" not in dict(pieces.columns(rows))
    assert "images" not in dict(pieces.columns(rows[:3]))


def test_products_are_compared_with_the_peak_of_their_precision() -> None:
    parts = [pieces._Part(pieces.FUSED, "a", 1.0, 30e9, packed=True), pieces._Part(pieces.DEPTHWISE, "b", 2.0, 5e9)]
    fields = {"model": "m", "batch": 1, "size": 1, "layout": "NCHW", "precision": "bfloat16"}
    depthwise, fused, whole = rows_of(Calls([parts], 1.0), 40.0, 10.0, **fields)
    assert [row.piece for row in (depthwise, fused, whole)] == [pieces.DEPTHWISE, pieces.FUSED, pieces.WHOLE]
    assert math.isclose(fused.peak_share, 30 / 40) and math.isclose(depthwise.peak_share, 5 / 10 / 2)
    assert math.isclose(whole.peak_share, (30 / 40 + 5 / 10) / 3)


@pytest.mark.parametrize("precision", [BFLOAT16, INT8], ids=lambda precision: precision.name)
def test_pieces_in_lower_precisions(precision: Precision) -> None:
    reason = reason_against(precision.name)
    if reason is not None:
        pytest.skip(reason)
    made, peaks = {"some": lambda: (Network().eval(), 32)}, {FLOAT32: 1.0, precision: 2.0}
    with ops.trace() as trace:
        rows = list(measure_pieces(made, [1], None, [precision], peaks, 1e-3))
    assert {row.precision for row in rows} == {precision.name} and "products in" in dict(pieces.columns(rows))
    assert any(call.precision == precision.name for call in trace.fused)
    assert {pieces.FUSED, pieces.WHOLE} <= {row.piece for row in rows}


def test_the_slowest_and_the_fastest_calls_do_not_count() -> None:
    durations = [9.0, 1.0, 2.0, 3.0, 3.0, 4.0, 90.0, 0.5]
    network = nn.ReLU()
    x = torch.zeros(1)
    spans = Spans(network, ticking([moment for seconds in durations for moment in (0.0, seconds)]))
    found = []
    with spans.observing():
        for _ in durations:
            network(x)
            found.append(spans.take())
    calls = pieces.middle_of(found, [1.0, 2.0, 9.0])
    assert sorted(part.seconds for parts in calls.observed for part in parts) == [2.0, 3.0, 3.0, 4.0]
    (only, whole) = rows_of(calls, 20.0, 10.0, model="m", batch=1, size=1, layout="NCHW", precision="float32")
    assert isinstance(only, PieceRow) and only.ms == whole.ms == 3000.0 and whole.unobserved_ms == 2000.0
    assert isinstance(calls, Calls)


def test_unobserved_calls_are_timed_in_turn() -> None:
    network = nn.Sequential(nn.ReLU())
    calls = observe(network, torch.zeros(3), 1e-4, WallClock())
    assert calls.unobserved > 0 and len(calls.observed) >= 3 and all(len(parts) == 2 for parts in calls.observed)
