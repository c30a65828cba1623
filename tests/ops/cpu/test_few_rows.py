"""Kernels of few rows, whose images are read in the order of memory, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cases import relative_error
from widekernel import ops
from widekernel.ops import reference
from widekernel.ops.cpu import library

pytestmark = pytest.mark.skipif(library.load().reason is not None, reason=str(library.load().reason))

LIMIT = {torch.float32: 5e-6, torch.bfloat16: 5e-6 + 2**-8, torch.float16: 5e-6 + 2**-11}


@st.composite
def calls(draw: st.DrawFn) -> tuple:
    """Draw maps around the sizes of tiles, kernels around the largest one, any anchor, layout, type and epilogue."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    channels = draw(st.sampled_from([1, 3, 8, 16, 17, 32, 40]))
    shape = draw(st.integers(1, 2)), channels, draw(st.integers(3, 23)), draw(st.integers(1, 50))
    size = draw(st.integers(1, 14)), draw(st.integers(1, 9))
    anchor = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
    x = torch.randn(shape).to(draw(st.sampled_from(sorted(LIMIT, key=str))))
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(channels, 1, *size).to(x.dtype)
    bias = torch.randn(channels).to(x.dtype) if draw(st.booleans()) else None
    scale = torch.rand(channels).to(x.dtype) if draw(st.booleans()) else None
    return x, kernel, anchor, bias, scale, draw(st.booleans())


@given(call=calls())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", library.load().isas)
def test_random_calls(name: str, call: tuple) -> None:
    x, kernel, anchor, bias, scale, relu = call
    loaded = library.load()
    before = loaded.isa
    loaded.use_isa(name)
    try:
        with ops.trace() as ran:
            y = ops.depthwise_sum(x, [kernel], [anchor], bias, scale=scale, relu=relu, algorithm="direct", backend="native")
    finally:
        loaded.use_isa(before)
    assert ran.backends() == ["native"]
    wide = [None if t is None else t.double() for t in (bias, scale)]
    want = reference.depthwise_sum(x.double(), [kernel.double()], [anchor], *wide, relu)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    assert relative_error(y, want) <= LIMIT[x.dtype]


@pytest.mark.parametrize("size", [(3, 3), (5, 5), (13, 5)], ids=str)
@pytest.mark.parametrize("channels", [512, 528, 1041])
@pytest.mark.usefixtures("isa")
def test_many_channels(channels: int, size: tuple[int, int]) -> None:
    """Several groups of channels, some with an incomplete vector; pixels of 512 channels are 2 KiB apart."""
    x = torch.randn(1, channels, 9, 5).contiguous(memory_format=torch.channels_last)
    kernel, bias = torch.randn(channels, 1, *size), torch.randn(channels)
    y = ops.depthwise_sum(x, [kernel], bias=bias, relu=True, algorithm="direct", backend="native")
    padding = size[0] // 2, size[1] // 2
    want = F.conv2d(x.double(), kernel.double(), bias.double(), padding=padding, groups=channels).relu()
    assert relative_error(y, want) <= LIMIT[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_results_that_are_written_past_the_caches(isa: str, layout: torch.memory_format) -> None:
    x = torch.randn(1, 32, 512, 512).contiguous(memory_format=layout)
    kernel = torch.randn(32, 1, 3, 3)
    y = ops.depthwise_sum(x, [kernel], [(1, 1)], backend="native")
    assert relative_error(y, F.conv2d(x.double(), kernel.double(), padding=1, groups=32)) <= LIMIT[torch.float32]
