"""The operators on the GPU kernels from end to end: values, gradients, transforms, compilation, layouts and one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES, registered, several
from tests.ops.cases import EMPTY, Case, definition, relative_error
from tests.ops.gpu.helpers import DEVICE, DTYPES, assert_exact, draw
from tests.ops.test_registration import AMBIGUOUS, flat
from widekernel import ops
from widekernel.layers import LargeKernel, Rectangles
from widekernel.ops import call_trace, reference
from widekernel.ops.backends import triton
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.problem import Problem, memory_format

TRITON = TritonBackend()

pytestmark = pytest.mark.interpreted

SUM, WEIGHT_GRAD = "depthwise_sum", "depthwise_weight_grad"
OPERATORS = torch.ops.widekernel
CONTIGUOUS, NHWC = torch.contiguous_format, torch.channels_last
BOTH_LAYOUTS = pytest.mark.parametrize("layout", [CONTIGUOUS, NHWC], ids=["contiguous", "channels_last"])
# Of float32 results that several calls of the operators led to.
SEVERAL_CALLS = 2e-5

CROSS = Case("cross", (2, 3, 7, 6), ((11, 3, None), (3, 7, None), (2, 3, (1, 0))))
SMALL = Case("small", (2, 3, 4, 5), ((3, 3, None),))
LARGE = Case("large", (2, 3, 7, 6), ((9, 11, (3, 8)),))
# Too many pixels for one product, so that bands are multiplied.
BANDS = Case("bands", (2, 2, 9, 15), ((3, 11, None), (5, 2, None)))
CASES = [
    CROSS,
    SMALL,
    LARGE,
    BANDS,
    Case("tall-and-narrow", (2, 2, 33, 4), ((5, 11, None),)),
    Case("one-row", (2, 3, 1, 6), ((3, 3, None),)),
    Case("few-columns", (2, 3, 4, 3), ((3, 3, None),)),
]

# One of each kernel for sums.
PATHS = pytest.mark.parametrize(
    ("case", "layout"),
    [(LARGE, CONTIGUOUS), (BANDS, CONTIGUOUS), (SMALL, CONTIGUOUS), (SMALL, NHWC)],
    ids=["large", "bands", "small", "small-channels_last"],
)


@pytest.fixture(autouse=True)
def _no_table_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDEKERNEL_TUNED", "0")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(case: Case, dtype: torch.dtype = torch.float32, layout: torch.memory_format = CONTIGUOUS) -> list[Tensor]:
    """x, the kernels and a bias, all trained."""
    x, kernels = draw(case, dtype, layout)
    bias = torch.randn(x.shape[1], dtype=torch.float64).to(x)
    return [t.requires_grad_() for t in (x, *kernels, bias)]


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def ours(case: Case, *inputs: Tensor) -> Tensor:
    return ops.depthwise_sum(inputs[0], inputs[1:-1], case.anchors, inputs[-1], backend="triton")


def theirs(case: Case, *inputs: Tensor) -> Tensor:
    return definition(inputs[0], inputs[1:-1], case.anchors, inputs[-1])


def ours_branched(case: Case, x: Tensor, *kernels: Tensor) -> list[Tensor]:
    return ops.depthwise_branches(x, kernels, case.anchors, backend="triton")


def theirs_branched(case: Case, x: Tensor, *kernels: Tensor) -> list[Tensor]:
    return [definition(x, [kernel], [anchor]) for kernel, anchor in zip(kernels, case.anchors)]


def assert_near(got: Tensor, want: Tensor) -> None:
    error = relative_error(got.cpu(), want.cpu())
    assert error <= SEVERAL_CALLS, f"relative error {error:.3g}"


def ran(trace: call_trace.Trace) -> list[str]:
    """Name the operators that ran, all of them on the kernels under test."""
    assert set(trace.backends()) == {"triton"}
    return sorted(problem.op for _, problem in trace.calls)


# ---- Values and gradients


def check(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    inputs = arguments(case, dtype, layout)
    exact = doubled(inputs)
    with ops.trace() as trace:
        y = ours(case, *inputs)
        grad = torch.randn(y.shape, dtype=torch.float64).to(y)
        got = torch.autograd.grad(y, inputs, grad)
    assert ran(trace) == sorted([SUM, SUM, *[WEIGHT_GRAD] * len(case.rects)])
    truth = theirs(case, *exact)
    assert_exact(y, truth)
    assert y.stride() == inputs[0].stride() or 1 in y.shape
    for mine, want in zip(got, torch.autograd.grad(truth, exact, grad.double())):
        assert mine.dtype == dtype
        assert_exact(mine, want)


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, layout: torch.memory_format) -> None:
    check(case, torch.float32, layout)


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [CROSS, SMALL], ids=str)
def test_values_and_gradients_in_short_types(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    check(case, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_values_and_gradients_of_bands_in_short_types(dtype: torch.dtype) -> None:
    check(BANDS, dtype, CONTIGUOUS)


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [
        *((CROSS, dtype, CONTIGUOUS) for dtype in DTYPES),
        (CROSS, torch.bfloat16, NHWC),
        (BANDS, torch.float32, CONTIGUOUS),
    ],
    ids=str,
)
def test_branches_and_their_gradients(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    inputs = arguments(case, dtype, layout)[:-1]
    exact = doubled(inputs)
    with ops.trace() as trace:
        ys = ours_branched(case, *inputs)
        grads = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in ys]
        got = torch.autograd.grad(ys, inputs, grads)
    assert ran(trace) == sorted([BRANCHES, SUM_OF_BRANCHES, *[WEIGHT_GRAD] * len(case.rects)])
    truths = theirs_branched(case, *exact)
    for mine, want in zip((*ys, *got), (*truths, *torch.autograd.grad(truths, exact, [g.double() for g in grads]))):
        assert_exact(mine, want)
    assert all(y.is_contiguous(memory_format=layout) for y in ys)


def test_small_branches_of_channels_last_images_are_computed_one_by_one() -> None:
    case = Case("small", SMALL.shape, (*SMALL.rects, (1, 2, None)))
    inputs = arguments(case, torch.float32, NHWC)[:-1]
    with ops.trace() as trace:
        ys = ours_branched(case, *inputs)
        sum(y.sin().sum() for y in ys).backward()
    assert ran(trace) == sorted([*[SUM] * 4, *[WEIGHT_GRAD] * 2])
    for y, want in zip(ys, theirs_branched(case, *doubled(inputs))):
        assert_exact(y, want)


def test_more_branches_than_one_launch_takes() -> None:
    case = Case("many", (1, 2, 4, 5), tuple((1 + i % 3, 1 + i % 2, None) for i in range(triton.MOST_RECTS + 1)))
    inputs = arguments(case)[:-1]
    with ops.trace() as trace:
        ys = ours_branched(case, *inputs)
    assert ran(trace) == [SUM] * len(case.rects)
    for y, want in zip(ys, theirs_branched(case, *doubled(inputs))):
        assert_exact(y, want)


BIASES = {
    "strided": lambda bias: torch.stack([bias, bias + 7], 1)[:, 0],
    "expanded": lambda bias: bias[:1].expand_as(bias),
    "negative": torch._neg_view,
}


@pytest.mark.parametrize("stored", BIASES)
@PATHS
def test_a_bias_may_be_stored_in_any_way(case: Case, layout: torch.memory_format, stored: str) -> None:
    x, *kernels, bias = (t.detach() for t in arguments(case, torch.float32, layout))
    bias = BIASES[stored](bias)
    assert_exact(ours(case, x, *kernels, bias), theirs(case, *doubled([x, *kernels, bias])))


def test_inference_mode() -> None:
    with torch.inference_mode():
        inputs = [t.detach() for t in arguments(CROSS)]
        y = ours(CROSS, *inputs)
        assert y.is_inference()
    assert_exact(y, theirs(CROSS, *doubled(inputs)))


# ---- What is not computed, and what does not spread


@PATHS
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_what_is_not_finite_stays_in_its_plane(case: Case, layout: torch.memory_format) -> None:
    value = float("inf") if case is LARGE else float("nan")
    x, *kernels, bias = arguments(case, torch.float32, layout)
    clean = ours(case, x, *kernels, bias)
    spoilt = x.detach().clone()
    spoilt[1, 0, 2, 3] = value
    spoilt.requires_grad_()
    y = ours(case, spoilt, *kernels, bias)
    assert not y[1, 0, 2, 3].isfinite()
    elsewhere = torch.ones(y.shape[:2], dtype=torch.bool, device=DEVICE)
    elsewhere[1, 0] = False
    assert torch.equal(y[elsewhere], clean[elsewhere])
    # In the gradients of kernels, all of which the images of a channel share, it stays in its channel.
    grad = torch.randn_like(clean)
    for mine, want in zip(torch.autograd.grad(y, kernels, grad), torch.autograd.grad(clean, kernels, grad)):
        assert not mine[0].isfinite().all()
        assert torch.equal(mine[1:], want[1:])
    # The gradient of the image is the same operator, of what comes back.
    grad = grad.clone()
    grad[1, 0, 2, 3] = value
    (for_x,) = torch.autograd.grad(ours(case, x, *kernels, bias), x, grad)
    assert for_x[elsewhere].isfinite().all()


@BOTH_LAYOUTS
def test_the_direct_algorithm_is_for_small_kernels(layout: torch.memory_format) -> None:
    x, kernel, _ = (t.detach() for t in arguments(SMALL, torch.float32, layout))
    x[0, 0, 2, 3] = float("inf")
    with ops.trace() as trace:
        y = ops.depthwise_sum(x, [kernel], backend="triton", algorithm="direct")
    assert ran(trace) == [SUM]
    under = torch.zeros(x.shape, dtype=torch.bool, device=DEVICE)
    under[0, 0, 1:4, 2:5] = True
    assert torch.equal(~y.isfinite(), under)
    wide = torch.randn(3, 1, 3, 31, device=DEVICE)
    refused = "triton cannot compute depthwise_sum of .*: its matrix products multiply pixels beside the kernel by zero"
    with pytest.raises(ops.NoBackendError, match=refused):
        ops.depthwise_sum(x, [wide], backend="triton", algorithm="direct")
    with pytest.raises(ops.NoBackendError, match=f"{WEIGHT_GRAD} of .*algorithm 'direct' excludes"):
        ops.depthwise_weight_grad(x, x, (3, 31), backend="triton", algorithm="direct")


@BOTH_LAYOUTS
def test_direct_gradients_of_small_kernels(layout: torch.memory_format) -> None:
    """One infinite pixel in a corner reaches the taps that see it, the others are right."""
    x, kernel, _ = (t.detach() for t in arguments(SMALL, torch.float32, layout))
    grad = torch.randn_like(x)
    x[0, 0, 0, 0] = float("inf")
    kernel.requires_grad_()
    with ops.trace() as trace:
        y = ops.depthwise_sum(x, [kernel], backend="triton", algorithm="direct")
        (got,) = torch.autograd.grad(y, [kernel], grad)
    assert ran(trace) == [SUM, WEIGHT_GRAD]
    of = x.double().cpu(), grad.double().cpu(), tuple(kernel.shape[2:]), (kernel.shape[2] // 2, kernel.shape[3] // 2)
    want = reference.depthwise_weight_grad(*of)
    finite = want.isfinite()
    assert 0 < (~finite).sum() < finite[0].numel()
    assert torch.equal(got.cpu().isfinite(), finite)
    assert_exact(got.cpu()[finite], want[finite])


# ---- Layouts


def strides(case: Case, x: Tensor, kernels: list[Tensor]) -> list[tuple]:
    """Those of what every operator returns."""
    y = ops.depthwise_sum(x, kernels, case.anchors, backend="triton")
    w = ops.depthwise_weight_grad(x, x, kernels[0].shape[2:], case.anchors[0], backend="triton")
    ys = OPERATORS.depthwise_branches(x, kernels, flat(case.anchors), "triton", "")
    total = OPERATORS.depthwise_sum_of_branches([x] * len(kernels), kernels, flat(case.anchors), "triton", "")
    return [(t.shape, t.dtype, t.stride()) for t in (y, w, *ys, total)]


def check_strides(case: Case, x: Tensor, kernels: list[Tensor]) -> None:
    mode = FakeTensorMode()
    fake = [mode.from_tensor(t) for t in (x, *kernels)]
    with mode:
        promised = strides(case, fake[0], fake[1:])
    assert strides(case, x, kernels) == promised


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", [CROSS, SMALL, *map(several, EMPTY)], ids=str)
def test_strides_are_those_promised(case: Case, layout: torch.memory_format) -> None:
    check_strides(case, *draw(case, torch.float32, layout))


@pytest.mark.parametrize("kernel", [(3, 3), (2, 11), (11, 2)], ids=["3x3", "2x11", "11x2"])
@pytest.mark.parametrize("stored", AMBIGUOUS)
def test_strides_where_dimensions_are_one(stored: str, kernel: tuple[int, int]) -> None:
    of = AMBIGUOUS[stored]
    x = torch.empty_strided(of.shape, of.stride(), device=DEVICE).copy_(of)
    case = Case(stored, tuple(x.shape), ((*kernel, (0, kernel[1] - 1)), (2, 2, None)))
    _, kernels = draw(case, torch.float32)
    check_strides(case, x, kernels)
    assert_exact(
        ops.depthwise_sum(x, kernels, case.anchors, backend="triton"), definition(*map(_doubles, (x, kernels)), case.anchors)
    )


def _doubles(tensors: Any) -> Any:
    return tensors.double() if isinstance(tensors, Tensor) else [t.double() for t in tensors]


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_nothing_to_compute(case: Case, layout: torch.memory_format) -> None:
    inputs = arguments(case, torch.float32, layout)
    y = ours(case, *inputs)
    got = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert [g.shape for g in got] == [t.shape for t in inputs]
    assert not any(g.count_nonzero() for g in got)


@pytest.mark.parametrize(("case", "layout"), [(LARGE, CONTIGUOUS), (SMALL, NHWC)], ids=str)
def test_two_steps_are_equal_to_the_last_bit(case: Case, layout: torch.memory_format) -> None:
    inputs = arguments(case, torch.float32, layout)
    steps = []
    for _ in range(2):
        y = ours(case, *inputs)
        steps.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    assert all(map(torch.equal, *steps))


# ---- Transforms of functions, and derivatives of derivatives


@dataclass(frozen=True)
class Form:
    """One of the two operators, ours and by its definition, as a function from (x, kernels...) to one tensor."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]

    def __str__(self) -> str:
        return self.name

    def inputs(self) -> list[Tensor]:
        inputs = arguments(CROSS)
        return inputs if self.name == "sum" else inputs[:-1]


