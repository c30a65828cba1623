"""Derivatives of functions of four tensors: ours, compared with PyTorch's derivatives of the definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from tests.ops.cases import assert_close

Function = Callable[..., Tensor]
EVERYTHING = (0, 1, 2, 3)
MAPPED = [which for which in itertools.product([False, True], repeat=4) if any(which)]
"""Which of the four arguments `vmap` maps over."""


def loss(function: Function) -> Function:
    """Turn images (2, 2, 3, 3) into a number whose second derivatives do not vanish."""
    return lambda *args: (function(*args).sin() * torch.linspace(1, 2, 36, dtype=torch.float64).view(2, 2, 3, 3)).sum()


def assert_equal_gradients(ours: Function, theirs: Function, args: Sequence[Tensor]) -> None:
    """Compare the gradients in all arguments."""
    for mine, truth in zip(grad(loss(ours), EVERYTHING)(*args), grad(loss(theirs), EVERYTHING)(*args)):
        assert_close(mine, truth)


def assert_equal_per_sample_gradients(
    ours: Function, theirs: Function, which: Sequence[bool], batched: Sequence[Tensor], single: Sequence[Tensor]
) -> None:
    """Compare `vmap` of all gradients with gradients that are taken one sample after the other."""
    args = [many if mapped else one for mapped, many, one in zip(which, batched, single)]
    got = vmap(grad(loss(ours), EVERYTHING), tuple(0 if mapped else None for mapped in which))(*args)
    for i in range(len(batched[0])):
        one = [arg[i] if mapped else arg for mapped, arg in zip(which, args)]
        for mine, truth in zip(got, grad(loss(theirs), EVERYTHING)(*one)):
            assert_close(mine[i], truth)


def assert_equal_vmap(
    ours: Function, theirs: Function, which: Sequence[bool], batched: Sequence[Tensor], single: Sequence[Tensor]
) -> None:
    """Compare `vmap` with calls one by one; the last dimension is mapped over, and put third in the output."""
    args = [many.movedim(0, -1) if mapped else one for mapped, many, one in zip(which, batched, single)]
    got = vmap(ours, tuple(-1 if mapped else None for mapped in which), 2)(*args)
    each = [
        theirs(*(many[i] if mapped else one for mapped, many, one in zip(which, batched, single)))
        for i in range(len(batched[0]))
    ]
    assert_close(got, torch.stack(each, 2))


def assert_equal_hessians(ours: Function, theirs: Function, args: Sequence[Tensor], first: int, second: int) -> None:
    """Compare the derivatives in two of the arguments."""

    def scalar(function: Function) -> Function:
        return lambda *a: function(*a).sin().sum()

    got = jacrev(jacrev(scalar(ours), first), second)(*args)
    assert_close(got, jacrev(jacrev(scalar(theirs), first), second)(*args))


def assert_equal_third_derivatives(ours: Function, theirs: Function, args: Sequence[Tensor]) -> None:
    """Compare gradients of gradients of gradients."""

    def third(function: Function) -> Tensor:
        value = loss(function)(*args)
        for _ in range(2):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, args, create_graph=True))
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, args)])

    assert_close(third(ours), third(theirs), 1e-11)


def assert_vectorized_jacobian(of_one: Function, arg: Tensor) -> None:
    """Compare a Jacobian that is computed for many outputs at once with one that is computed in a loop."""
    jacobian = torch.autograd.functional.jacobian
    loop = jacobian(of_one, arg)
    assert loop.abs().max() > 0
    assert_close(jacobian(of_one, arg, vectorize=True), loop)


def assert_forward_mode_raises(ours: Function, args: Sequence[Tensor], position: int) -> None:
    """Check that there is no derivative in one argument in forward mode: a silent zero would be worse than an error."""

    def of_one(value: Tensor) -> Tensor:
        return ours(*args[:position], value, *args[position + 1 :])

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(of_one, (args[position],), (args[position],))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[position], torch.ones_like(args[position]))
        with pytest.raises(NotImplementedError, match="jvp"):
            of_one(dual)


def assert_no_graph_without_gradients(ours: Function, args: Sequence[Tensor]) -> None:
    """Check that a graph is recorded where gradients are, and nowhere else."""
    args = [t.requires_grad_() for t in args]
    with torch.no_grad():
        assert not ours(*args).requires_grad
    with torch.inference_mode():
        assert ours(*args).is_inference()
    assert ours(*args).requires_grad
