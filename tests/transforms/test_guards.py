"""What is looked at in every call of a fused block: it costs one look, also after a change that has no effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.transforms.fusion import ByHand, calls_of, fused, randomized
from widekernel.layers import PointwiseLinear
from widekernel.ops.cpu import library as native
from widekernel.transforms.acceleration.fusion.guards import Guards
from widekernel.transforms.acceleration.fusion.samples import Samples

pytestmark = pytest.mark.usefixtures("always_faster", "packs")


def never(*_: Any) -> Any:
    raise AssertionError("there is nothing to examine")


def test_a_change_without_effect_is_examined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = randomized(ByHand()), torch.randn(2, 12, 6, 5)
    fused(block, x)
    assert calls_of(block, x)[1] == 1
    block.mlp.fc1.__class__ = PointwiseLinear if type(block.mlp.fc1) is nn.Linear else nn.Linear
    block.norm.eps = float("1e-3")  # an equal number, but another object
    assert calls_of(block, x)[1] == 1
    monkeypatch.setattr(Guards, "violations", never)
    assert calls_of(block, x)[1] == 1
    block.mlp.fc1.__class__ = nn.Conv2d
    with pytest.raises(AssertionError, match="nothing to examine"):
        calls_of(block, x)


@pytest.mark.parametrize("with_library", [True, False])
def test_samples(with_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_library:
        monkeypatch.setattr(native, "load", lambda: native.Library("left out by this test"))
    tensors = [torch.randn(()), torch.randn(3), torch.randn(7, 9).t(), torch.randn(40, 100)[5:], torch.randn(0)]
    tensors[1][1] = float("nan")
    samples = Samples(tensors)
    assert samples.unchanged()
    for tensor in tensors[:3]:
        last = tensor.reshape(-1)[-1:] if tensor.is_contiguous() else tensor[-1, -1:]
        before = last.clone()
        last.add_(1.0)
        assert not samples.unchanged()
        last.copy_(before)
        assert samples.unchanged()
    tensors[3].mul_(-1)
    assert not samples.unchanged()


def test_no_samples() -> None:
    assert Samples([]).unchanged()
