"""Branches: values and gradients in every form of the call, and what is not computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.native import NATIVE
from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES, Fused, Kernels, registered, several
from tests.ops.cases import CASES, DILATED, EMPTY, LAYOUTS, Case, assert_close, definition
from widekernel import ops
from widekernel.errors import ArgumentError

MANY = [several(case) for case in CASES + DILATED]
CROSS = next(case for case in CASES if case.name == "crossed-strips")
SUM, WEIGHT_GRAD = "depthwise_sum", "depthwise_weight_grad"


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    """Register two more backends, which run only if they are requested."""
    with registered(Fused(), "reference"), registered(Kernels("kernels"), "reference"):
        yield


def is_fused(backend: str) -> bool:
    return backend in ("fused", "kernels")


def outputs_and_gradients(case: Case, tensors: tuple, grads: list[Tensor], backend: str | None) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in (tensors[0], *tensors[1])]
    ys = ops.depthwise_branches(inputs[0], inputs[1:], case.anchors, backend=backend, dilations=case.dilations)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, inputs, grads)]


def exact(case: Case, tensors: tuple, grads: list[Tensor]) -> list[Tensor]:
    inputs = [t.detach().double().requires_grad_() for t in (tensors[0], *tensors[1])]
    rects = zip(inputs[1:], case.anchors, case.dilations or (1,) * len(case.rects))
    ys = [definition(inputs[0], [kernel], [anchor], None, [step]) for kernel, anchor, step in rects]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, inputs, [grad.double() for grad in grads])]


def check(case: Case, dtype: torch.dtype, layout: str, backend: str) -> None:
    x, kernels, _ = case.tensors(dtype)
    x = LAYOUTS[layout](x)
    grads = [torch.randn(case.shape, dtype=torch.float64).to(dtype) for _ in kernels]
    with ops.trace() as trace:
        got = outputs_and_gradients(case, (x, kernels), grads, backend)
    assert set(trace.backends()) == {backend}
    forward = [BRANCHES, SUM_OF_BRANCHES] if is_fused(backend) else [SUM] * (2 * len(kernels))
    found = [problem.op for _, problem in trace.calls]
    assert sorted(found) == sorted([*forward, *[WEIGHT_GRAD] * len(kernels)])
    for mine, truth in zip(got, exact(case, (x, kernels), grads)):
        assert mine.dtype == dtype
        assert_close(mine, truth)


@pytest.mark.parametrize("backend", ["portable", "fused", "kernels"])
@pytest.mark.parametrize("case", MANY, ids=str)
def test_values_in_float64(case: Case, backend: str) -> None:
    for layout in LAYOUTS:
        check(case, torch.float64, layout, backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [NATIVE, "portable"])
@pytest.mark.parametrize("case", MANY, ids=str)
def test_values_in_lower_precision(case: Case, backend: str, dtype: torch.dtype, layout: str) -> None:
    x, kernels, _ = case.tensors(dtype)
    x = LAYOUTS[layout](x)
    grads = [torch.randn(case.shape, dtype=torch.float64).to(dtype) for _ in kernels]
    got = outputs_and_gradients(case, (x, kernels), grads, backend)
    truths = exact(case, (x, kernels), grads)
    # The input gradient is a sum of rounded terms.
    for_x, want = got.pop(len(kernels)), truths.pop(len(kernels))
    assert_close(for_x, want, (1 + len(kernels)) * {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}[dtype])
    for mine, truth in zip(got, truths):
        assert_close(mine, truth)


@pytest.mark.parametrize("backend", ["portable", "reference", "fused"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [several(case) for case in EMPTY], ids=str)
def test_nothing_to_compute(case: Case, layout: str, backend: str) -> None:
    x, kernels, _ = case.tensors()
    x = LAYOUTS[layout](x)
    count = len(kernels)
    got = outputs_and_gradients(case, (x, kernels), [torch.ones_like(x)] * count, backend)
    assert [g.shape for g in got] == [x.shape] * (count + 1) + [kernel.shape for kernel in kernels]
    assert not any(g.count_nonzero() for g in got)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_branches_one_by_one_equal_separate_calls_bit_for_bit(dtype: torch.dtype, layout: str) -> None:
    """This is also true if the input has other users, which add to its gradient."""

    def step(together: bool) -> tuple[list[Tensor], list[str]]:
        torch.manual_seed(1)
        x, kernels, _ = CROSS.tensors(dtype)
        inputs = [t.requires_grad_() for t in (LAYOUTS[layout](x).detach(), *kernels)]
        with ops.trace() as trace:
            if together:
                ys = ops.depthwise_branches(inputs[0], inputs[1:], CROSS.anchors, backend="portable")
            else:
                rects = zip(inputs[1:], CROSS.anchors)
                ys = [ops.depthwise_sum(inputs[0], [k], [a], backend="portable") for k, a in rects]
            y = inputs[0].sin()
            for one in ys:
                y = y + one.sin()
            return [y, *torch.autograd.grad((y + inputs[0]).sum(), inputs)], trace.calls

    (got, calls), (want, before) = step(True), step(False)
    assert calls == before
    assert all(map(torch.equal, got, want))


def test_a_single_branch_is_a_sum(fused_first: Fused) -> None:
    x, kernels, _ = CROSS.tensors()
    with ops.trace() as trace:
        (y,) = ops.depthwise_branches(x.requires_grad_(), kernels[:1])
        y.sum().backward()
    assert [problem.op for _, problem in trace.calls] == [SUM] * 2
    assert fused_first.received == []
    assert torch.equal(y, ops.depthwise_sum(x, kernels[:1]))


@pytest.fixture
def fused_first() -> Iterator[Fused]:
    with registered(Fused("first")) as backend:
        yield backend


def test_the_fused_operators_get_the_arguments(fused_first: Fused) -> None:
    x, kernels, _ = CROSS.tensors()
    anchors = [(0, 0), (2, 12), (1, 1)]
    inputs = [t.requires_grad_() for t in (x, *kernels)]
    with ops.trace() as trace:
        ys = ops.depthwise_branches(x, kernels, anchors)
        grads = [torch.randn_like(y) for y in ys]
        torch.autograd.grad(ys, inputs, grads)
    assert [(backend, problem.op) for backend, problem in trace.calls] == [
        ("first", BRANCHES),
        ("first", SUM_OF_BRANCHES),
        *[("first", WEIGHT_GRAD)] * 3,
    ]
    mirrored = [(12, 2), (0, 0), (1, 1)]
    assert trace.calls[0][1].anchors == tuple(anchors)
    assert trace.calls[1][1].anchors == tuple(mirrored)
    assert {problem.kernels for _, problem in trace.calls[:2]} == {((13, 3), (3, 13), (3, 3))}
    forward, backward = fused_first.received
    assert (forward[0], list(forward[3])) == (BRANCHES, anchors)
    assert (backward[0], list(backward[3])) == (SUM_OF_BRANCHES, mirrored)
    assert torch.equal(forward[1], x)
    assert all(map(torch.equal, forward[2], kernels))
    assert all(map(torch.equal, backward[1], grads))
    assert all(torch.equal(k, kernel.flip(-1, -2)) for k, kernel in zip(backward[2], kernels))


@pytest.mark.parametrize("used", [(0, 1), (0, 2), (1,), (2,)], ids=str)
@pytest.mark.parametrize("backend", ["portable", "fused"])
def test_nothing_is_computed_for_outputs_that_are_not_used(backend: str, used: tuple[int, ...]) -> None:
    x, kernels, _ = CROSS.tensors()
    inputs = [t.requires_grad_() for t in (x, *kernels)]
    ys = ops.depthwise_branches(x, kernels, CROSS.anchors, backend=backend)
    with ops.trace() as trace:
        got = torch.autograd.grad(sum(ys[b].sin().sum() for b in used), inputs, allow_unused=True)
    for_x = [SUM_OF_BRANCHES] if is_fused(backend) and len(used) > 1 else [SUM] * len(used)
    assert sorted(problem.op for _, problem in trace.calls) == sorted([*for_x, *[WEIGHT_GRAD] * len(used)])
    parts = [definition(x, [kernels[b]], [CROSS.anchors[b]]).sin().sum() for b in used]
    for mine, want in zip(got, torch.autograd.grad(sum(parts), inputs, allow_unused=True)):
        assert (mine is None) == (want is None)
        if want is not None:
            assert_close(mine, want)


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, True), (False, False, False)], ids=str)
@pytest.mark.parametrize("data", [False, True], ids=["features", "data"])
@pytest.mark.parametrize("backend", ["portable", "fused"])
def test_only_the_gradients_asked_for_are_computed(backend: str, data: bool, trained: tuple[bool, ...]) -> None:
    x, kernels, _ = CROSS.tensors()
    inputs = [t for t, wanted in zip((x, *kernels), (not data, *trained)) if wanted]
    for tensor in inputs:
        tensor.requires_grad_()
    ys = ops.depthwise_branches(x, kernels, CROSS.anchors, backend=backend)
    if not inputs:
        assert not any(y.requires_grad for y in ys)
        return
    with ops.trace() as trace:
        torch.autograd.grad(sum(y.sum() for y in ys), inputs)
    for_x = [] if data else [SUM_OF_BRANCHES] if is_fused(backend) else [SUM] * 3
    assert sorted(problem.op for _, problem in trace.calls) == sorted([*for_x, *[WEIGHT_GRAD] * sum(trained)])


def test_layouts_that_differ_among_the_gradients() -> None:
    x, kernels, _ = CROSS.tensors()
    inputs = [t.requires_grad_() for t in (x, *kernels)]
    grads = [LAYOUTS[layout](torch.randn_like(x)) for layout in ("channels_last", "contiguous", "strided")]
    ys = ops.depthwise_branches(x, kernels, CROSS.anchors, backend="fused")
    got = torch.autograd.grad(ys, inputs, grads)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for mine, want in zip(got, exact(CROSS, (x, kernels), grads)[3:]):
        assert_close(mine, want)


@pytest.mark.parametrize("backend", ["portable", "reference", "fused"])
def test_the_input_is_left_alone_and_outputs_own_their_memory(backend: str) -> None:
    x, kernels, _ = CROSS.tensors()
    before = [t.clone() for t in (x, *kernels)]
    ys = ops.depthwise_branches(x, kernels, CROSS.anchors, backend=backend)
    others = [y.clone() for y in ys[1:]]
    ys[0].add_(1)
    assert all(map(torch.equal, (x, *kernels, *ys[1:]), (*before, *others)))


X, K = torch.zeros(2, 3, 5, 6), torch.zeros(3, 1, 3, 3)
WRONG = {
    "three-dimensions": ((X[0], [K, K]), r"x has shape \(3, 5, 6\): depthwise_branches needs four dimensions"),
    "integers": ((X.long(), [K.long()]), r"x has dtype torch.int64: depthwise_branches needs a floating-point type"),
    "no-kernel": ((X, []), "kernels is empty: depthwise_branches needs"),
    "bare-kernel": ((X, K), r"kernels is a tensor: depthwise_branches takes .*write \[kernel\]"),
    "missing-anchor": ((X, [K, K], [(1, 1)]), "2 kernels but 1 anchors"),
    "other-channels": ((X, [K, K[:2]]), r"kernels\[1\] has shape \(2, 1, 3, 3\): an input with 3 channels"),
    "anchor-outside": ((X, [K, K], [(1, 1), (1, 3)]), r"anchor \(1, 3\) lies outside the 3x3 kernel"),
    "kernel-type": ((X, [K, K.double()]), r"kernels\[1\] .*torch.float64.* but x .*torch.float32"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong: str) -> None:
    arguments, message = WRONG[wrong]
    with pytest.raises(ArgumentError, match=message):
        ops.depthwise_branches(*arguments)


def test_unknown_algorithms_and_backends() -> None:
    with pytest.raises(ArgumentError, match="unknown algorithm 'fast'"):
        ops.depthwise_branches(X, [K, K], algorithm="fast")
    for kernels in ([K], [K, K]):
        with pytest.raises(ops.NoBackendError, match=r"unknown backend 'portabel': .*Did you mean 'portable'\?"):
            ops.depthwise_branches(X, kernels, backend="portabel")


def test_anchors_may_be_lists() -> None:
    for backend in ("portable", "fused"):
        got = ops.depthwise_branches(X + 1, [K + 1, K + 2], [[0, 0], [2, 1]], backend=backend)
        want = [ops.depthwise_sum(X + 1, [K + 1], [(0, 0)]), ops.depthwise_sum(X + 1, [K + 2], [(2, 1)])]
        assert all(map(torch.equal, got, want))
