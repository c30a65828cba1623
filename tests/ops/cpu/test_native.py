"""Native kernels against the definition in float64: all algorithms, layouts, types and instruction sets; refused calls."""

from __future__ import annotations

import functools
import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.native import needs_native
from tests.ops.cases import CASES, EMPTY, LAYOUTS, Case, relative_error
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.ops import reference
from widekernel.ops.backends.native import NativeBackend
from widekernel.ops.cpu import library
from widekernel.ops.cpu.costs import costs_of
from widekernel.ops.cpu.plan import METHODS, Pass, Piece, Plan, reason_for_pytorch
from widekernel.ops.cpu.prepared import PreparedSum, PreparedWeightGrad
from widekernel.ops.problem import Problem, mirror

pytestmark = needs_native

DIRECT, ROWS, COLUMNS = library.DIRECT, library.HYBRID_ALONG_ROWS, library.HYBRID_ALONG_COLUMNS
# Largest error, as a share of the largest exact value, in float32.
LIMIT = {DIRECT: 5e-6, ROWS: 2e-6, COLUMNS: 2e-6}
# Rounding of the result in shorter types; they are computed in float32.
SHORT = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
METHOD = pytest.mark.parametrize("method", METHODS, ids=METHODS.get)


def forced(problem: Problem, method: int, threads: int = 2) -> Plan:
    """Run each kernel separately and by that method."""
    pieces = [Piece(*size, *anchor) for size, anchor in zip(problem.kernels, problem.anchors)]
    return Plan(tuple(Pass(piece, method) for piece in pieces), tuple(range(len(pieces))), threads, 0.0)


def native_sum(
    x: Tensor, kernels: list[Tensor], anchors: list, bias: Tensor | None, method: int, threads: int = 2
) -> Tensor:
    problem = Problem.of_sum(x, kernels, anchors)
    return PreparedSum(problem, forced(problem, method, threads))(x, kernels, anchors, bias)


def native_weight_grad(
    x: Tensor, grad: Tensor, size: tuple[int, int], anchor: tuple, method: int, threads: int = 2
) -> Tensor:
    problem = Problem.of_weight_grad(x, size, anchor)
    return PreparedWeightGrad(problem, forced(problem, method, threads))(x, grad, size, anchor)


def check(x: Tensor, kernels: list[Tensor], anchors: list, bias: Tensor | None, method: int, threads: int = 2) -> None:
    """Check forward pass, input gradient and weight gradients of one call, and that its arguments stay unchanged."""
    before = [t.clone() for t in (x, *kernels)]
    grad = torch.randn_like(x.contiguous()).to(x.dtype)
    wide, taps = x.double(), [k.double() for k in kernels]
    limit = LIMIT[method] + SHORT[x.dtype]
    y = native_sum(x, kernels, anchors, bias, method, threads)
    assert y.dtype == x.dtype
    assert relative_error(y, reference.depthwise_sum(wide, taps, anchors, None if bias is None else bias.double())) <= limit
    mirrored = [mirror(k.shape[2:], a) for k, a in zip(kernels, anchors)]
    flipped = [k.flip(-1, -2) for k in kernels]
    for_x = native_sum(grad, flipped, mirrored, None, method, threads)
    assert (
        relative_error(for_x, reference.depthwise_sum(grad.double(), [t.flip(-1, -2) for t in taps], mirrored, None))
        <= limit
    )
    for kernel, anchor in zip(kernels, anchors):
        size = (kernel.shape[2], kernel.shape[3])
        w = native_weight_grad(x, grad, size, anchor, method, threads)
        assert w.dtype == x.dtype
        assert relative_error(w, reference.depthwise_weight_grad(wide, grad.double(), size, anchor)) <= limit
    assert all(torch.equal(now, then) for now, then in zip((x, *kernels), before))


@METHOD
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_in_every_layout(case: Case, layout: str, method: int) -> None:
    x, kernels, bias = case.tensors(torch.float32)
    check(LAYOUTS[layout](x), kernels, case.anchors, bias, method)


@METHOD
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "some-channels"])
@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 33, 130])
def test_channels_around_the_width_of_a_vector(channels: int, layout: str, method: int) -> None:
    x = LAYOUTS[layout](torch.randn(2, channels, 9, 10))
    kernels = [torch.randn(channels, 1, 7, 7), torch.randn(channels, 1, 3, 11)]
    check(x, kernels, [(3, 3), (1, 5)], torch.randn(channels), method)


@METHOD
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, layout: str, method: int) -> None:
    x = LAYOUTS[layout](torch.randn(2, 21, 12, 13).to(dtype))
    check(x, [torch.randn(21, 1, 9, 5).to(dtype)], [(4, 2)], torch.randn(21).to(dtype), method)


