"""Native calls write float32, whatever the default dtype is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.native import needs_native
from widekernel.ops.cpu import batch_norm
from widekernel.ops.cpu.gate import Gate
from widekernel.ops.cpu.pointwise import PackedBlock, weight_grad

pytestmark = needs_native


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def test_results_are_float32(default_dtype: None) -> None:
    x, matrix = torch.randn(2, 64, 5, 3, dtype=torch.float32), torch.randn(64, 64, dtype=torch.float32) / 8
    grad = torch.randn(2, 64, 5, 3, dtype=torch.float32)
    pixels, slopes = (t.transpose(0, 1).flatten(1).double() for t in (x, grad))
    y, found = batch_norm.batch_norm(x, None, None, 1e-5)
    computed = {
        "block": (PackedBlock(matrix)(x), torch.einsum("oc,nchw->nohw", matrix.double(), x.double())),
        "gate": (
            Gate(matrix, None, "none", matrix, None)(x),
            (x.double().mean((2, 3)) @ (matrix.double() @ matrix.double()).t()).sigmoid(),
        ),
        "weight": (weight_grad(x, grad, True)[0], slopes @ pixels.t()),
        "bias": (weight_grad(x, grad, True)[1], slopes.sum(1)),
        "mean": (found.mean, pixels.mean(1)),
        "norm": (
            y,
            (x.double() - x.double().mean((0, 2, 3), True)) / (x.double().var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt(),
        ),
        "slope": (batch_norm.batch_norm_backward(grad, x, None, found)[2], slopes.sum(1)),
    }
    for name, (got, want) in computed.items():
        assert got.dtype is torch.float32, name
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4, msg=name)
