"""Packed pairs of products against float64: sizes, layouts, options, instruction sets, threads and extreme values."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.native import instruction_set, needs_native, thread_count
from widekernel.errors import ArgumentError
from widekernel.ops.cpu import library
from widekernel.ops.cpu.pointwise import ACTIVATIONS, PackedBlock

pytestmark = needs_native

LIMIT = 4e-6
"""Largest error as a share of the largest sum of absolute values."""
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": lambda x: x * torch.special.erfc(-x * 0.5**0.5) / 2,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# In memory: (N, C, H, W), (N, H, W, C), and with gaps.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "some channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "some columns": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "every other column": lambda x: torch.stack([x, x], 4)[..., 0],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


class Block(NamedTuple):
    """The arguments of a `PackedBlock`, and its function in float64."""

    first: Tensor
    first_bias: Tensor | None
    activation: str
    second: Tensor | None
    second_bias: Tensor | None
    norm_eps: float | None

    @classmethod
    def random(
        cls, inputs: int, hidden: int, outputs: int = 0, activation: str = "gelu", norm: bool = False, bias: bool = True
    ) -> Block:
        """Draw weights that keep the size of numbers; `outputs` 0 leaves out the second product."""
        second = torch.randn(outputs, hidden) / hidden**0.5 if outputs else None
        biases = [torch.randn(size) if bias and size else None for size in (hidden, outputs)]
        first = torch.randn(hidden, inputs) / inputs**0.5
        return cls(first, biases[0], activation, second, biases[1], 1e-6 if norm else None)

    def exact(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute (N, outputs, H, W) in float64."""
        y = x.double().movedim(1, -1)
        if self.norm_eps is not None:
            y = F.layer_norm(y, y.shape[-1:], eps=self.norm_eps)
        y = EXACT[self.activation](F.linear(y, self.first.double(), _double(self.first_bias)))
        if self.second is not None:
            y = F.linear(y, self.second.double(), _double(self.second_bias))
        y = y.movedim(-1, 1)
        return y if residual is None else y + residual.double()


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def check(block: Block, x: Tensor, residual: Tensor | None = None) -> None:
    """Compare with float64; twice the same bits; arguments stay unchanged; the result has the layout of `x`."""
    before = [x.clone(), None if residual is None else residual.clone()]
    packed = PackedBlock(*block)
    y, again = packed(x, residual), packed(x, residual)
    want = block.exact(x, residual)
    assert y.shape == want.shape
    assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, again)
    size = max(1.0, want.abs().max().item())
    assert (y.double() - want).abs().max().item() <= LIMIT * size
    assert torch.equal(x, before[0])
    assert residual is None or torch.equal(residual, before[1])


SIZES = [(1, 1, 0), (3, 5, 2), (16, 32, 16), (17, 33, 15), (96, 384, 96), (130, 31, 0), (520, 300, 40), (24, 600, 24)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_on_every_instruction_set(isa: str, sizes: tuple[int, int, int], layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, sizes[0], 5, 7))
    residual = LAYOUTS[layout](torch.randn(2, sizes[2] or sizes[1], 5, 7))
    check(Block.random(*sizes), x, residual)
    check(Block.random(*sizes, activation="relu", norm=sizes[0] > 1, bias=False), x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("outputs", [0, 20])
def test_options(activation: str, outputs: int) -> None:
    x, residual = torch.randn(2, 30, 6, 5), torch.randn(2, outputs or 50, 6, 5)
    for norm in (False, True):
        check(Block.random(30, 50, outputs, activation, norm), x, residual)


@pytest.mark.parametrize("of_residual", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, of_residual: str) -> None:
    for shape in [(2, 18, 4, 9), (3, 18, 1, 1), (1, 1, 5, 1), (2, 18, 1, 21)]:
        x, residual = torch.randn(shape), torch.randn(shape[0], 20, *shape[2:])
        check(Block.random(shape[1], 40, 20, norm=shape[1] > 1), LAYOUTS[layout](x), LAYOUTS[of_residual](residual))


@pytest.mark.parametrize("leading", [(), (1,), (7,), (3, 50), (2, 1, 3, 4), (2, 3, 1, 1, 5)], ids=str)
def test_rows(leading: tuple[int, ...]) -> None:
    block = Block.random(18, 40, 20, norm=True)
    x, residual = torch.randn(*leading, 18), torch.randn(*leading, 20)
    rows = x.reshape(-1, 18, 1, 1)
    wanted = block.exact(rows, residual.reshape(-1, 20, 1, 1)).view(*leading, 20)
    packed = PackedBlock(*block)
    for stretched in (lambda t: t, lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]]):
        y = packed(stretched(x), stretched(residual))
        assert y.is_contiguous()
        assert (y.double() - wanted).abs().max() <= LIMIT * wanted.abs().max()


