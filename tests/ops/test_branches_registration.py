"""Branches under compilation, export, autocast, fake tensors and PyTorch's own checks of registered operators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.native import NATIVE
from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES, Fused, registered, several
from tests.ops.cases import CASES, DILATED, EMPTY, LAYOUTS, Case, assert_close, definition
from tests.ops.test_registration import AMBIGUOUS, CHECKED
from widekernel import ops
from widekernel.layers import LargeKernel, Rectangles
from widekernel.ops import registration

BRANCHES_OP = torch.ops.widekernel.depthwise_branches.default
SUM_OF_BRANCHES_OP = torch.ops.widekernel.depthwise_sum_of_branches.default
CROSS = next(case for case in CASES if case.name == "crossed-strips")
BACKENDS = pytest.mark.parametrize("backend", [NATIVE, "portable", "reference", "fused"])
BOTH_LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
CHOSEN = pytest.mark.parametrize("chosen", ["portable", "fused"])


@pytest.fixture(autouse=True)
def _fused(request: pytest.FixtureRequest) -> Iterator[None]:
    """Register a fused backend: in front for tests of the selection, otherwise for tests that request it."""
    first = request.node.callspec.params.get("chosen") == "fused" if hasattr(request.node, "callspec") else False
    with registered(Fused(), None if first else "reference"):
        yield


def strides(case: Case, x: Tensor, kernels: list[Tensor], backend: str) -> list[tuple]:
    """Return the strides of the branches, and those of their sum."""
    flat = registration.flatten_anchors(case.anchors)
    options = backend, "", list(case.dilations or ())
    ys = BRANCHES_OP(x, kernels, flat, *options)
    total = SUM_OF_BRANCHES_OP([x] * len(kernels), kernels, flat, *options)
    return [(y.shape, y.dtype, y.stride()) for y in (*ys, total)]


def check_strides(case: Case, x: Tensor, kernels: list[Tensor], backend: str) -> None:
    mode = FakeTensorMode()
    fake = [mode.from_tensor(t) for t in (x, *kernels)]
    with mode:
        promised = strides(case, fake[0], fake[1:], backend)
    assert strides(case, x, kernels, backend) == promised
    ys = ops.depthwise_branches(x, kernels, case.anchors, backend=backend, dilations=case.dilations)
    assert [(y.shape, y.dtype, y.stride()) for y in ys] == promised[:-1]


@BACKENDS
@pytest.mark.parametrize("case", [several(case) for case in CASES + DILATED + EMPTY], ids=str)
def test_strides_are_those_of_the_fake_implementation(case: Case, backend: str) -> None:
    x, kernels, _ = case.tensors(torch.float32)
    for in_layout in LAYOUTS.values():
        check_strides(case, in_layout(x), kernels, backend)


@BACKENDS
@pytest.mark.parametrize("stored", AMBIGUOUS)
def test_strides_where_dimensions_are_one(stored: str, backend: str) -> None:
    x = AMBIGUOUS[stored]
    case = several(Case(stored, tuple(x.shape), ((2, 11, (0, 10)),)))
    check_strides(case, x, case.tensors(torch.float32)[1], backend)


def test_meta_tensors() -> None:
    x, kernels = torch.empty(2, 3, 8, 8, device="meta"), [torch.empty(3, 1, 5, size, device="meta") for size in (1, 5)]
    assert [y.shape for y in ops.depthwise_branches(x, kernels)] == [x.shape] * 2
    assert [y.shape for y in BRANCHES_OP(x, kernels, [2, 0, 2, 2], "", "")] == [x.shape] * 2
    assert SUM_OF_BRANCHES_OP([x, x], kernels, [2, 0, 2, 2], "", "").shape == x.shape


@BACKENDS
@pytest.mark.parametrize(("name", "layout"), CHECKED)
def test_opcheck(name: str, layout: str, backend: str) -> None:
    case = several(next(case for case in CASES if case.name == name))
    x, kernels, _ = case.tensors(torch.float32)
    x, flat = LAYOUTS[layout](x), registration.flatten_anchors(case.anchors)
    torch.library.opcheck(BRANCHES_OP, (x, kernels, flat, backend, ""))
    xs = [LAYOUTS[layout](torch.randn_like(x)) for _ in kernels]
    torch.library.opcheck(SUM_OF_BRANCHES_OP, (xs, kernels, flat, backend, ""))


def test_the_operators_and_their_vmap_without_a_fused_backend() -> None:
    """If no backend is fused, only a compiler calls them."""
    x, kernels, _ = CROSS.tensors()
    flat = registration.flatten_anchors(CROSS.anchors)
    xs = [torch.randn_like(x) for _ in kernels]
    ys = BRANCHES_OP(x, kernels, flat, "", "")
    for y, kernel, anchor in zip(ys, kernels, CROSS.anchors):
        assert_close(y, definition(x, [kernel], [anchor]))
    total = sum(definition(x, [kernel], [anchor]) for x, kernel, anchor in zip(xs, kernels, CROSS.anchors))
    assert_close(SUM_OF_BRANCHES_OP(xs, kernels, flat, "", ""), total)
    several_x = torch.stack([x, x + 1])
    mapped = torch.vmap(lambda x: BRANCHES_OP(x, kernels, flat, "", ""))(several_x)
    assert all(torch.equal(m[0], y) for m, y in zip(mapped, ys))
    mapped = torch.vmap(lambda kernel: BRANCHES_OP(x, [kernel, *kernels[1:]], flat, "", ""))(torch.stack([kernels[0]] * 2))
    for m, y in zip(mapped, ys):
        assert_close(m[1], y)
    summed = torch.vmap(lambda x, k: SUM_OF_BRANCHES_OP([x, *xs[1:]], [*kernels[:2], k], flat, "", ""), (1, None), 1)
    assert_close(summed(torch.stack([xs[0]] * 2, 1), kernels[2])[:, 1], total)
    summed = torch.vmap(lambda x, k: SUM_OF_BRANCHES_OP([x, *xs[1:]], [*kernels[:2], k], flat, "", ""), (None, 0))
    assert_close(summed(xs[0], torch.stack([kernels[2]] * 2))[1], total)


def function(x: Tensor, kernels: list[Tensor]) -> Tensor:
    a, b, c = ops.depthwise_branches(x, kernels, CROSS.anchors)
    return a.sin() + b.cos() * c


def truth_of(x: Tensor, kernels: list[Tensor]) -> Tensor:
    a, b, c = (definition(x, [kernel], [anchor]) for kernel, anchor in zip(kernels, CROSS.anchors))
    return a.sin() + b.cos() * c


@CHOSEN
@pytest.mark.parametrize(
    ("dynamic", "layout"),
    [
        pytest.param(True, "contiguous", id="dynamic"),
        pytest.param(False, "channels_last", id="static-channels_last"),
        pytest.param(True, "channels_last", marks=pytest.mark.slow, id="dynamic-channels_last"),
        pytest.param(False, "contiguous", marks=pytest.mark.slow, id="static"),
    ],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_forward_and_backward(dynamic: bool, layout: str, chosen: str) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    each = [BRANCHES, SUM_OF_BRANCHES] if chosen == "fused" else ["depthwise_sum"] * 6
    for shape in [CROSS.shape, (3, 3, 11, 6)]:
        x, kernels, _ = Case("", shape, CROSS.rects).tensors()
        x = LAYOUTS[layout](x)
        inputs = [t.requires_grad_() for t in (x, *kernels)]
        with torch._dynamo.config.patch(error_on_recompile=dynamic and shape != CROSS.shape), ops.trace() as trace:
            y = compiled(x, kernels)
            got = torch.autograd.grad(y.sum(), inputs)
        assert sorted(p.op for _, p in trace.calls) == sorted([*each, *["depthwise_weight_grad"] * 3])
        assert set(trace.backends()) == {chosen}
        truth = truth_of(x, kernels)
        assert_close(y, truth)
        for mine, want in zip(got, torch.autograd.grad(truth.sum(), inputs)):
            assert_close(mine, want)


@CHOSEN
@pytest.mark.parametrize("wanted", [(0,), (1, 3), (2,), ()], ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_frozen_parts(wanted: tuple[int, ...], chosen: str) -> None:
    x, kernels, _ = CROSS.tensors()
    inputs = [t.requires_grad_() for i, t in enumerate((x, *kernels)) if i in wanted]
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(x, kernels)
    truth = truth_of(x, kernels)
    assert_close(y, truth)
    if wanted:
        for mine, want in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(truth.sum(), inputs)):
            assert_close(mine, want)


@CHOSEN
@pytest.mark.parametrize("used", [(0, 2), (1,)], ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_outputs_that_are_not_used(used: tuple[int, ...], chosen: str) -> None:
    x, kernels, _ = CROSS.tensors()
    inputs = [t.requires_grad_() for t in (x, *kernels)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def some(x: Tensor) -> Tensor:
        ys = ops.depthwise_branches(x, kernels, CROSS.anchors)
        return sum(ys[b].sin().sum() for b in used)

    got = torch.autograd.grad(some(x), inputs, allow_unused=True, materialize_grads=True)
    parts = [definition(x, [kernels[b]], [CROSS.anchors[b]]).sin().sum() for b in used]
    for mine, want in zip(got, torch.autograd.grad(sum(parts), inputs, allow_unused=True, materialize_grads=True)):
        assert_close(mine, want)


@CHOSEN
@pytest.mark.skipif(torch.__version__ < (2, 15), reason="the compiler of this version cannot trace function gradients")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_function_gradients(chosen: str) -> None:
    x, kernels, _ = CROSS.tensors()

    def gradients(x: Tensor, kernels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return torch.func.grad(lambda x, kernels: function(x, kernels).sum(), (0, 1))(x, kernels)

    for_x, for_kernels = torch.compile(gradients, fullgraph=True, backend="aot_eager")(x, kernels)
    leaves = [t.clone().requires_grad_() for t in (x, *kernels)]
    for mine, want in zip((for_x, *for_kernels), torch.autograd.grad(truth_of(leaves[0], leaves[1:]).sum(), leaves)):
        assert_close(mine, want)


@CHOSEN
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_vmap(chosen: str) -> None:
    x, kernels, _ = CROSS.tensors()
    images = torch.stack([x, x + 1])
    mapped = torch.compile(torch.func.vmap(function, (0, None)), fullgraph=True, backend="aot_eager")(images, kernels)
    for got, one in zip(mapped, images):
        assert_close(got, truth_of(one, kernels))


@CHOSEN
@BOTH_LAYOUTS
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_layer_in_training(layout: str, chosen: str) -> None:
    layer = LargeKernel(Rectangles(3, [(13, 3), (3, 13), (3, 3)]), [nn.BatchNorm2d(3) for _ in range(3)], True).double()
    x = LAYOUTS[layout](torch.randn(2, 3, 9, 8, dtype=torch.float64)).requires_grad_()
    inputs = [x, *layer.parameters()]
    want = torch.autograd.grad(layer(x).sin().sum(), inputs)
    with ops.trace() as trace:
        got = torch.autograd.grad(torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sin().sum(), inputs)
    assert len([p for _, p in trace.calls if p.op == BRANCHES]) == (chosen == "fused")
    for mine, truth in zip(got, want):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(CROSS.tensors()[1])

    def forward(self, x: Tensor) -> list[Tensor]:
        return ops.depthwise_branches(x, list(self.kernels), CROSS.anchors)


@CHOSEN
@BOTH_LAYOUTS
@pytest.mark.parametrize("frozen", [False, True], ids=["parameters", "frozen"])
def test_export_with_dynamic_shapes(frozen: bool, layout: str, chosen: str) -> None:
    module = Cross().eval().requires_grad_(not frozen)
    batch, height = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("height", min=2, max=64)
    x = LAYOUTS[layout](torch.randn(2, 3, 9, 8, dtype=torch.float64))
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch, 2: height},))
    calls = [node.target for node in program.graph.nodes if "widekernel" in str(node.target)]
    assert calls == [BRANCHES_OP]
    for size in [(1, 9), (2, 3), (5, 30)]:
        x = LAYOUTS[layout](torch.randn(size[0], 3, size[1], 8, dtype=torch.float64))
        with ops.trace() as trace:
            ys = program.module()(x)
        assert trace.backends() == [chosen] * (1 if chosen == "fused" else 3)
        for y, kernel, anchor in zip(ys, module.kernels, CROSS.anchors):
            assert_close(y, definition(x, [kernel], [anchor]))


# ---- Autocast


@CHOSEN
def test_autocast_computes_in_bfloat16_and_differentiates_in_float32(chosen: str) -> None:
    x, kernels, _ = CROSS.tensors(torch.float32)
    inputs = [t.requires_grad_() for t in (x, *kernels)]
    with ops.trace() as trace:
        with torch.autocast("cpu", torch.bfloat16):
            ys = ops.depthwise_branches(x, kernels, CROSS.anchors, backend=chosen)
        sum(y.float().sum() for y in ys).backward()
    assert {y.dtype for y in ys} == {torch.bfloat16}
    assert {problem.dtype for _, problem in trace.calls} == {torch.bfloat16}
    assert len([p for _, p in trace.calls if p.op == BRANCHES]) == (chosen == "fused")
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in inputs]
    truths = [definition(rounded[0], [k], [a]) for k, a in zip(rounded[1:], CROSS.anchors)]
    for tensor, want in zip(inputs, torch.autograd.grad(sum(truth.sum() for truth in truths), rounded)):
        assert tensor.grad.dtype == torch.float32
        # Sums of terms in bfloat16 may be off by one more rounding each.
        assert_close(tensor.grad.bfloat16(), want, 3 * 1.6e-2)


@CHOSEN
def test_autocast_mixes_types_and_leaves_float64_alone(chosen: str) -> None:
    x, kernels, _ = CROSS.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.depthwise_branches(x.bfloat16(), kernels, CROSS.anchors)
        assert all(map(torch.equal, got, ops.depthwise_branches(x, kernels, CROSS.anchors)))
        double = ops.depthwise_branches(x.double(), [kernel.double() for kernel in kernels], CROSS.anchors)
        assert {y.dtype for y in double} == {torch.float64}
        with torch.autocast("cpu", enabled=False):
            assert ops.depthwise_branches(x, kernels, CROSS.anchors)[0].dtype == torch.float32


@CHOSEN
@pytest.mark.parametrize("twice", [False, True], ids=["first", "second"])
def test_backward_under_autocast_of_a_forward_without_it(twice: bool, chosen: str) -> None:
    """Autocast converts nothing if it was off when the arguments were made."""

    def gradients(autocast: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        x, kernels, _ = CROSS.tensors(torch.float32)
        inputs = [t.requires_grad_() for t in (x, *kernels)]
        ys = ops.depthwise_branches(x, kernels, CROSS.anchors)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if not twice:
                return torch.autograd.grad(ys, inputs, [torch.ones_like(y).cumsum(-1) for y in ys])
            first = torch.autograd.grad(sum(y.square().sum() for y in ys), inputs, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for got, want in zip(gradients(True), gradients(False)):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_under_autocast() -> None:
    x, kernels, _ = CROSS.tensors(torch.float32)
    kernels = [k.requires_grad_() for k in kernels]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(x, kernels)

    y = step(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {k.grad.dtype for k in kernels} == {torch.float32}


@CHOSEN
def test_traced_with_symbolic_shapes(chosen: str) -> None:
    x, kernels, _ = CROSS.tensors()
    traced = make_fx(function, tracing_mode="symbolic")(x, kernels)
    assert [node.target for node in traced.graph.nodes if "widekernel" in str(node.target)] == [BRANCHES_OP]
    larger, others, _ = Case("", (3, 3, 11, 6), CROSS.rects).tensors()
    assert_close(traced(larger, others), truth_of(larger, others))
