"""Random problems for every kernel under bounds checks: wrong results, accesses outside tensors, missing stores."""

from __future__ import annotations

import pytest
import torch

from tests.ops.gpu.drawing import DILATED, KINDS, Kind, drawn
from tests.ops.gpu.guard import Guard
from tests.ops.gpu.helpers import DTYPES

pytestmark = pytest.mark.interpreted

# Numbers that determine what is drawn for each kernel and type.
FEW, MANY = range(2), range(2, 10)


def check(guard: Guard, kind: Kind, dtype: torch.dtype, number: int, accesses: int) -> None:
    problem = drawn(kind, dtype, number, accesses)
    try:
        problem.check()
    except AssertionError as error:
        raise AssertionError(f"{problem}: {error}") from error
    assert guard.launches > 0


@pytest.mark.parametrize("number", [FEW[0], *(pytest.param(number, marks=pytest.mark.slow) for number in FEW[1:])])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_problems(guard: Guard, kind: Kind, dtype: torch.dtype, number: int) -> None:
    check(guard, kind, dtype, number, 150)


@pytest.mark.slow
@pytest.mark.parametrize("number", MANY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_more_random_problems(guard: Guard, kind: Kind, dtype: torch.dtype, number: int) -> None:
    check(guard, kind, dtype, number, 1000)


# Each kernel once, and each type with some of the kernels.
ONCE = [(kind, DTYPES[number % len(DTYPES)]) for number, kind in enumerate(DILATED)]


@pytest.mark.parametrize(("kind", "dtype"), ONCE, ids=str)
def test_random_dilated_problems(guard: Guard, kind: Kind, dtype: torch.dtype) -> None:
    check(guard, kind, dtype, 0, 150)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DILATED, ids=str)
def test_more_random_dilated_problems(guard: Guard, kind: Kind, dtype: torch.dtype, number: int) -> None:
    check(guard, kind, dtype, number, 1000)
