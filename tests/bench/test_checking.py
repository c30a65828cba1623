"""Checks that are made before any timing."""

from __future__ import annotations

import math

import pytest
import torch

from widekernel import ops
from widekernel.bench import BenchmarkError, check_operator
from widekernel.bench.checking import check_agreement
from widekernel.ops.problem import DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD


def test_existing_backends_pass() -> None:
    with ops.trace() as ran:
        check_operator()
        check_operator("portable")
    assert {"portable", "reference"} <= set(ran.backends())
    assert {problem.channels_last for _, problem in ran.calls} == {False, True}


@pytest.mark.parametrize("op", [DEPTHWISE_SUM, DEPTHWISE_WEIGHT_GRAD])
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_error_in_a_single_number_is_found(op: str, channels_last: bool, spoil) -> None:
    spoil(lambda problem: problem.op == op and problem.channels_last == channels_last and problem.shape[2] == 14)
    with pytest.raises(BenchmarkError, match=rf"^wrong computes {op} .* wrongly.*Nothing is timed"):
        check_operator()


def test_a_requested_backend_is_checked_on_what_it_takes(spoil) -> None:
    spoil(lambda problem: problem.channels_last and problem.shape[2] == 14)
    with pytest.raises(BenchmarkError, match=r"^wrong computes depthwise_sum of"):
        check_operator("wrong")
    check_operator("portable")


def test_a_backend_that_takes_nothing(spoil) -> None:
    spoil(lambda problem: False)
    with pytest.raises(ops.NoBackendError, match="wrong cannot compute"):
        check_operator("wrong")
    with pytest.raises(ops.NoBackendError, match="unknown backend"):
        check_operator("none")


def test_outputs_must_agree() -> None:
    a = torch.tensor([1.0, 2.0])
    assert check_agreement({"a": a, "b": a + 1e-5}, "a", "it") == pytest.approx(5e-6, rel=0.1)
    with pytest.raises(BenchmarkError, match=r"it: b and a differ by 0\.05"):
        check_agreement({"a": a, "b": a + 0.1}, "a", "it")
    with pytest.raises(BenchmarkError, match="differ by nan"):
        check_agreement({"a": a, "b": torch.tensor([1.0, math.nan])}, "a", "it")
    with pytest.raises(BenchmarkError, match="differ by inf"):
        check_agreement({"a": a, "b": a[:1]}, "a", "it")
