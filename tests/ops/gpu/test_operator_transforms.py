"""The operators on the GPU kernels: function transforms, higher derivatives, compilation, export and autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES
from tests.ops.cases import Case
from tests.ops.gpu.helpers import DEVICE, DTYPES, assert_exact
from tests.ops.gpu.operator_cases import (
    BOTH_FORMS,
    CONTIGUOUS,
    CROSS,
    FORMS,
    LARGE,
    NHWC,
    OPERATORS,
    SMALL,
    SUM,
    WEIGHT_GRAD,
    Form,
    arguments,
    assert_near,
    doubled,
    loss,
    ours,
    ran,
    theirs,
)
from tests.ops.test_registration import flat
from widekernel import ops

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("no_tuned_table")]


# ---- Function transforms and higher derivatives


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
@pytest.mark.usefixtures("fresh_compiler")
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


def test_autocast_only_in_the_backward_pass_converts_nothing() -> None:
    inputs = arguments(CROSS)
    y = ours(CROSS, *inputs)
    want = torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("case", [LARGE, SMALL], ids=str)
def test_opcheck(case: Case) -> None:
    x, *kernels, bias = (t.detach() for t in arguments(case))
    torch.library.opcheck(OPERATORS.depthwise_sum.default, (x, kernels, flat(case.anchors), bias, bias, True, "triton", ""))
    geometry = [*kernels[0].shape[2:], *case.anchors[0]]
    torch.library.opcheck(OPERATORS.depthwise_weight_grad.default, (x, x.cos(), geometry, "triton", ""))