@pytest.mark.parametrize("shape", [(0, 18, 4, 4), (2, 18, 0, 4), (0, 18), (3, 0, 18)], ids=str)
def test_no_pixels(shape: tuple[int, ...]) -> None:
    for outputs in (0, 20):
        y = PackedBlock(*Block.random(18, 40, outputs))(torch.randn(shape))
        channels = 1 if len(shape) == 4 else len(shape) - 1
        assert y.shape == (*shape[:channels], outputs or 40, *shape[channels + 1 :])


@pytest.mark.parametrize("norm", [False, True])
def test_bits_do_not_depend_on_threads_or_neighbors(norm: bool, threads: Callable[[int], None]) -> None:
    """Few pixels are shared by all threads, many are divided among them; a pixel alone has other tiles."""
    packed = PackedBlock(*Block.random(100, 700, 60, norm=norm))
    for pixels in (1, 49, 400):
        x = torch.randn(pixels, 100)
        results = []
        for number in (1, 2, 3, 5):
            threads(number)
            results.append(packed(x))
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert torch.equal(packed(x[pixels // 2 :]), results[0][pixels // 2 :])


def test_nan_infinity_and_huge_numbers_stay_in_their_pixel(isa: str) -> None:
    block = Block.random(70, 90, 50, "relu", norm=True)
    for layout in ("contiguous", "channels_last"):
        x = torch.randn(2, 70, 5, 5)
        clean = PackedBlock(*block)(LAYOUTS[layout](x))
        for value in (float("nan"), float("inf"), 1e30, 3e38):
            spoiled = x.clone()
            spoiled[1, 69, 2, 3] = value
            y = PackedBlock(*block)(LAYOUTS[layout](spoiled))
            touched = torch.zeros_like(y, dtype=torch.bool)
            touched[1, :, 2, 3] = True
            assert torch.equal(y[~touched], clean[~touched])
            assert value in (1e30, 3e38) or y[touched].isnan().all()


def test_a_constant_pixel_is_normalized_to_zero() -> None:
    block = Block.random(40, 33, norm=True, activation="none")
    y = PackedBlock(*block)(torch.full((1, 40, 2, 2), 5.0))
    assert torch.equal(y, block.first_bias.view(1, -1, 1, 1).expand_as(y))  # type: ignore[union-attr]


def test_layer_norm_beside_a_large_mean(isa: str) -> None:
    block = Block.random(384, 384, activation="none", norm=True)
    x = torch.randn(1, 384, 4, 4) + 1000
    y, want = PackedBlock(*block)(x), block.exact(x)
    errors = [(result.double() - want).abs().max() for result in (y, torch_in_floats(block, x))]
    assert errors[0] <= 2 * errors[1]


def torch_in_floats(block: Block, x: Tensor) -> Tensor:
    rows = F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=block.norm_eps or 0.0)
    return F.linear(rows, block.first, block.first_bias).movedim(-1, 1)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_over_all_magnitudes(isa: str, activation: str) -> None:
    """The error is that of rounding Φ(x) in the neighborhood of 1, also where the result itself is small."""
    small = torch.logspace(-44.5, 0, 3000, dtype=torch.float64)
    x = torch.cat([small, torch.linspace(-20, 20, 40001, dtype=torch.float64), torch.logspace(1, 38.5, 300), torch.zeros(1)])
    x = torch.cat([x, -x]).float().view(-1, 1)
    y = PackedBlock(torch.ones(1, 1), activation=activation)(x).double()
    want = EXACT[activation](x.double())
    assert ((y - want).abs() <= 2.5 * 2**-24 * x.double().abs() + 1e-45).all()
    theirs = F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none").double()
    assert (y - want).abs().max() <= 2 * (theirs - want).abs().max()
    assert (y[x > 6] == x[x > 6]).all()
    assert (y[x < -12].abs() < 1e-8).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_limits_of_gelu(isa: str, activation: str) -> None:
    packed = PackedBlock(torch.ones(1, 1), activation=activation)
    y = packed(torch.tensor([[float("inf")], [float("-inf")], [float("nan")], [0.0]]))
    assert y[0] == float("inf")
    assert y[1].abs() < 1e-8, "PyTorch's erf form is NaN here; the limit is zero"
    assert y[2].isnan()
    assert y[3] == 0


def test_relu_keeps_nan(isa: str) -> None:
    y = PackedBlock(torch.ones(1, 1), activation="relu")(torch.tensor([[float("nan")], [-1.0], [2.0]]))
    assert y[0].isnan()
    assert y[1:].flatten().tolist() == [0.0, 2.0]


def test_weights_are_copied() -> None:
    block = Block.random(20, 30, 10)
    packed, x = PackedBlock(*block), torch.randn(1, 20, 3, 3)
    before = packed(x)
    for tensor in (block.first, block.first_bias, block.second, block.second_bias):
        tensor.zero_()  # type: ignore[union-attr]
    assert torch.equal(packed(x), before)


def test_weights_with_any_strides_that_require_gradients() -> None:
    block = Block.random(20, 30, 10)
    columns = block._replace(first=block.first.t().contiguous().t().requires_grad_())
    x = torch.randn(1, 20, 3, 3)
    assert torch.equal(PackedBlock(*columns)(x), PackedBlock(*block)(x))


def test_packed_weights_keep_their_instruction_set() -> None:
    packed, x = PackedBlock(*Block.random(20, 30, 10)), torch.randn(1, 20, 3, 3)
    before = packed(x)
    with instruction_set("portable"):
        assert torch.equal(packed(x), before)


def test_a_residual_of_another_shape_is_refused_again() -> None:
    packed, x = PackedBlock(*Block.random(20, 30)), torch.randn(4, 20, 6, 6)
    residual = torch.randn(4, 30, 6, 6)
    packed(x, residual)
    with pytest.raises(ArgumentError, match="residual has the shape"):
        packed(x, residual[:1])


def test_copies_and_pickles() -> None:
    packed = PackedBlock(*Block.random(20, 30))
    assert copy.deepcopy(packed) is packed
    with pytest.raises(ArgumentError, match="pack them again"):
        pickle.dumps(packed)


def test_memory_is_freed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, freed = library.load().calls, []
    free = calls.wk_pointwise_free
    monkeypatch.setattr(calls, "wk_pointwise_free", lambda packed: (freed.append(packed.value), free(packed)))
    packed = PackedBlock(*Block.random(8, 8))
    other = copy.deepcopy(packed)
    del packed
    gc.collect()
    assert not freed
    del other
    gc.collect()
    assert len(freed) == 1


def test_workspace_is_bounded(threads: Callable[[int], None]) -> None:
    threads(1)
    packed = PackedBlock(*Block.random(96, 384, 96))
    own, shared = packed.workspace()
    weights = 4 * (2 * 96 * 384 + 96 + 384)
    assert 0 < own <= 1 << 20
    assert weights <= shared <= 1.1 * weights
    threads(4)
    assert packed.workspace()[0] == own
    assert shared < packed.workspace()[1] <= shared + (64 << 20)
    assert PackedBlock(*Block.random(1024, 4096, 1024)).workspace()[0] <= 1 << 20


def test_what_is_refused() -> None:
    weights, x = torch.randn(6, 4), torch.randn(1, 4, 3, 3)
    with pytest.raises(ArgumentError, match=r"activation is 'gelus'.* Did you mean 'gelu'\?"):
        PackedBlock(weights, activation="gelus")
    with pytest.raises(ArgumentError, match=r"precision is 'bfloat'.* Did you mean 'bfloat16'\?"):
        PackedBlock(weights, precision="bfloat")
    for shape in [(6,), (6, 4, 1, 1), (0, 4), (6, 0)]:
        with pytest.raises(ArgumentError, match="first has the shape"):
            PackedBlock(torch.randn(shape))
    with pytest.raises(ArgumentError, match=r"second has the shape \(4, 5\), but must be \(outputs, 6\)"):
        PackedBlock(weights, second=torch.randn(4, 5))
    with pytest.raises(ArgumentError, match=r"first_bias has the shape \(4,\), but must be \(6,\)"):
        PackedBlock(weights, torch.randn(4))
    with pytest.raises(ArgumentError, match="second_bias is given without second"):
        PackedBlock(weights, second_bias=torch.randn(6))
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="norm_eps is"):
            PackedBlock(weights, norm_eps=eps)
    with pytest.raises(ArgumentError, match=r"first is torch\.float64 on cpu"):
        PackedBlock(weights.double())
    packed = PackedBlock(weights)
    packed(x)
    for wrong in (torch.randn(1, 5, 3, 3), torch.randn(3, 3, 5), torch.randn(1, 3, 3, 4), torch.tensor(1.0)):
        with pytest.raises(ArgumentError, match=r"x has the shape .* needs \(N, 4, height, width\)"):
            packed(wrong)
    with pytest.raises(ArgumentError, match=r"residual has the shape \(1, 4, 3, 3\), but the result has \(1, 6, 3, 3\)"):
        packed(x, x)
    for wrong in (x.double(), x.bfloat16(), x.to("meta"), x.to_sparse()):
        with pytest.raises(ArgumentError, match=r"x is .*must be a strided torch\.float32 tensor on a CPU"):
            packed(wrong)
    with pytest.raises(ArgumentError, match="x requires gradients"):
        packed(x.clone().requires_grad_())
    with torch.no_grad():
        assert packed(x.clone().requires_grad_()).shape == (1, 6, 3, 3)


def test_a_lazy_negation_is_resolved() -> None:
    packed, x = PackedBlock(*Block.random(4, 6)), torch.randn(1, 4, 3, 3)
    packed(x)
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    assert torch.equal(packed(negated), packed(x.clone()))


def test_what_the_c_interface_refuses() -> None:
    calls = library.load().calls
    matrix = torch.randn(4, 4)
    good = (library.FLOAT32, 4, 4, 4, library.GELU, 1, 1e-6, matrix.data_ptr(), None, matrix.data_ptr(), None)
    packed = library.Address()

    def pack(**changes: object) -> int:
        weights = library.PointwiseWeights(*good)
        for name, value in changes.items():
            setattr(weights, name, value)
        return calls.wk_pointwise_pack(ctypes.byref(weights), ctypes.byref(packed))

    bad: list[dict[str, object]] = [{"inputs": 0}, {"hidden": -1}, {"outputs": -1}, {"activation": 4}, {"activation": -1}]
    bad += [{"type": -1}, {"type": 4}]
    for changes in [*bad, {"eps": -1.0}, {"eps": float("nan")}, {"first": None}, {"second": None}]:
        assert pack(**changes) == library.BAD_ARGUMENT
        assert packed.value is None
    assert pack(type=library.FLOAT16) == library.UNAVAILABLE
    assert pack() == library.OK
    x, y = torch.randn(2, 4), torch.empty(2, 4)
    rows = ((x.data_ptr(), 0, 1, 0, 4), (None, 0, 0, 0, 0), (y.data_ptr(), 0, 1, 0, 4))
    for sizes in [(0, 1, 1, 2), (1, 0, 1, 2), (1, 1, -1, 2), (1, 1, 1, 0)]:
        call = library.PointwiseCall(*sizes, *rows)
        assert calls.wk_pointwise_run(packed, ctypes.byref(call)) == library.BAD_ARGUMENT
    call = library.PointwiseCall(1, 1, 1, 2, *rows)
    assert calls.wk_pointwise_run(None, ctypes.byref(call)) == library.BAD_ARGUMENT
    assert calls.wk_pointwise_run_at(packed, ctypes.byref(call), None, None, None, y.data_ptr()) == library.BAD_ARGUMENT
    assert calls.wk_pointwise_run(packed, ctypes.byref(call)) == library.OK
    calls.wk_pointwise_free(packed)
    calls.wk_pointwise_free(None)


def test_several_python_threads() -> None:
    jobs = [(PackedBlock(*Block.random(60, 300, 60)), torch.randn(pixels, 60)) for pixels in (1, 30, 49, 500)]
    want = [packed(x) for packed, x in jobs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(jobs[i][0](jobs[i][1]), want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i % len(jobs),)) for i in range(2 * len(jobs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


class Computed(Dataset):
    """Data set whose items a block computes, in the workers of a loader."""

    def __init__(self) -> None:
        self.rows, self.packed = torch.randn(6, 40, 60), PackedBlock(*Block.random(60, 800, 60))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(2)
        return self.packed(self.rows[i])


def test_forked_workers(threads: Callable[[int], None]) -> None:
    threads(2)
    data = Computed()
    want = data.packed(data.rows)  # the pool of threads exists before the fork
    got = torch.cat(list(DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)))
    assert torch.equal(got, want)


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    channels = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 96, 100, 257, 515, 530])
    sizes = (draw(channels), draw(channels), draw(st.sampled_from([0, 1, 16, 31, 64, 130])))
    shape = (draw(st.integers(1, 4)), sizes[0], draw(st.integers(1, 13)), draw(st.integers(1, 17)))
    options = (draw(st.sampled_from(sorted(ACTIVATIONS))), sizes[0] > 1 and draw(st.booleans()), draw(st.booleans()))
    layouts = (draw(st.sampled_from(sorted(LAYOUTS))), draw(st.none() | st.sampled_from(sorted(LAYOUTS))))
    return sizes, shape, options, layouts, draw(st.integers(1, 3))


def fuzzed(problem: tuple) -> None:
    sizes, shape, options, layouts, threads = problem
    x, residual = LAYOUTS[layouts[0]](torch.randn(shape)), None
    if layouts[1]:
        residual = LAYOUTS[layouts[1]](torch.randn(shape[0], sizes[2] or sizes[1], *shape[2:]))
    with thread_count(threads):
        check(Block.random(*sizes, *options), x, residual)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_random_problems(problem: tuple) -> None:
    fuzzed(problem)


@pytest.mark.slow
def test_five_thousand_random_problems(isa: str) -> None:
    settings(max_examples=5000, deadline=None)(given(problems())(fuzzed))()