def mixed(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Make one tensor of what an operator gives, in which every branch plays a part of its own."""

    def run(*inputs: Tensor) -> Tensor:
        y = function(CROSS, *inputs)
        return y.sin() if isinstance(y, Tensor) else y[0].sin() + y[1].cos() * y[2]

    return run


FORMS = [
    Form("sum", mixed(ours), mixed(theirs)),
    Form("branches", mixed(ours_branched), mixed(theirs_branched)),
]
BOTH_FORMS = pytest.mark.parametrize("form", FORMS, ids=str)


def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A number whose second derivatives do not vanish."""

    def run(*inputs: Tensor) -> Tensor:
        y = function(*inputs)
        return (y.sin() * torch.linspace(1, 2, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)).sum()

    return run


@BOTH_FORMS
def test_function_gradients(form: Form) -> None:
    inputs = [t.detach() for t in form.inputs()]
    everything = tuple(range(len(inputs)))
    with ops.trace() as trace:
        got = torch.func.grad(loss(form.ours), everything)(*inputs)
    first = [BRANCHES, SUM_OF_BRANCHES] if form.name == "branches" else [SUM, SUM]
    assert ran(trace) == sorted([*first, *[WEIGHT_GRAD] * 3])
    for mine, want in zip(got, torch.func.grad(loss(form.theirs), everything)(*doubled(inputs))):
        assert_near(mine, want.detach())


@BOTH_FORMS
@pytest.mark.parametrize("mapped", [(1, 3), None], ids=["kernels", "everything"])
def test_per_sample_gradients(mapped: tuple[int, ...] | None, form: Form) -> None:
    inputs = [t.detach() for t in form.inputs()]
    everything = tuple(range(len(inputs)))
    dims = tuple(0 if mapped is None or i in mapped else None for i in everything)
    many = [torch.stack([t, t + 0.5]) if dim == 0 else t for t, dim in zip(inputs, dims)]
    with ops.trace() as trace:
        got = torch.func.vmap(torch.func.grad(loss(form.ours), everything), dims)(*many)
    assert WEIGHT_GRAD in ran(trace)
    for i in range(2):
        one = doubled([t[i] if dim == 0 else t for t, dim in zip(many, dims)])
        for mine, want in zip(got, torch.func.grad(loss(form.theirs), everything)(*one)):
            assert_near(mine[i], want.detach())


@BOTH_FORMS
def test_second_derivatives(form: Form) -> None:
    def twice(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(function)(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    inputs = form.inputs()
    with ops.trace() as trace:
        got = twice(form.ours, inputs)
    operators = set(ran(trace))
    assert operators >= ({SUM, WEIGHT_GRAD} if form.name == "sum" else {BRANCHES, SUM_OF_BRANCHES, WEIGHT_GRAD})
    for mine, want in zip(got, twice(form.theirs, doubled(inputs))):
        assert_near(mine, want)


@BOTH_FORMS
def test_batched_gradients(form: Form) -> None:
    inputs = form.inputs()
    many = torch.randn(3, *CROSS.shape, dtype=torch.float64).to(inputs[0])
    with ops.trace() as trace:
        got = torch.autograd.grad(form.ours(*inputs), inputs, many, is_grads_batched=True)
    assert WEIGHT_GRAD in ran(trace)
    exact = doubled(inputs)
    y = form.theirs(*exact)
    for i, one in enumerate(many.double()):
        for mine, want in zip(got, torch.autograd.grad(y, exact, one, retain_graph=True)):
            assert_near(mine[i], want)


# ---- Compilation, export, autocast


@pytest.mark.parametrize(("form", "layout"), [(FORMS[0], CONTIGUOUS), (FORMS[1], NHWC)], ids=str)
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled(form: Form, layout: torch.memory_format) -> None:
    inputs = form.inputs()
    inputs[0] = inputs[0].detach().contiguous(memory_format=layout).requires_grad_()
    with ops.trace() as trace:
        y = torch.compile(form.ours, fullgraph=True, backend="aot_eager")(*inputs)
        got = torch.autograd.grad(y.sum(), inputs)
    assert WEIGHT_GRAD in ran(trace)
    assert y.is_contiguous(memory_format=layout)
    exact = doubled(inputs)
    truth = form.theirs(*exact)
    assert_near(y, truth)
    for mine, want in zip(got, torch.autograd.grad(truth.sum(), exact)):
        assert_near(mine, want)


class Layer(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form.ours
        self.parts = nn.ParameterList(t.detach() for t in form.inputs()[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, *self.parts)


@BOTH_FORMS
def test_export_with_a_dynamic_batch(form: Form) -> None:
    layer, batch = Layer(form).eval(), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(CROSS.shape, device=DEVICE),), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        x = torch.randn(size, *CROSS.shape[1:], device=DEVICE)
        with ops.trace() as trace:
            y = program.module()(x)
        assert ran(trace) == [SUM if form.name == "sum" else BRANCHES]
        assert_near(y, form.theirs(*doubled([x, *layer.parts])).detach())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    inputs = arguments(CROSS)
    with ops.trace() as trace:
        with torch.autocast(DEVICE, dtype):
            y = ours(CROSS, *inputs)
        y.float().sum().backward()
    assert y.dtype == dtype
    ran(trace)
    assert {problem.dtype for _, problem in trace.calls} == {dtype}
    rounded = doubled([t.to(dtype) for t in inputs])
    truth = theirs(CROSS, *rounded)
    assert_exact(y, truth)
    for mine, want in zip(inputs, torch.autograd.grad(truth.sum(), rounded)):
        assert mine.grad.dtype == torch.float32
        assert_exact(mine.grad.to(dtype), want)


def test_autocast_that_is_on_only_backward_converts_nothing() -> None:
    inputs = arguments(CROSS)
    y = ours(CROSS, *inputs)
    want = torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("case", [LARGE, SMALL], ids=str)
def test_what_pytorch_checks_of_operators(case: Case) -> None:
    x, *kernels, bias = (t.detach() for t in arguments(case))
    torch.library.opcheck(OPERATORS.depthwise_sum.default, (x, kernels, flat(case.anchors), bias, bias, True, "triton", ""))
    geometry = [*kernels[0].shape[2:], *case.anchors[0]]
    torch.library.opcheck(OPERATORS.depthwise_weight_grad.default, (x, x.cos(), geometry, "triton", ""))


# ---- A layer


class Preferred(ops.Backend):
    """The Triton backend under another name, in front of all the others, on whatever device it can run."""

    name = "preferred"
    operators, calls_pytorch = TRITON.operators, TRITON.calls_pytorch

    def reasons_against(self, problem: Problem) -> list[str]:
        return [] if TRITON.can_run(problem) else TRITON.reasons_against(problem)

    def prepare(self, problem: Problem) -> Any:
        return TRITON.prepare(problem)


@BOTH_LAYOUTS
def test_a_layer_trained_for_a_step(layout: torch.memory_format) -> None:
    def step(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(4)
        source = Rectangles(3, [(13, 3), (3, 13), (3, 3)])
        layer = LargeKernel(source, [nn.BatchNorm2d(3) for _ in range(3)], identity=True).to(DEVICE, dtype)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        x = torch.randn(2, 3, 7, 6, dtype=torch.float64).to(DEVICE, dtype).contiguous(memory_format=layout).requires_grad_()
        y = layer(x)
        y.sin().square().sum().backward()
        optimizer.step()
        assert memory_format(y) == layout
        return [y.detach(), x.grad, *(p.detach() for p in layer.parameters())]

    want = step(torch.float64)
    with registered(Preferred()), ops.trace() as trace:
        got = step(torch.float32)
    calls = sorted((name, problem.op) for name, problem in trace.calls)
    fused = sorted(("preferred", op) for op in [BRANCHES, SUM_OF_BRANCHES, *[WEIGHT_GRAD] * 3])
    # The input gradient of three branches is the sum of branches; each kernel has a gradient of its own.
    assert calls == fused
    for mine, truth in zip(got, want):
        assert_near(mine, truth)
