"""`accelerate(precision="int8")`: what runs, what the report says, and blocks that are not suitable."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.transforms.acceleration import kinds
from tests.transforms.fusion import (
    ByHand,
    Convolutional,
    InPlace,
    Normalized,
    calls_of,
    fused_names,
    precisions_of,
    randomized,
)
from widekernel import accelerate
from widekernel.errors import ArgumentError
from widekernel.transforms import AccelerationReport, to_torch
from widekernel.transforms.acceleration import swapping
from widekernel.transforms.acceleration.fusion import fused as module_of_fused
from widekernel.transforms.acceleration.fusion.deviation import TOLERANCES

pytestmark = pytest.mark.usefixtures("always_faster", "packs", "packs_lower")


def lowered(model: nn.Module, x: Any) -> tuple[Any, AccelerationReport]:
    with torch.no_grad():
        return accelerate(model, x, precision="int8")


def image() -> Tensor:
    return torch.randn(2, 12, 6, 5)


@pytest.mark.parametrize("make", [ByHand, Convolutional, InPlace, Normalized])
def test_blocks_by_hand(make: Callable[[], nn.Module]) -> None:
    block, x = randomized(make()), image()
    with torch.no_grad():
        want = block(x)
    _, report = lowered(block, x)
    assert report[""].after == f"Fused{make.__name__}InInt8"
    got, precisions = precisions_of(block, x)
    assert precisions == {"int8"}
    assert got.dtype == torch.float32
    deviation = (got - want).abs().max() / want.abs().max()
    assert 1e-4 < deviation < TOLERANCES["int8"]
    assert 1e-4 < report[""].deviation <= TOLERANCES["int8"]  # type: ignore[operator]


def test_a_network_with_stem_and_downsampling() -> None:
    network, x = randomized(timm.create_model("slak_nano", num_classes=7)), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        want = network(x)
    _, report = lowered(network, x)
    got, precisions = precisions_of(network, x)
    assert "int8" in precisions <= {"int8"}
    assert report.precision == "int8" and report.outputs is not None and report.outputs.images == 3
    assert report.outputs.relative == pytest.approx(((got - want).norm() / want.norm()).item(), rel=1e-3)
    for row in report.blocks:
        assert row.is_swapped == (row.deviation <= TOLERANCES["int8"])  # type: ignore[operator]
        assert row.is_swapped or "the output differs by" in row.reason
    assert "blocks fused in int8" in str(report)


def test_copies_pickles_and_to_torch() -> None:
    block, x = randomized(ByHand()), image()
    with torch.no_grad():
        want = block(x)
    lowered(block, x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is type(block)
        calls_of(other, x)  # the first call compares the native calls with the code of the block
        got, precisions = precisions_of(other, x)
        assert precisions == {"int8"}
        assert torch.equal(got, precisions_of(block, x)[0])
    plain = to_torch(block)
    assert fused_names(plain) == []
    assert_close(precisions_of(plain, x)[0], want, rtol=1e-5, atol=1e-5)


class Outlier(nn.Module):
    """A pixel with a channel so large that a step of the others is larger than they are; the product does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(8, 16), nn.ReLU()
        with torch.no_grad():
            self.first.weight[:, 3] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.first(x))


def test_a_block_with_outliers_keeps_its_precision() -> None:
    block, x = Outlier().eval(), torch.randn(16, 8)
    x[:, 3] = 1000
    with torch.no_grad():
        accelerate(block, x)
    _, report = lowered(block, x)
    row = report[""]
    assert not row.is_swapped and row.deviation > TOLERANCES["int8"]  # type: ignore[operator]
    assert "the output differs by" in row.reason and "it remains fused in float32" in row.reason
    assert precisions_of(block, x)[1] == {"float32"}
    x[:, 3] = 1
    assert lowered(block, x)[1][""].is_swapped, "on ordinary inputs it is suitable"


def test_machines_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = randomized(ByHand()), image()
    before = kinds(block)
    lowered(block, x)
    alone = copy.deepcopy(block)
    monkeypatch.setattr(module_of_fused, "missing", lambda precision: f"no {precision} here")
    assert precisions_of(alone, x)[1] == set()
    with torch.no_grad():
        assert alone.reasons_against(x) == ["no int8 here"]
    plain = to_torch(block)
    monkeypatch.setattr(swapping, "missing", lambda precision: f"precision is {precision!r}, but there is none")
    with pytest.raises(ArgumentError, match="precision is 'int8', but there is none"):
        lowered(plain, x)
    assert kinds(plain) == before
