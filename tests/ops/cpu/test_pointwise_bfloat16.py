"""Packed products in bfloat16: equal to the reference on whole numbers, close on others, and errors where there are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native import thread_count
from tests.ops.cpu.test_pointwise import LAYOUTS, Block
from widekernel.errors import ArgumentError
from widekernel.ops.cpu import library
from widekernel.ops.cpu.pointwise import PackedBlock, reason_against
from widekernel.ops.pointwise_reference import ReferenceBlock

LACKING = reason_against("bfloat16")
needs_products = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
SIZES = [(1, 1, 0), (3, 5, 2), (31, 33, 15), (32, 64, 32), (33, 31, 0), (96, 384, 96), (24, 1100, 24), (1100, 70, 33)]


def whole(*shape: int, most: int = 3) -> Tensor:
    return torch.randint(-most, most + 1, shape).float()


def whole_block(inputs: int, hidden: int, outputs: int, activation: str) -> Block:
    """Draw weights for which all sums are exact: only the rounding of hidden units changes numbers."""
    seconds = (whole(outputs, hidden), whole(outputs, most=100)) if outputs else (None, None)
    return Block(whole(hidden, inputs), whole(hidden, most=100), activation, *seconds, None)


def check_exactly(block: Block, x: Tensor, residual: Tensor | None) -> None:
    weights = [part.double() if isinstance(part, Tensor) else part for part in block]
    want = ReferenceBlock(*weights, precision="bfloat16")(x.double(), None if residual is None else residual.double())
    got = PackedBlock(*block, precision="bfloat16")(x, residual)
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), want)


@needs_products
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes: tuple[int, int, int], layout: str) -> None:
    x = LAYOUTS[layout](whole(2, sizes[0], 5, 7))
    check_exactly(whole_block(*sizes, "relu"), x, LAYOUTS[layout](whole(2, sizes[2] or sizes[1], 5, 7)))
    check_exactly(whole_block(*sizes, "none"), x, None)


def test_the_reference_rounds_hidden_units() -> None:
    """So that the tests above would notice hidden units that are not rounded, or by another rule."""
    hidden = torch.tensor([[257.0], [258.0], [259.0], [-257.0], [-259.0], [3e38], [1e-40]])
    got = ReferenceBlock(torch.ones(1, 1), None, "none", torch.ones(1, 1), None, None, precision="bfloat16")(hidden)
    assert got[:5].flatten().tolist() == [256.0, 258.0, 260.0, -256.0, -260.0]
    assert got[5] == torch.tensor(3e38).bfloat16().float()
    assert got[6] == 0


@needs_products
def test_rounding_over_all_magnitudes() -> None:
    ties = torch.tensor([1.00390625, 1.01171875, -1.00390625, -1.01171875, 257.0, 259.0])
    x = torch.cat([torch.logspace(-37.9, 38.4, 5001), ties, torch.tensor([0.0, 3.4028235e38, float("inf")])])
    x = torch.cat([x, -x, x * torch.rand(len(x))]).float().view(-1, 1)
    x = x[x.abs().ge(torch.finfo(torch.float32).tiny) | x.eq(0)].view(-1, 1)
    assert torch.equal(PackedBlock(torch.ones(1, 1), precision="bfloat16")(x), x.bfloat16().float())
    assert PackedBlock(torch.ones(1, 1), precision="bfloat16")(torch.full((1, 1), float("nan"))).isnan().all()
    assert PackedBlock(torch.full((1, 1), float("nan")), precision="bfloat16")(torch.ones(1, 1)).isnan().all()


@needs_products
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("outputs", [0, 20])
def test_norms_and_activations(outputs: int, activation: str) -> None:
    """A factor near the middle of two bfloat16 may be rounded either way, so results are close to the reference."""
    x, residual = torch.randn(2, 70, 6, 5) + 2, torch.randn(2, outputs or 90, 6, 5)
    for norm in (False, True):
        block = Block.random(70, 90, outputs, activation, norm)
        want = ReferenceBlock(*block, precision="bfloat16")(x, residual)
        got = PackedBlock(*block, precision="bfloat16")(x, residual)
        error, rounding = ((y - want).norm() for y in (got, PackedBlock(*block)(x, residual)))
        assert error <= rounding / 3
        assert error <= 5e-4 * want.norm()


@needs_products
@pytest.mark.parametrize("norm", [False, True])
def test_bits_do_not_depend_on_threads_or_neighbors(norm: bool, threads: Callable[[int], None]) -> None:
    packed = PackedBlock(*Block.random(100, 1300, 60, norm=norm), precision="bfloat16")
    for pixels in (1, 49, 400):
        x = torch.randn(pixels, 100)
        results = []
        for number in (1, 2, 3, 5):
            threads(number)
            results.append(packed(x))
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert torch.equal(packed(x[pixels // 2 :]), results[0][pixels // 2 :])


@needs_products
def test_nan_and_infinity_stay_in_their_pixel() -> None:
    block = Block.random(70, 90, 50, "relu", norm=True)
    packed = PackedBlock(*block, precision="bfloat16")
    for layout in ("contiguous", "channels_last"):
        x = torch.randn(2, 70, 5, 5)
        clean = packed(LAYOUTS[layout](x))
        for value in (float("nan"), float("inf")):
            spoiled = x.clone()
            spoiled[1, 69, 2, 3] = value
            y = packed(LAYOUTS[layout](spoiled))
            touched = torch.zeros_like(y, dtype=torch.bool)
            touched[1, :, 2, 3] = True
            assert torch.equal(y[~touched], clean[~touched])
            assert y[touched].isnan().all()


@needs_products
def test_weights_take_half_the_memory() -> None:
    weights = Block.random(512, 2048, 512)
    sizes = [PackedBlock(*weights, precision=precision).workspace()[1] for precision in ("float32", "bfloat16")]
    assert sizes[1] < 0.6 * sizes[0]


@needs_products
def test_only_one_instruction_set_has_them(isa: str) -> None:
    peak = library.load().calls.wk_product_peak(library.BFLOAT16, 1, 0.01)
    if isa == "avx512":
        assert peak > 0
        return
    assert peak == 0
    with pytest.raises(ArgumentError, match=r"precision is 'bfloat16', but the instruction set.*only avx512.*use 'float32'"):
        PackedBlock(torch.ones(1, 1), precision="bfloat16")


@pytest.mark.skipif(LACKING is None or library.load().reason is not None, reason="this machine has products in bfloat16")
def test_processors_without_them() -> None:
    with pytest.raises(ArgumentError, match=r"precision is 'bfloat16', but .* no bfloat16 products.*use 'float32'"):
        PackedBlock(torch.ones(1, 1), precision="bfloat16")


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    channels = st.sampled_from([1, 2, 7, 15, 31, 32, 33, 63, 96, 257, 513, 530])
    sizes = (draw(channels), draw(channels), draw(st.sampled_from([0, 1, 16, 31, 64, 130])))
    shape = (draw(st.integers(1, 4)), sizes[0], draw(st.integers(1, 13)), draw(st.integers(1, 17)))
    layouts = (draw(st.sampled_from(sorted(LAYOUTS))), draw(st.none() | st.sampled_from(sorted(LAYOUTS))))
    return sizes, shape, draw(st.sampled_from(["none", "relu"])), layouts, draw(st.integers(1, 3))


def fuzzed(problem: tuple) -> None:
    sizes, shape, activation, layouts, threads = problem
    x, residual = LAYOUTS[layouts[0]](whole(*shape)), None
    if layouts[1]:
        residual = LAYOUTS[layouts[1]](whole(shape[0], sizes[2] or sizes[1], *shape[2:]))
    with thread_count(threads):
        check_exactly(whole_block(*sizes, activation), x, residual)


@needs_products
@settings(max_examples=40, deadline=None)
@given(problems())
def test_random_problems(problem: tuple) -> None:
    fuzzed(problem)


@needs_products
@pytest.mark.slow
def test_five_thousand_random_problems() -> None:
    settings(max_examples=5000, deadline=None)(given(problems())(fuzzed))()
