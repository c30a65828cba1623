"""Weights of every shape, type and memory format."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from widekernel.sparsity.semi_structured.config import Axis

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.int8)


class Case(NamedTuple):
    weight: Tensor
    axis: Axis
    groups: int


@st.composite
def weights(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Draw a weight with many ties and zeros, and a grouping for it."""
    groups = draw(st.integers(1, 3))
    out, inner = groups * draw(st.integers(1, 5)), draw(st.integers(1, 11))
    kernel = draw(st.sampled_from([None, (1, 1), (1, 3), (2, 2), (3, 3), (5, 4)]))
    axis = draw(st.sampled_from(["channels", "im2col"] if kernel is None else ["channels", "im2col", "taps"]))
    shape = (out, inner) if kernel is None else (out, inner, *kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    few = draw(st.booleans())
    weight = torch.randint(-2, 3, shape, generator=generator) if few else torch.randn(shape, generator=generator) * 40
    weight = weight.to(draw(st.sampled_from(dtypes)))
    if kernel is not None and draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    if draw(st.booleans()):
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    return Case(weight, axis, groups if kernel is not None else 1)


def as_bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, to compare NaNs and signs of zeros too."""
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(size)
