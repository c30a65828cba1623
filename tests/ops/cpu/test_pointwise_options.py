"""Every option of packed products together with every other one, against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native import needs_native
from tests.ops.cpu.test_pointwise import LAYOUTS
from widekernel.ops.cpu.pointwise import ACTIVATIONS, PRECISIONS, PackedBlock, reason_against
from widekernel.ops.patch import NormAfter, Patch
from widekernel.ops.pointwise_reference import ReferenceBlock

pytestmark = needs_native

AVAILABLE = [precision for precision in PRECISIONS if reason_against(precision) is None]
LIMITS = {"float32": 4e-6, "bfloat16": 5e-3, "int8": 1e-2}
"""Largest error as a share of the largest number. Factors near the middle of two numbers may be rounded either way."""


def random_block(inputs: int, hidden: int, outputs: int, patch: Patch | None, norms: dict[str, bool]) -> dict[str, Any]:
    """Draw the arguments of a `PackedBlock`; `outputs` 0 leaves out the second product."""
    kernel = () if patch is None else patch.kernel
    first = torch.randn(hidden, inputs, *kernel)
    seconds = (torch.randn(outputs, hidden) / hidden**0.5, torch.randn(outputs)) if outputs else (None, None)
    return {
        "first": first / first[0].numel() ** 0.5,
        "first_bias": torch.randn(hidden),
        "second": seconds[0],
        "second_bias": seconds[1],
        "norm_eps": 1e-3 if norms["before"] else None,
        "patch": patch,
        "after": NormAfter(1e-3, torch.randn(hidden), torch.randn(hidden)) if norms["after"] and not outputs else None,
        "response": torch.randn(hidden) if norms["response"] and outputs else None,
        "response_eps": 1e-3,
    }


def exact(block: dict[str, Any], x: Tensor, factors: Tensor | None, precision: str) -> Tensor:
    values = {name: value.double() if isinstance(value, Tensor) else value for name, value in block.items()}
    if block["after"] is not None:
        values["after"] = NormAfter(block["after"].eps, *(part.double() for part in block["after"][1:]))
    x = x.double() if factors is None else x.double() * factors.double()[:, :, None, None]
    return ReferenceBlock(**values, precision=precision)(x)


def check(block: dict[str, Any], x: Tensor, factors: Tensor | None, with_residual: bool, precision: str) -> Tensor:
    want = exact(block, x, factors, precision)
    residual = torch.randn(want.shape) if with_residual else None
    y = PackedBlock(**block, precision=precision)(x, residual, factors)
    want = want if residual is None else want + residual.double()
    assert y.shape == want.shape
    assert (y.double() - want).abs().max().item() <= LIMITS[precision] * max(1.0, want.abs().max().item())
    return y


@settings(max_examples=100, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 40), st.integers(2, 70), st.sampled_from([0, 5, 33])),
    patch=st.none() | st.builds(Patch, *[st.tuples(*[st.integers(1, 3)] * 2)] * 2, st.tuples(*[st.integers(0, 2)] * 2)),
    shape=st.tuples(st.integers(1, 3), st.integers(3, 9), st.integers(3, 9)),
    norms=st.fixed_dictionaries({name: st.booleans() for name in ("before", "after", "response")}),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    flags=st.tuples(st.booleans(), st.booleans()),
    layout=st.sampled_from(sorted(LAYOUTS)),
    precision=st.sampled_from(AVAILABLE),
)
def test_any_options(
    channels: tuple[int, int, int],
    patch: Patch | None,
    shape: tuple[int, int, int],
    norms: dict[str, bool],
    activation: str,
    flags: tuple[bool, bool],
    layout: str,
    precision: str,
) -> None:
    images, *sides = shape
    block = random_block(*channels, patch, norms) | {"activation": activation}
    x = LAYOUTS[layout](torch.randn(images, channels[0], *sides))
    factors = torch.rand(images, channels[0]) if flags[0] else None
    check(block, x, factors, flags[1], precision)


@pytest.mark.parametrize("precision", AVAILABLE)
@pytest.mark.parametrize("patch", [None, Patch((2, 2), (2, 2)), Patch((3, 3), (2, 2), (1, 1))], ids=str)
@pytest.mark.parametrize("outputs", [0, 24])
def test_bits_do_not_depend_on_threads(
    outputs: int, patch: Patch | None, precision: str, threads: Callable[[int], None]
) -> None:
    """Several blocks of inputs and chunks of hidden units, for few pixels, which threads share, and for many."""
    norms = dict.fromkeys(("before", "after", "response"), True)
    block = random_block(130 if patch else 1100, 600, outputs, patch, norms) | {"activation": "gelu"}
    for side in (6, 34):
        x, results = torch.randn(1, block["first"].shape[1], side, side), []
        factors = torch.rand(x.shape[:2])
        for number in (1, 3):
            threads(number)
            results.append(PackedBlock(**block, precision=precision)(x, None, factors))
        assert torch.equal(*results)
    check(block, x, factors, True, precision)
