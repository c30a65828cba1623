"""Sums of some channels in native code against the definition in float64, and which calls it covers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tests.native import instruction_set, needs_native, thread_count
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.layers import FoldedPartialChannels, LargeKernel, PartialChannels, Rectangles
from widekernel.ops.call_trace import PartialCall
from widekernel.ops.cpu import library
from widekernel.ops.partial import Selection, native_partial_sum, partial_depthwise_sum
from widekernel.ops.problem import LAYOUTS, memory_format

pytestmark = needs_native


def arguments(
    selected: list[int],
    others: list[int],
    channels: int,
    sizes: list[tuple[int, int]],
    shape: tuple[int, int, int],
    layout: str = "NHWC",
) -> list[Any]:
    """Draw the arguments of a call: an image of (N, H, W) pixels, and kernels of these sizes."""
    images, height, width = shape
    x = torch.randn(images, channels, height, width).contiguous(memory_format=LAYOUTS[layout])
    kernels = [torch.randn(len(selected), 1, *size) for size in sizes]
    anchors = [(rows // 2, columns // 2) for rows, columns in sizes]
    tables = [torch.tensor(table, dtype=torch.int32) for table in (selected, others)]
    selection = Selection(*tables, *torch.randn(2, len(others), 1, 1))
    return [x, kernels, anchors, torch.randn(len(selected)), selection]


def in_double(values: list[Any]) -> Tensor:
    """Compute the definition in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, Selection):
            return Selection(*map(wide, value))
        return [wide(part) for part in value] if isinstance(value, list) else value

    return partial_depthwise_sum(*[wide(value) for value in values])


def assert_right(values: list[Any]) -> None:
    with torch.no_grad():
        got, want = native_partial_sum(*values), in_double(values)
    assert got is not None
    assert got.is_contiguous(memory_format=memory_format(values[0]))
    assert_close(got.double(), want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))


@st.composite
def problems(draw: st.DrawFn) -> list[Any]:
    channels = draw(st.integers(2, 70))
    order = draw(st.permutations(range(channels)))
    count = draw(st.integers(1, channels))
    selected = order[:count]
    if draw(st.booleans()):
        selected = sorted(selected)
    # Channels may be named twice, or not at all.
    others = order[count:] if draw(st.booleans()) else draw(st.lists(st.integers(0, channels - 1), min_size=1, max_size=40))
    side = st.integers(1, 15)
    sizes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)))
    return arguments(selected, others, channels, sizes, shape, draw(st.sampled_from(list(LAYOUTS))))


@settings(max_examples=25, deadline=None)
@given(problems(), st.sampled_from(library.load().isas or ("",)), st.integers(1, 3))
def test_any_channels(values: list[Any], isa: str, threads: int) -> None:
    with instruction_set(isa), thread_count(threads):
        assert_right(values)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(problems(), st.sampled_from(library.load().isas or ("",)), st.integers(1, 5))
def test_many_more_channels(values: list[Any], isa: str, threads: int) -> None:
    with instruction_set(isa), thread_count(threads):
        assert_right(values)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 3), (5, 5), (51, 3), (3, 51), (13, 13)], ids=str)
def test_every_way_of_computing_sums(size: tuple[int, int], layout: str) -> None:
    """Kernels read in place, through rows that move on, and from packed planes."""
    selected = [channel for channel in range(43) if channel % 4]
    others = list(range(0, 43, 4))
    for shape in ((1, 28, 28), (2, 56, 12)):
        assert_right(arguments(selected, others, 43, [size], shape, layout))
        assert_right(arguments(selected[:16], others, 43, [size], shape, layout))


def layer(channels: int = 20) -> FoldedPartialChannels:
    selected = [channel for channel in range(channels) if channel % 5]
    partial = PartialChannels(LargeKernel(Rectangles(len(selected), [(7, 3), (3, 7)])), selected, channels)
    folded = partial.eval().folded(*torch.randn(2, channels))
    return folded.requires_grad_(False)


def image(channels: int = 20) -> Tensor:
    return torch.randn(2, channels, 9, 8).contiguous(memory_format=torch.channels_last)


def traced(module: nn.Module, x: Tensor) -> tuple[Tensor, list[PartialCall]]:
    with ops.trace() as found:
        y = module(x)
    return y, found.partial


def test_the_folded_layer_makes_one_native_call() -> None:
    module, x = layer(), image()
    y, calls = traced(module, x)
    assert calls == [PartialCall((2, 20, 9, 8), 16)]
    assert_close(y, module.double()(x.double()).float())


def test_a_table_that_changes_counts() -> None:
    module, x = layer(), image()
    module.selected.copy_(module.selected.flip(0))
    module.scale.mul_(2)
    y, calls = traced(module, x)
    assert calls
    assert_close(y, module.double()(x.double()).float())


@pytest.mark.parametrize("name", ["selected", "ghosts"])
@pytest.mark.parametrize("channel", [-1, 20])
def test_channels_outside_the_image(name: str, channel: int) -> None:
    module = layer()
    getattr(module, name)[-1] = channel
    with pytest.raises(ArgumentError, match=r"channels selected and others must lie in 0\.\.19"):
        module(image())


def _hooked(module: FoldedPartialChannels, x: Tensor) -> Tensor:
    module.layer.register_forward_pre_hook(lambda *_: None)
    return x


def _replaced(module: FoldedPartialChannels, x: Tensor) -> Tensor:
    module.layer = nn.Identity()
    return x


def _trained(module: FoldedPartialChannels, x: Tensor) -> Tensor:
    module.requires_grad_(True)
    return x


def _wide_tables(module: FoldedPartialChannels, x: Tensor) -> Tensor:
    module.selected = module.selected.long()
    return x


def _double(module: FoldedPartialChannels, x: Tensor) -> Tensor:
    module.double()
    return x.double()


def _with_gaps(module: FoldedPartialChannels, x: Tensor) -> Tensor:
    return x[..., :-1]


def _empty(module: FoldedPartialChannels, x: Tensor) -> Tensor:
    return x[:0]


@pytest.mark.parametrize("change", [_hooked, _replaced, _trained, _wide_tables, _double, _with_gaps, _empty])
def test_other_calls_run_the_definition(change: Callable[[FoldedPartialChannels, Tensor], Tensor]) -> None:
    module = layer()
    x = change(module, image())
    y, calls = traced(module, x)
    assert calls == []
    chosen, rest = x.index_select(1, module.selected), x.index_select(1, module.ghosts)
    assert_close(y, torch.cat([module.layer(chosen), rest * module.scale + module.shift], 1))


def test_hooks_inside_are_called() -> None:
    module, seen = layer(), []
    module.layer.register_forward_hook(lambda *_: seen.append(1))
    module(image())
    assert seen == [1]


def test_autocast_runs_the_definition() -> None:
    module, x = layer(), image()
    with torch.autocast("cpu", torch.bfloat16):
        y, calls = traced(module, x)
        want = module.layer(x.index_select(1, module.selected))
    assert calls == []
    assert want.dtype == torch.bfloat16
    assert torch.equal(y[:, :16], want.to(y.dtype))
