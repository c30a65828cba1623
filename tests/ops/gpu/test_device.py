"""The compiled kernels on a real GPU: sizes of real networks, CUDA graphs, compilation, streams, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES
from tests.ops.cases import relative_error
from widekernel import ops
from widekernel.layers import LargeKernel, Rectangles
from widekernel.ops import torch_conv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
NHWC = torch.channels_last
SUM, WEIGHT_GRAD = "depthwise_sum", "depthwise_weight_grad"
# Tensor cores add with fewer bits than they hold, which shows in long sums; a single product of TF32 is off by far more.
LIMITS = {"float32": 5e-5, "tf32": 3e-3, "bfloat16": 1.6e-2, "float16": 4e-3}
KINDS = pytest.mark.parametrize("kind", LIMITS)
CASES: dict[str, tuple[tuple[int, ...], list[tuple[int, int]], torch.memory_format]] = {
    "31x31": ((16, 32, 56, 56), [(31, 31)], torch.contiguous_format),
    "5x51": ((16, 32, 56, 56), [(5, 51)], torch.contiguous_format),
    "51x5": ((16, 32, 56, 56), [(51, 5)], torch.contiguous_format),
    "cross": ((16, 32, 56, 56), [(51, 5), (5, 51), (5, 5)], torch.contiguous_format),
    "cross-channels_last": ((16, 32, 56, 56), [(51, 5), (5, 51), (5, 5)], NHWC),
    "27x27": ((32, 96, 14, 14), [(27, 27)], torch.contiguous_format),
    "13x13": ((48, 192, 7, 7), [(13, 13)], torch.contiguous_format),
    "odd-sizes": ((5, 19, 29, 37), [(17, 23), (3, 3)], torch.contiguous_format),
    "7x7-channels_last": ((16, 96, 56, 56), [(7, 7)], NHWC),
}
CASE = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _as_shipped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ignore this machine's table and the precision that was set before."""
    monkeypatch.setenv("WIDEKERNEL_TUNED", "0")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.cuda.empty_cache()


def dtype_of(kind: str) -> torch.dtype:
    """Return the type; for "tf32" it is float32, and rounding to TF32 is switched on."""
    if kind == "tf32":
        torch.set_float32_matmul_precision("high")
    return torch.float32 if kind == "tf32" else getattr(torch, kind)


def arguments(case: str, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None) -> list[Tensor]:
    """Return x, the kernels and a bias, all requiring gradients; the same on every device."""
    shape, sizes, layout = CASES[case]
    x = torch.randn(shape).to(device or DEVICE, dtype).contiguous(memory_format=layout)
    kernels = [torch.randn(shape[1], 1, *size).to(x) for size in sizes]
    return [t.requires_grad_() for t in (x, *kernels, torch.randn(shape[1]).to(x))]


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().contiguous().requires_grad_() for t in tensors]


