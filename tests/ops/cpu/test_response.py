"""Packed pairs with a response norm, with factors of their input, and squeeze-excite's factors, against float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.native import needs_native
from tests.ops.cpu.test_pointwise import LAYOUTS, LIMIT
from widekernel.errors import ArgumentError
from widekernel.ops.cpu.gate import Gate
from widekernel.ops.cpu.pointwise import ACTIVATIONS, PackedBlock
from widekernel.ops.pointwise_reference import ReferenceBlock, gate

pytestmark = needs_native


def pair(inputs: int, hidden: int, outputs: int, activation: str = "gelu", norm: bool = False) -> tuple[Any, ...]:
    """Draw the arguments of a `PackedBlock` with a response norm."""
    first, second = torch.randn(hidden, inputs) / inputs**0.5, torch.randn(outputs, hidden) / hidden**0.5
    biases = torch.randn(hidden), torch.randn(outputs)
    eps = 1e-5 if norm else None
    return first, biases[0], activation, second, biases[1], eps, None, None, torch.randn(hidden), 1e-3


def squeezed(channels: int, hidden: int, activation: str = "relu", bias: bool = True) -> tuple[Any, ...]:
    """Draw the arguments of a `Gate`."""
    first, second = torch.randn(hidden, channels) / channels**0.5, torch.randn(channels, hidden) / hidden**0.5
    return first, torch.randn(hidden) if bias else None, activation, second, torch.randn(channels) if bias else None


def double(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.double() if isinstance(value, Tensor) else value for value in values)


def exact(block: tuple[Any, ...], x: Tensor, residual: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    x = x.double() if factors is None else x.double() * factors.double()[:, :, None, None]
    return ReferenceBlock(*double(block))(x, None if residual is None else residual.double())


def check(block: tuple[Any, ...], x: Tensor, residual: Tensor | None = None, factors: Tensor | None = None) -> None:
    y, want = PackedBlock(*block)(x, residual, factors), exact(block, x, residual, factors)
    assert y.shape == want.shape
    assert (y.double() - want).abs().max().item() <= LIMIT * max(1.0, want.abs().max().item())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 60)] * 3),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    flags=st.tuples(*[st.booleans()] * 3),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
)
def test_any_pair(
    sizes: tuple[int, int, int],
    shape: tuple[int, int, int],
    activation: str,
    flags: tuple[bool, bool, bool],
    layouts: tuple[str, str],
) -> None:
    norm, added, scaled = flags
    x = LAYOUTS[layouts[0]](torch.randn(shape[0], sizes[0], *shape[1:]))
    residual = LAYOUTS[layouts[1]](torch.randn(shape[0], sizes[2], *shape[1:])) if added else None
    factors = torch.rand(shape[0], sizes[0]) + 0.5 if scaled else None
    check(pair(*sizes, activation, norm and sizes[0] > 2), x, residual, factors)


@pytest.mark.parametrize("sizes", [(17, 33, 15), (80, 320, 80), (530, 600, 40)], ids=str)
def test_every_instruction_set(isa: str, sizes: tuple[int, int, int]) -> None:
    for shape in [(3, 5, 7), (1, 16, 15)]:
        x, residual = torch.randn(shape[0], sizes[0], *shape[1:]), torch.randn(shape[0], sizes[2], *shape[1:])
        check(pair(*sizes), x, residual, torch.randn(shape[0], sizes[0]))
        gated(squeezed(sizes[0], sizes[2]), x)


@pytest.mark.parametrize("outputs", [0, 20])
def test_factors_without_a_response_norm(outputs: int, threads: Callable[[int], None]) -> None:
    first, bias, activation, second, shift, eps, *_ = pair(18, 40, 20, norm=True)
    block = (first, bias, activation, second, shift, eps) if outputs else (first, bias, activation, None, None, eps)
    for images, count in [(3, 1), (2, 4), (40, 3)]:
        threads(count)
        check(block, torch.randn(images, 18, 4, 5), None, torch.randn(18, images).t())


def test_rows_are_the_pixels_of_one_image() -> None:
    block, x = pair(12, 30, 7), torch.randn(3, 5, 12)
    want = exact(block, x.reshape(1, 15, 1, 12).movedim(-1, 1)).movedim(1, -1).view(3, 5, 7)
    assert (PackedBlock(*block)(x).double() - want).abs().max() <= LIMIT * want.abs().max()


@pytest.mark.parametrize("side", [1, 7, 14, 40])
def test_bits_do_not_depend_on_threads_or_other_images(side: int, threads: Callable[[int], None]) -> None:
    """Few pixels are shared by all threads, many are divided among them; many images are computed one after another."""
    block, narrow = PackedBlock(*pair(40, 300, 20)), Gate(*squeezed(40, 10))
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](torch.randn(5, 40, side, side))
        results = []
        for count in (1, 2, 3, 8):
            threads(count)
            factors = narrow(x)
            results.append((factors, block(x, None, factors)))
        alone = LAYOUTS[layout](x[3:4])
        results.append((narrow(alone), block(alone, None, narrow(alone))))
        for factors, y in results[1:]:
            assert torch.equal(factors, results[0][0][-2 if len(factors) == 1 else 0 :][: len(factors)])
            assert torch.equal(y, results[0][1][-2 if len(y) == 1 else 0 :][: len(y)])


def test_nan_stays_in_its_image(isa: str) -> None:
    block, narrow, x = PackedBlock(*pair(20, 40, 20)), Gate(*squeezed(20, 5)), torch.randn(3, 20, 9, 9)
    clean, open_ = block(x, None, narrow(x)), narrow(x)
    for value in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[1, 19, 8, 8] = value
        y, factors = block(spoiled, None, torch.ones(3, 20)), narrow(spoiled)
        assert y[1].isnan().any()
        assert torch.equal(block(spoiled, None, narrow(spoiled))[::2], clean[::2])
        assert torch.equal(factors[::2], open_[::2])
        assert value == float("inf") or factors[1].isnan().all()


def test_no_response_to_a_constant_zero() -> None:
    first, _, _, second, shift, *_ = pair(6, 10, 4)
    zero = torch.zeros(1, 6, 3, 3)
    y = PackedBlock(first, None, "relu", second, shift, response=torch.ones(10))(zero)
    assert torch.equal(y, shift.view(1, -1, 1, 1).expand_as(y))


def gated(weights: tuple[Any, ...], x: Tensor) -> None:
    got, want = Gate(*weights)(x), gate(x.double(), *double(weights))
    assert got.shape == x.shape[:2]
    assert (got.double() - want).abs().max() <= LIMIT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gates(layout: str) -> None:
    for shape in [(2, 18, 4, 9), (3, 33, 1, 1), (1, 1, 5, 1), (1, 140, 19, 21)]:
        x = LAYOUTS[layout](torch.randn(shape) + 3)
        for activation in ACTIVATIONS:
            gated(squeezed(shape[1], 1 + shape[1] // 3, activation, bias=activation != "none"), x)


def test_copies_and_pickles_of_gates() -> None:
    made = Gate(*squeezed(20, 5))
    assert copy.deepcopy(made) is made
    with pytest.raises(ArgumentError, match="make it again"):
        pickle.dumps(made)


def test_sigmoids_of_all_magnitudes(isa: str) -> None:
    x = torch.cat([torch.linspace(-95, 95, 1501), torch.tensor([0.0, 1e-30, 1e30, -1e30, float("inf"), -float("inf")])])
    ones = torch.ones(1, 1)
    y = Gate(ones, None, "none", ones, None)(x.view(-1, 1, 1, 1)).flatten()
    want = torch.sigmoid(x.double())
    assert ((y.double() - want).abs() <= 1e-5 * want + 1e-37).all()
    assert ((y.double() - want).abs() <= 2e-7).all()


def test_workspace_without_images() -> None:
    own, shared = PackedBlock(*pair(96, 384, 96)).workspace()
    weights = 4 * (2 * 96 * 384 + 96 + 2 * 384)
    assert 0 < own <= 1 << 20
    assert weights <= shared <= 1.1 * weights


def test_what_is_refused() -> None:
    first, bias, activation, second, shift, *_, response, _ = pair(4, 6, 5)
    with pytest.raises(ArgumentError, match="response is given without second"):
        PackedBlock(first, bias, activation, response=response)
    with pytest.raises(ArgumentError, match=r"response has the shape \(5,\), but must be \(6,\)"):
        PackedBlock(first, bias, activation, second, shift, response=response[1:])
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="response_eps is"):
            PackedBlock(first, bias, activation, second, shift, response=response, response_eps=eps)
    packed, x = PackedBlock(first, bias, activation, second, shift, response=response), torch.randn(2, 4, 3, 3)
    for factors in (torch.ones(2, 5), torch.ones(4), torch.ones(2, 4, 1, 1)):
        with pytest.raises(ArgumentError, match=r"factors have the shape .*, but must be \(2, 4\) for images"):
            packed(x, None, factors)
    for rows in (torch.randn(3, 4), torch.randn(1, 1, 1, 1, 4)):
        with pytest.raises(ArgumentError, match="factors have the shape"):
            packed(rows, None, torch.ones(3, 4))
    with pytest.raises(ArgumentError, match=r"factors is torch\.float64"):
        packed(x, None, torch.ones(2, 4).double())
    with pytest.raises(ArgumentError, match="factors requires gradients"):
        packed(x, None, torch.ones(2, 4, requires_grad=True))
    weights = squeezed(4, 3)
    with pytest.raises(ArgumentError, match="second has 5 rows, but must have 4"):
        Gate(*weights[:3], torch.randn(5, 3), None)
    with pytest.raises(ArgumentError, match="activation is 'swish'"):
        Gate(*weights[:2], "swish", *weights[3:])
    for wrong in (torch.randn(4, 3, 3), torch.randn(1, 5, 3, 3)):
        with pytest.raises(ArgumentError, match=r"x has the shape .*, but must be \(N, 4, height, width\)"):
            Gate(*weights)(wrong)
    with pytest.raises(ArgumentError, match="no mean of no pixels"):
        Gate(*weights)(torch.randn(2, 4, 0, 3))
    with pytest.raises(ArgumentError, match="x requires gradients"):
        Gate(*weights)(torch.randn(2, 4, 3, 3, requires_grad=True))
    assert Gate(*weights)(torch.randn(0, 4, 3, 3)).shape == (0, 4)


def test_weights_of_a_gate_are_copied() -> None:
    weights, x = squeezed(8, 3), torch.randn(1, 8, 4, 4)
    made = Gate(*weights)
    before = made(x)
    for tensor in weights:
        if isinstance(tensor, Tensor):
            tensor.zero_()
    assert torch.equal(made(x), before)
