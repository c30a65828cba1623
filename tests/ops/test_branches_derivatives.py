"""Derivatives of branches: numerical checks of first and second order, function transforms, and what must raise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES, Fused, OnlyBackward, OnlyForward, registered
from tests.ops.cases import assert_close, definition
from tests.ops.derivatives import (
    MAPPED,
    assert_equal_gradients,
    assert_equal_hessians,
    assert_equal_per_sample_gradients,
    assert_equal_third_derivatives,
    assert_equal_vmap,
    assert_forward_mode_raises,
    assert_no_graph_without_gradients,
    assert_vectorized_jacobian,
    loss,
)
from widekernel import ops

Dilations = tuple[int, int, int] | None
ANCHORS = [(0, 3), (1, 0), (0, 0)]
GAPS = pytest.mark.parametrize("dilations", [None, (1, 2, 3)], ids=str)
NAMES = ("x", "wide", "square", "tap")
BACKENDS = {"portable": None, "fused": Fused, "only-forward": OnlyForward, "only-backward": OnlyBackward}


@pytest.fixture(params=BACKENDS, autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    made = BACKENDS[request.param]
    if made is None:
        yield
        return
    with registered(made()):
        yield


def arguments(batch: int | None = None) -> list[Tensor]:
    """Return x and three kernels, each with a leading dimension if `batch` is given."""
    lead = () if batch is None else (batch,)
    shapes = [(2, 2, 3, 3), (2, 1, 2, 4), (2, 1, 2, 2), (2, 1, 1, 1)]
    return [torch.randn(*lead, *shape, dtype=torch.float64) for shape in shapes]


def mixed(ys: list[Tensor]) -> Tensor:
    """Return a combination in which every branch has a different role."""
    return ys[0].sin() + ys[1].cos() * ys[2]


def ours(x: Tensor, *kernels: Tensor) -> Tensor:
    return mixed(ops.depthwise_branches(x, kernels, ANCHORS))


def theirs(x: Tensor, *kernels: Tensor, dilations: tuple[int, ...] = (1, 1, 1)) -> Tensor:
    rects = zip(kernels, ANCHORS, dilations)
    return mixed([definition(x, [kernel], [anchor], None, [dilation]) for kernel, anchor, dilation in rects])


@GAPS
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients(check, dilations: Dilations) -> None:
    inputs = [t.requires_grad_() for t in arguments()]
    assert check(
        lambda x, *kernels: ops.depthwise_branches(x, kernels, ANCHORS, dilations=dilations), inputs, fast_mode=True
    )


def test_function_transforms_of_dilated_kernels() -> None:
    def dilated(x: Tensor, *kernels: Tensor) -> Tensor:
        return mixed(ops.depthwise_branches(x, kernels, ANCHORS, dilations=(2, 1, 3)))

    same = partial(theirs, dilations=(2, 1, 3))
    assert_equal_gradients(dilated, same, arguments())
    for which in ((True,) * 4, (False, True, False, False)):
        assert_equal_vmap(dilated, same, which, arguments(3), arguments())
        assert_equal_per_sample_gradients(dilated, same, which, arguments(3), arguments())


def test_the_second_derivative_is_fused_too() -> None:
    x, *kernels = (t.requires_grad_() for t in arguments())
    with registered(Fused("first")), ops.trace() as trace:
        ys = ops.depthwise_branches(x, kernels, ANCHORS)
        (g,) = torch.autograd.grad(mixed(ys).sum(), x, create_graph=True)
        trace.calls.clear()
        g.square().sum().backward()
    found = [problem.op for _, problem in trace.calls]
    # In the cotangents of the first pass, and then in x.
    assert (found.count(BRANCHES), found.count(SUM_OF_BRANCHES), found.count("depthwise_sum")) == (1, 1, 0)
    assert set(trace.backends()) == {"first"}


def test_func_grad() -> None:
    assert_equal_gradients(ours, theirs, arguments())


@GAPS
def test_func_grad_of_some_branches(dilations: Dilations) -> None:
    args, steps = arguments(), dilations or (1, 1, 1)

    def some(x: Tensor, *kernels: Tensor) -> Tensor:
        _, middle, last = ops.depthwise_branches(x, kernels, ANCHORS, dilations=dilations)
        return (middle * last).sum()

    def same(x: Tensor, *kernels: Tensor) -> Tensor:
        middle, last = (definition(x, kernels[b : b + 1], ANCHORS[b : b + 1], None, steps[b : b + 1]) for b in (1, 2))
        return (middle * last).sum()

    everything = (0, 1, 2, 3)
    for mine, truth in zip(grad(some, everything)(*args), grad(same, everything)(*args)):
        assert_close(mine, truth)
    many = arguments(2)
    for mine, truth in zip(vmap(grad(some, everything))(*many), vmap(grad(same, everything))(*many)):
        assert_close(mine, truth)


def mapped_id(which: tuple[bool, ...]) -> str:
    return "+".join(name for name, mapped in zip(NAMES, which) if mapped)


@pytest.mark.parametrize("which", MAPPED, ids=mapped_id)
def test_per_sample_gradients(which: tuple[bool, ...]) -> None:
    assert_equal_per_sample_gradients(ours, theirs, which, arguments(3), arguments())


@pytest.mark.parametrize("which", MAPPED, ids=mapped_id)
def test_vmap_of_the_outputs(which: tuple[bool, ...]) -> None:
    assert_equal_vmap(ours, theirs, which, arguments(3), arguments())


def test_gradients_of_vmap() -> None:
    args = arguments(3)
    got = grad(lambda *a: vmap(loss(ours))(*a).sum(), (0, 1, 2, 3))(*args)
    for mine, truth in zip(got, grad(lambda *a: vmap(loss(theirs))(*a).sum(), (0, 1, 2, 3))(*args)):
        assert_close(mine, truth)


def test_nested_vmap() -> None:
    x, kernels = torch.randn(3, 2, 2, 3, 3, dtype=torch.float64), arguments(2)[1:]
    got = vmap(vmap(ours, (None, 0, 0, 0)), (0, None, None, None))(x, *kernels)
    assert_close(got, torch.stack([torch.stack([theirs(one, *rest) for rest in zip(*kernels)]) for one in x]))


@pytest.mark.parametrize("second", range(4), ids=NAMES)
@pytest.mark.parametrize("first", range(4), ids=NAMES)
def test_hessians(first: int, second: int) -> None:
    args = [t[:, :1] if t.shape[1] == 2 else t[:1] for t in arguments()]
    assert_equal_hessians(ours, theirs, args, first, second)


@pytest.mark.parametrize("position", range(4), ids=NAMES)
def test_vectorized_jacobians(position: int) -> None:
    args = arguments()

    def of_one(value: Tensor) -> Tensor:
        return ours(*args[:position], value, *args[position + 1 :])

    assert_vectorized_jacobian(of_one, args[position])


def test_vectorized_hessian() -> None:
    args = arguments()
    hessian = torch.autograd.functional.hessian
    got = hessian(loss(ours), tuple(args), vectorize=True)
    for mine, truth in zip(itertools.chain(*got), itertools.chain(*hessian(loss(theirs), tuple(args)))):
        assert_close(mine, truth)


@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "with-graph"])
def test_batched_gradients(create_graph: bool) -> None:
    args = [t.requires_grad_() for t in arguments()]
    many = torch.randn(4, 2, 2, 3, 3, dtype=torch.float64)
    got = torch.autograd.grad(ours(*args), args, many, is_grads_batched=True, create_graph=create_graph)
    y = theirs(*args)
    for i, one in enumerate(many):
        for mine, truth in zip(got, torch.autograd.grad(y, args, one, retain_graph=True)):
            assert_close(mine[i], truth)


def test_third_derivatives() -> None:
    assert_equal_third_derivatives(ours, theirs, [t.requires_grad_() for t in arguments()])


@pytest.mark.parametrize("position", range(4), ids=NAMES)
def test_forward_mode_raises(position: int) -> None:
    assert_forward_mode_raises(ours, arguments(), position)


def test_no_graph_without_gradients() -> None:
    assert_no_graph_without_gradients(ours, arguments())