@METHOD
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 1, 1), (1, 3, 4, 1), (2, 1, 5, 6), (1, 17, 1, 5), (2, 20, 6, 1)], ids=str
)
def test_dimensions_of_size_one_with_any_stride(shape: tuple[int, ...], method: int) -> None:
    dense = torch.randn(shape)
    odd = [stride if size > 1 else 7 + 2 * i for i, (size, stride) in enumerate(zip(shape, dense.stride()))]
    check(dense.as_strided(shape, odd), [torch.randn(shape[1], 1, 3, 4)], [(2, 0)], None, method)


# One image and few channels: cut into bands of rows, and for the hybrid algorithm into tiles of columns as well.
LARGE = [(1, 16, 110, 150, 31, 31), (1, 3, 300, 40, 5, 51), (1, 3, 40, 300, 51, 5), (2, 17, 130, 129, 3, 3)]


@functools.cache
def exact(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return image, gradient, kernel, and the sum and weight gradient by PyTorch's convolution in float64."""
    batch, channels, height, width, kh, kw = sizes
    x, grad = torch.randn(batch, channels, height, width), torch.randn(batch, channels, height, width)
    kernel = torch.randn(channels, 1, kh, kw)
    wide = kernel.double().requires_grad_()
    y = torch.nn.functional.conv2d(x.double(), wide, padding=(kh // 2, kw // 2), groups=channels)
    return x, grad, kernel, y.detach(), torch.autograd.grad(y, wide, grad.double())[0]


@METHOD
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large_images(sizes: tuple[int, ...], layout: str, threads: int, method: int) -> None:
    x, grad, kernel, y, w = exact(sizes)
    size, middle = sizes[4:], (sizes[4] // 2, sizes[5] // 2)
    x = LAYOUTS[layout](x)
    assert relative_error(native_sum(x, [kernel], [middle], None, method, threads), y) <= LIMIT[method]
    assert relative_error(native_weight_grad(x, grad, size, middle, method, threads), w) <= LIMIT[method]


@METHOD
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_instruction_set(isa: str, layout: str, method: int) -> None:
    for dtype, (channels, size) in itertools.product(SHORT, [(5, (13, 3)), (19, (7, 7)), (16, (12, 15))]):
        x = LAYOUTS[layout](torch.randn(2, channels, 15, 14).to(dtype))
        check(x, [torch.randn(channels, 1, *size).to(dtype)], [(size[0] // 2, size[1] - 1)], None, method)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("method", METHODS, ids=METHODS.get)
@pytest.mark.parametrize("together", [False, True], ids=["covered", "all in one"])
def test_kernels_joined_into_one_pass(together: bool, method: int, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 20, 11, 12))
    kernels = [torch.randn(20, 1, *size) for size in [(11, 3), (3, 9), (3, 3)]]
    anchors = [(5, 1), (0, 4), (1, 1)]
    problem = Problem.of_sum(x, kernels, anchors)
    if together:
        passes, targets = (Pass(Piece(11, 9, 5, 4), method),), (0, 0, 0)
    else:
        passes, targets = (Pass(Piece(11, 3, 5, 1), method), Pass(Piece(3, 9, 0, 4), DIRECT)), (0, 1, 0)
    y = PreparedSum(problem, Plan(passes, targets, 2, 0.0))(x, kernels, anchors, None)
    want = reference.depthwise_sum(x.double(), [k.double() for k in kernels], anchors, None)
    assert relative_error(y, want) <= LIMIT[method] + LIMIT[DIRECT]


@METHOD
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_epilogue(layout: str, method: int) -> None:
    x, kernel = LAYOUTS[layout](torch.randn(2, 37, 9, 9)), torch.randn(37, 1, 5, 5)
    scale, shift = torch.randn(37), torch.randn(37)
    problem = Problem.of_sum(x, [kernel], [(2, 2)])
    prepared = PreparedSum(problem, forced(problem, method))
    want = reference.depthwise_sum(x.double(), [kernel.double()], [(2, 2)], None)
    want = want * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    assert relative_error(prepared(x, [kernel], [(2, 2)], shift, scale, False), want) <= LIMIT[method]
    rectified = prepared(x, [kernel], [(2, 2)], shift, scale, True)
    assert relative_error(rectified, want.relu()) <= LIMIT[method]
    assert rectified.min() == 0
    x[0, 5] = float("nan")
    assert prepared(x, [kernel], [(2, 2)], shift, scale, True)[0, 5].isnan().all()


@METHOD
def test_the_same_call_gives_the_same_bits(method: int) -> None:
    x, grad, kernel = torch.randn(3, 40, 30, 31), torch.randn(3, 40, 30, 31), torch.randn(40, 1, 9, 13)
    sums = [native_sum(x, [kernel], [(4, 6)], None, method, threads) for threads in (1, 2, 2, 4)]
    assert all(torch.equal(sums[0], other) for other in sums)
    grads = [native_weight_grad(x, grad, (9, 13), (4, 6), method, 2) for _ in range(4)]
    assert all(torch.equal(grads[0], other) for other in grads)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_direct_algorithm_keeps_nan_and_infinity_under_the_kernel(value: float, layout: str) -> None:
    x = torch.randn(1, 20, 24, 24)
    x[0, 3, 10, 12] = value
    x, kernel = LAYOUTS[layout](x), torch.rand(20, 1, 9, 7) + 0.5
    with ops.trace() as trace:
        y = ops.depthwise_sum(x, [kernel], algorithm="direct", backend="native")
    assert trace.calls[0][1].algorithm == "direct"
    wrong = torch.zeros_like(y, dtype=torch.bool)
    wrong[0, 3, 6:15, 9:16] = True
    assert torch.equal(~y.isfinite(), wrong)


@pytest.mark.parametrize("method", [ROWS, COLUMNS], ids=METHODS.get)
def test_the_hybrid_algorithm_spreads_nan_along_the_transformed_axis_only(method: int) -> None:
    x = torch.randn(1, 20, 24, 24)
    x[0, 3, 10, 12] = float("nan")
    y = native_sum(x, [torch.randn(20, 1, 5, 5)], [(2, 2)], None, method)
    wrong = torch.zeros_like(y, dtype=torch.bool)
    band = (0, 3, slice(8, 13)) if method == ROWS else (0, 3, slice(None), slice(10, 15))
    wrong[band] = True
    assert torch.equal(y.isnan(), wrong)


@pytest.mark.parametrize(("method", "limit"), [(DIRECT, 2e-4), (ROWS, 2e-2)], ids=["direct", "hybrid"])
def test_errors_beside_an_outlier(method: int, limit: float) -> None:
    """An outlier of 1e4 far to the left of outputs of about 20: the hybrid error there is relative to the outlier."""
    x, kernel = torch.randn(1, 16, 56, 56), torch.randn(16, 1, 31, 31)
    x[:, :, 28, 2] = 1e4
    y = native_sum(x, [kernel], [(15, 15)], None, method)
    want = reference.depthwise_sum(x.double(), [kernel.double()], [(15, 15)], None)
    beside = (y.double() - want)[..., 20:].abs().max().item()
    assert beside < limit


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_nothing_to_compute(case: Case) -> None:
    x, kernels, bias = case.tensors(torch.float32)
    y = ops.depthwise_sum(x, kernels, case.anchors, bias, backend="native")
    assert y.shape == x.shape
    w = ops.depthwise_weight_grad(x, x, (3, 5), backend="native")
    assert w.shape == (x.shape[1], 1, 3, 5)
    assert not w.any()
    assert "nothing to compute" in str(ops.explain(x, kernels)[0])


def test_working_memory_does_not_depend_on_the_batch() -> None:
    for channels_last, op in itertools.product([False, True], ["depthwise_sum", "depthwise_weight_grad"]):
        bytes_needed = set()
        for batch in (8, 64):
            problem = Problem(op, "cpu", torch.float32, (batch, 256, 56, 56), ((31, 31),), ((15, 15),), channels_last)
            own, shared = NativeBackend().prepare(problem).workspace()  # type: ignore[attr-defined]
            bytes_needed.add((own, shared))
            assert 0 < own < 8 << 20
        assert len(bytes_needed) == 1
    details = ops.explain(torch.randn(2, 16, 30, 30), [torch.randn(16, 1, 21, 21)])[0].details
    assert "working memory" in details
    loaded = library.load()
    assert f"{loaded.isa}, cost model of {costs_of(loaded.isa, loaded.processor).measured_with}, " in details


def test_what_is_refused() -> None:
    x, kernel = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3)
    with pytest.raises(ops.NoBackendError, match=r"native cannot compute .*not torch.float64"):
        ops.depthwise_sum(x.double(), [kernel.double()], backend="native")
    assert ops.explain(x.to("meta"), [kernel.to("meta")])[0].reasons["native"] == ["it runs on a CPU, not on meta"]
    with pytest.raises(ops.NoBackendError, match="at most 64 kernels, not 65"):
        ops.depthwise_sum(x, [kernel] * 65, backend="native")
    assert ops.explain(x, [kernel] * 65)[0].backend == "portable"
    # A transform of that length does not exist; the plan would never ask for it.
    with pytest.raises(ArgumentError, match="do not fit together"):
        native_sum(torch.randn(1, 2, 4, 400), [torch.randn(2, 1, 3, 601)], [(1, 300)], None, ROWS)


def test_small_kernels_on_channels_last_images_are_left_to_pytorch_where_it_is_faster() -> None:
    x, kernel = torch.randn(6, 64, 56, 56).contiguous(memory_format=torch.channels_last), torch.randn(64, 1, 3, 3)
    explanation = ops.explain(x, [kernel])[0]
    loaded = library.load()
    reason = reason_for_pytorch(Problem.of_sum(x, [kernel], [(1, 1)]), loaded.processor, loaded.isa)
    if reason is None:
        assert loaded.processor in ("amd", "zen4")
        assert (loaded.isa, explanation.backend) == ("avx512", "native")
    else:
        assert explanation.backend == "portable"
        assert explanation.reasons["native"] == [reason]
    assert ops.explain(x.contiguous(), [kernel])[0].backend == "native"
    assert ops.explain(x, [torch.randn(64, 1, 7, 7)])[0].backend == "native"
    with ops.trace() as trace:
        ops.depthwise_sum(x, [kernel], backend="native")
    assert trace.backends() == ["native"]


def test_several_python_threads() -> None:
    jobs = [(torch.randn(1, 8 + i, 20, 20 + i), torch.randn(8 + i, 1, 9, 5 + 2 * i)) for i in range(6)]
    want = [ops.depthwise_sum(x, [k], backend="native") for x, k in jobs]
    got: list[list[Tensor]] = [[] for _ in jobs]

    def work(i: int) -> None:
        for _ in range(20):
            got[i].append(ops.depthwise_sum(jobs[i][0], [jobs[i][1]], backend="native"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for truth, results in zip(want, got):
        assert len(results) == 20
        assert all(torch.equal(truth, result) for result in results)


class Convolved(Dataset):
    """Data set whose items the operator computes, in the workers of a loader."""

    def __init__(self) -> None:
        self.images, self.kernel = torch.randn(6, 4, 40, 40), torch.randn(4, 1, 21, 21)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(2)
        return ops.depthwise_sum(self.images[i : i + 1], [self.kernel], backend="native")[0]


def test_forked_workers() -> None:
    data = Convolved()
    want = ops.depthwise_sum(data.images, [data.kernel], backend="native")  # the pool of threads exists before the fork
    got = torch.cat(list(DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)))
    assert torch.equal(got, want)


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    shape = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 7, 16, 18, 33])),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
    )
    sizes = draw(st.lists(st.tuples(st.integers(1, 25), st.integers(1, 25)), min_size=1, max_size=3))
    anchors = [(draw(st.integers(0, kh - 1)), draw(st.integers(0, kw - 1))) for kh, kw in sizes]
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    return shape, sizes, anchors, layout, draw(st.sampled_from(list(METHODS))), draw(st.integers(1, 4)), draw(st.booleans())


def fuzzed(problem: tuple) -> None:
    shape, sizes, anchors, layout, method, threads, biased = problem
    x = LAYOUTS[layout](torch.randn(shape))
    kernels = [torch.randn(shape[1], 1, *size) for size in sizes]
    grad = LAYOUTS[layout](torch.randn(shape))
    bias = torch.randn(shape[1]) if biased else None
    y = native_sum(x, kernels, anchors, bias, method, threads)
    pads = [(c, kw - 1 - c, r, kh - 1 - r) for (kh, kw), (r, c) in zip(sizes, anchors)]
    pad, conv = torch.nn.functional.pad, torch.nn.functional.conv2d
    want = sum(conv(pad(x.double(), p), k.double(), groups=shape[1]) for p, k in zip(pads, kernels))
    want = want if bias is None else want + bias.double().view(-1, 1, 1)
    # Random sums may cancel, so the largest sum of absolute values is what errors are measured by.
    weight = sum(conv(pad(x.double().abs(), p), k.double().abs(), groups=shape[1]) for p, k in zip(pads, kernels)).max()
    assert (y.double() - want).abs().max() <= LIMIT[method] * weight.clamp(min=want.abs().max())
    size, anchor = sizes[0], anchors[0]
    w = native_weight_grad(x, grad, size, anchor, method, threads)
    planes = pad(x.double(), pads[0]).flatten(0, 1).unsqueeze(0)
    batch, channels = shape[:2]
    window = grad.double().flatten(0, 1).unsqueeze(1)
    exact = conv(planes, window, groups=batch * channels).view(batch, channels, *size).sum(0).unsqueeze(1)
    weight = conv(planes.abs(), window.abs(), groups=batch * channels).view(batch, channels, *size).sum(0).max()
    assert (w.double() - exact).abs().max() <= LIMIT[method] * weight


@settings(max_examples=150, deadline=None)
@given(problems())
def test_random_problems(problem: tuple) -> None:
    fuzzed(problem)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(problems())
def test_ten_thousand_random_problems(problem: tuple) -> None:
    fuzzed(problem)
