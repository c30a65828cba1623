"""Precisions, how exact they must be, and PyTorch's settings, which are restored."""

from __future__ import annotations

import pytest
import torch

from widekernel.bench.precision import BFLOAT16, FLOAT16, FLOAT32, PRECISIONS, TF32, in_force, parse_precisions
from widekernel.errors import ArgumentError


def settings() -> dict:
    backends = torch.backends
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "cublas": backends.cuda.matmul.allow_tf32,
        "cudnn": backends.cudnn.allow_tf32,
        "benchmark": backends.cudnn.benchmark,
        "deterministic": backends.cudnn.deterministic,
        "new": [
            of.fp32_precision
            for of in (
                backends.cuda.matmul,
                backends.cudnn,
                backends.cudnn.conv,
                backends.cudnn.rnn,
                backends.mkldnn,
                backends.mkldnn.matmul,
            )
        ],
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=str)
def test_settings_are_in_force_and_restored(precision) -> None:
    before = settings()
    with in_force(precision):
        inside = settings()
    assert settings() == before
    with pytest.raises(KeyError), in_force(precision):
        raise KeyError
    assert settings() == before
    tf32 = precision is TF32
    assert inside["matmul"] == ("high" if tf32 else "highest")
    assert inside["cublas"] == inside["cudnn"] == tf32 and inside["benchmark"]
    assert inside["new"][0] == ("tf32" if tf32 else "ieee"), "what the operator asks for"


def test_the_search_of_cudnn_can_be_switched_off() -> None:
    with in_force(FLOAT32, search=False):
        assert not torch.backends.cudnn.benchmark


def test_settings_of_the_user_are_restored_too() -> None:
    with in_force(FLOAT32):  # which also puts back what this test sets
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        own = settings()
        with in_force(TF32), in_force(FLOAT32):
            assert torch.get_float32_matmul_precision() == "highest"
        assert settings() == own


def test_tolerances_and_types() -> None:
    assert [p.tolerance for p in (FLOAT32, TF32, FLOAT16, BFLOAT16)] == [1e-5, 2e-3, 4e-3, 1.6e-2]
    assert [p.agreement_tolerance for p in (FLOAT32, TF32, FLOAT16, BFLOAT16)] == [1e-4, 4e-3, 8e-3, 3.2e-2]
    assert [p.bytes for p in (FLOAT32, TF32, FLOAT16, BFLOAT16)] == [4, 4, 2, 2]
    assert TF32.dtype == torch.float32 and TF32.autocast is None and BFLOAT16.autocast == torch.bfloat16


def test_names_are_parsed() -> None:
    assert parse_precisions("float32, bfloat16") == [BFLOAT16, FLOAT32]
    with pytest.raises(ArgumentError, match=r"dtypes has 'floot16'. Did you mean 'float16'\? It takes bfloat16, tf32"):
        parse_precisions("bfloat16,floot16")
