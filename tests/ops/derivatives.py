"""Derivatives of functions of four tensors: ours, compared with PyTorch's derivatives of the definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, vmap

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
