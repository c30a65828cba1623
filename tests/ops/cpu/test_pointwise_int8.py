"""Packed products in int8: equal to the reference without ties, close to it otherwise, and errors where there are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cpu.test_pointwise import LAYOUTS, Block
from widekernel.errors import ArgumentError
from widekernel.ops.cpu import library
from widekernel.ops.cpu.pointwise import PackedBlock, reason_against
from widekernel.ops.patch import Patch
from widekernel.ops.pointwise_reference import ReferenceBlock, pixels_in_int8, units_in_int8, weights_in_int8

LACKING = reason_against("int8")
needs_products = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
NAN, INFINITY = float("nan"), float("inf")


def whole(*shape: int) -> Tensor:
    """Draw pixels (N, C, ...) that are their own factors: whole numbers of which some channels are -100 and 155."""
    x = torch.randint(-100, 156, shape).float()
    x[:, 0], x[:, -1] = -100, 155
    return x


def whole_weights(outputs: int, inputs: int) -> Tensor:
    """Draw weights that are their own factors: whole numbers of which one in each row is 127."""
    weight = torch.randint(-127, 128, (outputs, inputs)).float()
    weight[torch.arange(outputs), torch.randint(0, inputs, (outputs,))] = 127
    return weight


def reference(block: Block, x: Tensor, residual: Tensor | None = None, precision: str = "int8") -> Tensor:
    """Compute the definition in float64, with the factors of weights in float32: a tie there would change all pixels."""
    if precision == "int8":
        second = None if block.second is None else weights_in_int8(block.second)
        block = block._replace(first=weights_in_int8(block.first), second=second)
    weights = [part.double() if isinstance(part, Tensor) else part for part in block]
    return ReferenceBlock(*weights, precision=precision)(x.double(), None if residual is None else residual.double())


def check_close(block: Block, x: Tensor, residual: Tensor | None = None) -> None:
    """Factors near a tie may be rounded either way: in few pixels, which change little; all others are as defined."""
    want, exact = reference(block, x, residual), reference(block, x, residual, "float32")
    got = PackedBlock(*block, precision="int8")(x, residual)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 0.05 * want.abs().max()
    errors, rounding = ((y - want).norm(dim=1).flatten().sort().values for y in (got, exact))
    usual = int(0.9 * len(errors)) - 2
    assert errors[: max(usual, 0)].norm() <= rounding.norm() / 8 + 1e-6 * exact.norm()


def test_factors_of_the_definition() -> None:
    x = torch.tensor([[0.0, 0.3, 2.54, -0.01], [0.5, 1.0, 2.0, 4.0], [-1.0, -2.0, -3.0, -5.1], [0.0, 0.0, 0.0, 0.0]])
    got = pixels_in_int8(x)
    assert torch.allclose(got[0], torch.tensor([0.0, 0.3, 2.54, -0.01]), atol=1e-6)
    for row, values in zip(got[1:3], x[1:3]):
        step = values.abs().max() / 255
        assert torch.allclose(row / step, (row / step).round(), atol=1e-4)
        assert (row - values).abs().max() <= 0.5001 * step
    assert torch.equal(got[3], x[3])
    weights = torch.tensor([[1.27, 0.012, -0.5], [0.0, 0.0, 0.0], [1e-32, -1e-33, 0.0]])
    assert torch.allclose(weights_in_int8(weights), torch.tensor([[1.27, 0.01, -0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert pixels_in_int8(torch.tensor([1.0, INFINITY])).isnan().all() and weights_in_int8(torch.tensor([[NAN]])).isnan()
    units = torch.cat([torch.rand(3, 768), 1000 * torch.rand(3, 332)], 1)
    assert (units_in_int8(units)[:, :768] - units[:, :768]).abs().max() < 0.003, "each chunk has a scale of its own"


@needs_products
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 33), (5, 3), (63, 16), (64, 64), (65, 100), (130, 31), (2500, 70)], ids=str)
def test_one_product_without_ties(sizes: tuple[int, int], layout: str) -> None:
    block = Block(whole_weights(sizes[1], sizes[0]), torch.randn(sizes[1]), "relu", None, None, None)
    x, residual = (LAYOUTS[layout](y) for y in (whole(2, sizes[0], 5, 7), torch.randn(2, sizes[1], 5, 7)))
    want = reference(block, x, residual)
    assert torch.equal(want, reference(block, x, residual, "float32").to(want)) or sizes[0] == 1
    got = PackedBlock(*block, precision="int8")(x, residual)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


@needs_products
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("sizes", [(3, 5, 2), (70, 90, 0), (96, 384, 96), (24, 1100, 24), (2100, 70, 33)], ids=str)
def test_norms_and_activations(sizes: tuple[int, int, int], activation: str) -> None:
    torch.manual_seed(sum(sizes))
    x, residual = torch.randn(2, sizes[0], 6, 5) + 2, torch.randn(2, sizes[2] or sizes[1], 6, 5)
    for norm in (False, True):
        check_close(Block.random(*sizes, activation, norm), x, residual)


@needs_products
def test_chunks_of_hidden_units_have_scales_of_their_own() -> None:
    block = Block.random(40, 1100, 30, "none")
    block.first[:384] *= 1e4
    assert block.second is not None
    block.second[:, :384] *= 1e-4
    check_close(block, torch.randn(200, 40))
    block.first[500] *= 100
    check_close(block, torch.randn(200, 40))


@needs_products
@pytest.mark.parametrize(
    "patch", [Patch((4, 4), (4, 4)), Patch((3, 3), (2, 2), (1, 1)), Patch((2, 3), (1, 2), (2, 0))], ids=str
)
@pytest.mark.parametrize("channels", [3, 20])
def test_patches_without_ties(channels: int, patch: Patch) -> None:
    """Zeros around the image count as numbers of its patches."""
    x, weight = whole(2, channels, 12, 11), whole_weights(21, channels * patch.kernel[0] * patch.kernel[1])
    weight = weight.view(21, channels, *patch.kernel)
    want = F.conv2d(x.double(), weight.double(), None, patch.stride, patch.padding)
    got = PackedBlock(weight, patch=patch, precision="int8")(x)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


@needs_products
def test_extreme_pixels_and_weights() -> None:
    x = torch.randn(6, 80)
    x[0], x[1], x[2] = 0, 3.5, x[2] * 1e-33
    x[3], x[4] = x[3] * 1e37, x[4].abs() + 1e6
    x[5, 7] = 1e9
    block = Block.random(80, 70, bias=False, activation="none")
    block.first[5], block.first[6] = 0, block.first[6] * 1e-33
    want, got = reference(block, x), PackedBlock(*block, precision="int8")(x)
    assert torch.equal(got[0], torch.zeros(70)) and torch.equal(got[2], torch.zeros(70))
    assert torch.equal(got[:, 5:7], torch.zeros(6, 2))
    assert ((got - want).abs().amax(1) <= 1e-5 * x.abs().amax(1)).all()
    # The product of both scales overflows, but neither the sums nor the result.
    far_apart = block._replace(first=torch.tensor([[1e6, 0], [1, 0]]).repeat(35, 40))
    assert torch.equal(PackedBlock(*far_apart, precision="int8")(torch.tensor([0, 1e38]).repeat(1, 40)), torch.zeros(1, 70))
    spoiled = Block.random(80, 70, bias=False, activation="none")
    spoiled.first[3, 9], spoiled.first[4, 8] = NAN, INFINITY
    broken = PackedBlock(*spoiled, precision="int8")(torch.randn(6, 80)).isnan()
    assert broken[:, 3:5].all() and broken.sum() == 12


@needs_products
@pytest.mark.parametrize("norm", [False, True])
def test_bits_do_not_depend_on_threads_or_neighbors(norm: bool, threads: Callable[[int], None]) -> None:
    packed = PackedBlock(*Block.random(100, 1300, 60, norm=norm), precision="int8")
    for pixels in (1, 49, 400):
        x = torch.randn(pixels, 100)
        results = []
        for number in (1, 2, 3, 5):
            threads(number)
            results.append(packed(x))
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert torch.equal(packed(x[pixels // 2 :]), results[0][pixels // 2 :])


@needs_products
@pytest.mark.parametrize("value", [NAN, -NAN, INFINITY, -INFINITY], ids=["nan", "-nan", "inf", "-inf"])
def test_nan_and_infinity_stay_in_their_pixel(value: float) -> None:
    for norm in (False, True):
        packed = PackedBlock(*Block.random(70, 90, 50, "gelu", norm), precision="int8")
        for layout in ("contiguous", "channels_last"):
            x = torch.randn(2, 70, 5, 5)
            clean = packed(LAYOUTS[layout](x))
            x[1, 69, 2, 3] = value
            y = packed(LAYOUTS[layout](x))
            touched = torch.zeros_like(y, dtype=torch.bool)
            touched[1, :, 2, 3] = True
            assert torch.equal(y[~touched], clean[~touched])
            assert y[touched].isnan().all()


@needs_products
def test_weights_take_a_quarter_of_the_memory() -> None:
    weights = Block.random(512, 2048, 512)
    sizes = [PackedBlock(*weights, precision=precision).workspace() for precision in ("float32", "int8")]
    assert sizes[1][1] < 0.35 * sizes[0][1]
    assert sizes[1][0] <= 640 * 1024


@needs_products
def test_only_one_instruction_set_has_them() -> None:
    loaded = library.load()
    before = loaded.isa
    try:
        for name in loaded.isas:
            loaded.use_isa(name)
            peak = loaded.calls.wk_product_peak(library.INT8, 1, 0.01)
            if name == "avx512":
                assert peak > 0
                continue
            assert peak == 0
            with pytest.raises(ArgumentError, match=r"precision is 'int8', but the instruction set.*avx512.*use 'float32'"):
                PackedBlock(torch.ones(1, 1), precision="int8")
    finally:
        loaded.use_isa(before)


@pytest.mark.skipif(LACKING is None or library.load().reason is not None, reason="this machine has products in int8")
def test_processors_without_them() -> None:
    with pytest.raises(ArgumentError, match=r"precision is 'int8', but .* no int8 products.*use 'float32'"):
        PackedBlock(torch.ones(1, 1), precision="int8")


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    channels = st.sampled_from([2, 7, 15, 31, 32, 33, 63, 96, 257, 513, 1100])
    sizes = (draw(channels), draw(channels), draw(st.sampled_from([0, 1, 16, 31, 64, 130])))
    shape = (draw(st.integers(1, 4)), sizes[0], draw(st.integers(1, 13)), draw(st.integers(1, 17)))
    layouts = (draw(st.sampled_from(sorted(LAYOUTS))), draw(st.none() | st.sampled_from(sorted(LAYOUTS))))
    activation, threads = draw(st.sampled_from(["none", "relu", "gelu"])), draw(st.integers(1, 3))
    return sizes, shape, activation, layouts, threads, draw(st.booleans())


def fuzzed(problem: tuple) -> None:
    sizes, shape, activation, layouts, threads, norm = problem
    norm = norm and sizes[0] > 2  # two channels become -1 and 1, whose zero is always near a tie
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block, x, residual = Block.random(*sizes, activation, norm), LAYOUTS[layouts[0]](torch.randn(*shape)), None
        if layouts[1]:
            residual = LAYOUTS[layouts[1]](torch.randn(shape[0], sizes[2] or sizes[1], *shape[2:]))
        check_close(block, x, residual)
    finally:
        torch.set_num_threads(before)


@needs_products
@settings(max_examples=30, deadline=None)
@given(problems())
def test_random_problems(problem: tuple) -> None:
    fuzzed(problem)


@needs_products
@pytest.mark.slow
def test_five_thousand_random_problems() -> None:
    settings(max_examples=5000, deadline=None)(given(problems())(fuzzed))()