def convolutions(x: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
    """Compute PyTorch's convolutions with kernels that are anchored in the middle."""
    sizes = [(kernel.shape[2] // 2, kernel.shape[3] // 2) for kernel in kernels]
    return [F.conv2d(x, kernel, padding=size, groups=x.shape[1]) for kernel, size in zip(kernels, sizes)]


def summed(inputs: Sequence[Tensor]) -> Tensor:
    return sum(convolutions(inputs[0], inputs[1:-1])) + inputs[-1].view(-1, 1, 1)


def step(inputs: Sequence[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    """Compute the sum and all its gradients."""
    y = ops.depthwise_sum(inputs[0], inputs[1:-1], bias=inputs[-1], **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def assert_within(kind: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    errors = [relative_error(mine, truth) for mine, truth in zip(got, want, strict=True)]
    assert max(errors) <= LIMITS[kind], f"relative errors of {kind}: {', '.join(f'{e:.2g}' for e in errors)}"


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


# ---- Values


@CASE
@KINDS
def test_values_and_gradients(kind: str, case: str) -> None:
    inputs = arguments(case, dtype_of(kind))
    grad = torch.randn_like(inputs[0])
    with ops.trace() as trace:
        got = step(inputs, grad, backend="triton")
    assert trace.backends() == ["triton"] * len(inputs)
    assert all(problem.tf32 == (kind == "tf32") for _, problem in trace.calls)
    exact = doubled(inputs)
    truth = summed(exact)
    assert_within(kind, got, [truth.detach(), *torch.autograd.grad(truth, exact, grad.double())])
    assert got[0].stride() == got[1].stride() == inputs[0].stride()


@pytest.mark.parametrize("case", ["cross", "cross-channels_last", "odd-sizes"])
@KINDS
def test_branches_and_their_gradients(kind: str, case: str) -> None:
    inputs = arguments(case, dtype_of(kind))[:-1]
    grads = [torch.randn_like(inputs[0]) for _ in inputs[1:]]
    with ops.trace() as trace:
        ys = ops.depthwise_branches(inputs[0], inputs[1:], backend="triton")
        got = torch.autograd.grad(ys, inputs, grads)
    assert set(trace.backends()) == {"triton"}
    operators = [BRANCHES, SUM_OF_BRANCHES, *[WEIGHT_GRAD] * len(grads)]
    assert sorted(problem.op for _, problem in trace.calls) == sorted(operators)
    exact = doubled(inputs)
    truths = convolutions(exact[0], exact[1:])
    want = torch.autograd.grad(truths, exact, [grad.double() for grad in grads])
    assert_within(kind, [*ys, *got], [*(truth.detach() for truth in truths), *want])


# UniRepLKNet's dilated block, in sizes and dilations.
BLOCK = [((13, 13), 1), ((5, 5), 1), ((7, 7), 2), ((3, 3), 3), ((3, 3), 4), ((3, 3), 5)]
DILATED: dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, int], int]], torch.memory_format]] = {
    "block-28": ((16, 160, 28, 28), BLOCK, torch.contiguous_format),
    "block-14": ((16, 320, 14, 14), BLOCK, torch.contiguous_format),
    "block-7": ((16, 640, 7, 7), BLOCK, torch.contiguous_format),
    "sum-odd-sizes": ((5, 19, 29, 37), [((4, 7), 2), ((2, 3), 7), ((7, 1), 3)], torch.contiguous_format),
    "sum-small": ((5, 96, 29, 37), [((3, 3), 5), ((4, 2), 3)], torch.contiguous_format),
    "sum-small-channels_last": ((5, 96, 29, 37), [((3, 3), 5), ((4, 2), 3)], NHWC),
}


@pytest.mark.parametrize("case", DILATED)
@KINDS
def test_dilated_kernels_and_their_gradients(kind: str, case: str) -> None:
    shape, rects, layout = DILATED[case]
    x = torch.randn(shape).to(DEVICE, dtype_of(kind)).contiguous(memory_format=layout)
    inputs = [t.requires_grad_() for t in (x, *(torch.randn(shape[1], 1, *size).to(x) for size, _ in rects))]
    anchors = [(kh - 1, 0) if case == "sum-odd-sizes" else (kh // 2, kw // 2) for (kh, kw), _ in rects]
    dilations = [dilation for _, dilation in rects]
    exact = doubled(inputs)
    truths = [
        torch_conv.depthwise_sum(exact[0], [kernel], [anchor], None, dilations=(dilation,))
        for kernel, anchor, dilation in zip(exact[1:], anchors, dilations)
    ]
    with ops.trace() as trace:
        if case.startswith("sum"):
            ys, truths = [ops.depthwise_sum(x, inputs[1:], anchors, backend="triton", dilations=dilations)], [sum(truths)]
        else:
            ys = ops.depthwise_branches(x, inputs[1:], anchors, backend="triton", dilations=dilations)
        grads = [torch.randn_like(y) for y in ys]
        got = torch.autograd.grad(ys, inputs, grads)
    assert set(trace.backends()) == {"triton"}
    assert sorted(problem.dilations[0] for _, problem in trace.calls if problem.op == WEIGHT_GRAD) == sorted(dilations)
    want = torch.autograd.grad(truths, exact, [grad.double() for grad in grads])
    assert_within(kind, [*(y.detach() for y in ys), *got], [*(truth.detach() for truth in truths), *want])


def test_tf32_is_less_exact_than_float32() -> None:
    """Otherwise the limit of float32 would not show that it is float32."""
    inputs = [t.detach() for t in arguments("31x31")]
    truth = summed([t.double() for t in inputs])
    errors = []
    for kind in ("float32", "tf32"):
        dtype_of(kind)
        errors.append(relative_error(ops.depthwise_sum(inputs[0], inputs[1:-1], bias=inputs[-1], backend="triton"), truth))
    assert errors[0] <= LIMITS["float32"] < errors[1]


@pytest.mark.parametrize("case", ["31x31", "5x51", "51x5", "cross", "27x27", "13x13"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_kernels_run_on_triton_by_default(dtype: torch.dtype, case: str) -> None:
    inputs = arguments(case, dtype)
    with ops.trace() as trace:
        step(inputs, torch.ones_like(inputs[0]))
    assert set(trace.backends()) == {"triton"}
    assert {explained.backend for explained in ops.explain(inputs[0], inputs[1:-1])} == {"triton"}


@CASE
def test_runs_are_bitwise_equal(case: str) -> None:
    inputs = arguments(case, torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    first = step(inputs, grad, backend="triton")
    for _ in range(3):
        # The tensors get other addresses, and other work runs in between.
        noise = torch.randn(1 << 24, device=DEVICE).sin_()
        assert_same(step(inputs, grad, backend="triton"), first)
        del noise


# ---- Graphs, compilation, training


@pytest.mark.parametrize("case", ["31x31", "cross", "13x13", "7x7-channels_last"])
def test_cuda_graphs(case: str) -> None:
    inputs = arguments(case, torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step(inputs, grad, backend="triton")
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, grad, backend="triton")
    for _ in range(2):
        with torch.no_grad():
            for tensor in (*inputs, grad):
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        assert_same(captured, step(inputs, grad, backend="triton"))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", ["31x31", "cross-channels_last"])
def test_compiled(case: str, dynamic: bool) -> None:
    def function(x: Tensor, kernels: list[Tensor], bias: Tensor) -> Tensor:
        y = ops.depthwise_sum(x, kernels, bias=bias).relu()
        for branch in ops.depthwise_branches(x, kernels):
            y = y + branch.sin()
        return y

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for batch in (16, 7) if dynamic else (16,):
        inputs = [t.detach() for t in arguments(case)]
        inputs = [t.requires_grad_() for t in (inputs[0][:batch], *inputs[1:])]
        results = []
        for run in (compiled, function):
            with ops.trace() as trace:
                y = run(inputs[0], inputs[1:-1], inputs[-1])
                results.append([y.detach(), *torch.autograd.grad((y / 32).sin().sum(), inputs)])
            assert set(trace.backends()) == {"triton"}
        assert_within("float32", *results)
    torch._dynamo.reset()


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        LargeKernel(Rectangles(32, [(51, 5), (5, 51), (5, 5)]), [nn.BatchNorm2d(32) for _ in range(3)], identity=True),
        nn.Conv2d(32, 64, 1),
        nn.GELU(),
        LargeKernel(Rectangles(64, [(31, 31), (5, 5)]), identity=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).to(DEVICE)


@pytest.mark.parametrize("layout", [torch.contiguous_format, NHWC], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_in_mixed_precision(dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = network().to(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=dtype == torch.float16)
    x = torch.randn(32, 3, 64, 64, device=DEVICE).contiguous(memory_format=layout)
    labels = torch.arange(32, device=DEVICE) % 10
    losses = []
    with ops.trace() as trace:
        for _ in range(20):
            with torch.autocast(DEVICE, dtype):
                loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert {name for name, of in trace.calls if max(map(max, of.kernels)) >= 31} == {"triton"}
    assert {problem.dtype for _, problem in trace.calls} == {dtype}
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


NCCL = torch.distributed.is_available() and torch.distributed.is_nccl_available()


@pytest.mark.skipif(not NCCL, reason="PyTorch was built without NCCL")
def test_data_parallel(tmp_path: Path) -> None:
    torch.cuda.set_device(0)
    alone = network()
    inner = copy.deepcopy(alone)
    x = torch.randn(8, 3, 64, 64, device=DEVICE)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(inner, device_ids=[0])
        for model in (alone, parallel):
            for _ in range(2):
                model.zero_grad()
                model(x).square().sum().backward()
        torch.cuda.synchronize()
    finally:
        torch.distributed.destroy_process_group()
    for mine, theirs in zip(inner.parameters(), alone.parameters()):
        # PyTorch's convolutions around ours need not be bitwise equal.
        assert relative_error(mine.grad, theirs.grad) <= 1e-3


# ---- Streams and devices


def test_kernels_run_on_the_current_stream() -> None:
    """A launch on another stream would read the images before they are written."""
    inputs = [t.detach() for t in arguments("cross", torch.bfloat16)]
    grad = torch.randn_like(inputs[0])

    def run(x: Tensor) -> list[Tensor]:
        y = ops.depthwise_sum(x, inputs[1:-1], bias=inputs[-1], backend="triton")
        w = ops.depthwise_weight_grad(x, grad, (51, 5), backend="triton")
        return [y, w, *ops.depthwise_branches(x, inputs[1:-1], backend="triton")]

    want = run(inputs[0])
    late = torch.full_like(inputs[0], float("nan"))
    aside = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(200_000_000)
        late.copy_(inputs[0])
        got = run(late)
    aside.synchronize()
    assert_same(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("case", ["31x31", "cross", "13x13", "7x7-channels_last"])
def test_a_device_that_is_not_the_current_one(case: str) -> None:
    torch.manual_seed(1)
    inputs = arguments(case, torch.float32, "cuda:1")
    grad = torch.randn_like(inputs[0])
    with torch.cuda.device(0):
        got = step(inputs, grad, backend="triton")
        assert torch.cuda.current_device() == 0
    assert {t.device for t in got} == {torch.device("cuda:1")}
    exact = doubled(inputs)
    truth = summed(exact)
    assert_within("float32", got, [truth.detach(), *torch.autograd.grad(truth, exact, grad.double())])


# ---- Memory


MANY = 2**31
# Just above 2**31 numbers, named after the kernels that are likely to compute them.
HUGE = {
    "bands": ((MANY // 2**18 + 1, 64, 64, 64), (31, 5), torch.contiguous_format),
    "wide": ((MANY // 2**18 + 1, 64, 64, 64), (5, 51), torch.contiguous_format),
    "flat": ((MANY // (1024 * 49) + 2, 1024, 7, 7), (13, 13), torch.contiguous_format),
    "planes": ((MANY // 2**18 + 1, 64, 64, 64), (3, 3), torch.contiguous_format),
    "channels": ((MANY // 2**18 + 1, 64, 64, 64), (5, 5), NHWC),
    "one-image": ((1, 2**10 + 1, 2**11, 2**10), (31, 5), torch.contiguous_format),
}


def enough_memory(numbers: int) -> bool:
    free, _ = torch.cuda.mem_get_info()
    return free > 2 * numbers * 5.5  # image, output and gradients in 16 bits, and a copy


@pytest.mark.parametrize("huge", HUGE)
def test_more_numbers_than_32_bits_can_index(huge: str) -> None:
    """Only the last planes are not zero, so that they determine the results."""
    shape, size, layout = HUGE[huge]
    numbers = torch.Size(shape).numel()
    assert numbers > MANY
    if not enough_memory(numbers):
        pytest.skip("the GPU has too little free memory")
    last = (slice(-1, None), slice(-2, None)) if shape[0] == 1 else (slice(-1, None),)
    x, grad = (torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=layout).zero_() for _ in range(2))
    x[last], grad[last] = torch.randn_like(x[last]), torch.randn_like(grad[last])
    kernel = torch.randn(shape[1], 1, *size).to(x)
    y = ops.depthwise_sum(x, [kernel], backend="triton")
    part, part_of_kernel = x[last].double().contiguous(), kernel[last[-1] if shape[0] == 1 else slice(None)].double()
    part_of_kernel.requires_grad_()
    (truth,) = convolutions(part, [part_of_kernel])
    assert_within("bfloat16", [y[last]], [truth.detach()])
    assert not y[:1, : -2 if shape[0] == 1 else None].count_nonzero()
    del y
    got = ops.depthwise_weight_grad(x, grad, size, backend="triton")
    (want,) = torch.autograd.grad(truth, part_of_kernel, grad[last].double())
    assert_within("bfloat16", [got[-len(want) :]], [want])


def test_running_out_of_memory_leaves_everything_usable() -> None:
    x = torch.randn(64, 64, 128, 128, device=DEVICE)
    kernel = torch.randn(64, 1, 31, 31, device=DEVICE)
    runs: list[Callable[[], Any]] = [
        lambda: ops.depthwise_sum(x, [kernel], backend="triton"),
        lambda: ops.depthwise_branches(x, [kernel, kernel], backend="triton")[1],
    ]
    want = [run() for run in runs]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
        for run in runs:
            with pytest.raises(torch.OutOfMemoryError):
                run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same([run() for run in runs], want)
