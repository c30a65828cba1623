"""`accelerate` on fused blocks: those whose plan does not hold, and those in another precision, are planned again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.transforms.acceleration import kinds, replace_measurement
from tests.transforms.fusion import ByHand, calls_of, fused, randomized
from widekernel import accelerate, ops
from widekernel.transforms import AccelerationReport
from widekernel.transforms.acceleration import swapping
from widekernel.transforms.acceleration.fusion import FusedBlock
from widekernel.transforms.acceleration.fusion import fused as module_of_fused

pytestmark = pytest.mark.usefixtures("always_faster", "packs", "packs_lower")


def image() -> Tensor:
    return torch.randn(2, 12, 6, 5)


def in_bfloat16(block: nn.Module, x: Tensor) -> AccelerationReport:
    with torch.no_grad():
        return accelerate(block, x, precision="bfloat16")[1]


def precisions_of(block: nn.Module, x: Tensor) -> list[str]:
    with torch.no_grad(), ops.trace() as traced:
        block(x)
    return [call.precision for call in traced.fused]


def assert_own_result(block: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        want = nn.Module.__call__(block, x)
    assert_close(calls_of(block, x)[0], want, rtol=1e-4, atol=1e-5 * max(1.0, want.abs().max().item()))


def test_other_parts() -> None:
    block, x = randomized(ByHand()), image()
    fused(block, x)
    kind = type(block)
    block.mlp.act = nn.ReLU()
    assert precisions_of(block, x) == []
    _, report = fused(block, x)
    assert report[""].is_swapped and "relu" in report[""].before
    assert type(block) is kind
    assert precisions_of(block, x) == ["float32"]
    assert_own_result(block, x)
    assert fused(block, x)[1][""].reason == "fused already"


def test_other_parts_of_a_copy() -> None:
    block, x = randomized(ByHand()), image()
    fused(block, x)
    other = copy.deepcopy(block)
    other.mlp.act = nn.Tanh()
    precisions_of(other, x)  # the first call plans the copy
    other.mlp.act = nn.ReLU()
    fused(other, x)
    assert precisions_of(other, x) == ["float32"]
    assert_own_result(other, x)


def test_another_precision_and_back() -> None:
    block, x = randomized(ByHand()), image()
    fused(block, x)
    report = in_bfloat16(block, x)
    assert report[""].after == "FusedByHandInBFloat16" and report.outputs is not None and report.outputs.relative > 1e-5
    assert precisions_of(block, x) == ["bfloat16"]
    again = in_bfloat16(block, x)
    assert again[""].reason == "fused already"
    # The outputs are compared with those of the code of the block, which is float32.
    assert again.outputs is not None and again.outputs.relative == pytest.approx(report.outputs.relative, rel=1e-3)
    assert precisions_of(block, x) == ["bfloat16"]
    _, report = fused(block, x)
    assert report[""].after == "FusedByHand"
    assert precisions_of(block, x) == ["float32"]


def test_plans_that_may_hold_again_are_kept() -> None:
    block, x = randomized(ByHand()), image()
    fused(block, x)
    hook = block.mlp.register_forward_hook(lambda *_: None)
    assert "has a hook" in fused(block, x)[1][""].reason
    assert precisions_of(block, x) == []
    hook.remove()
    assert precisions_of(block, x) == ["float32"]
    block.train()
    assert "in training mode" in fused(block, x)[1][""].reason
    assert precisions_of(block.eval(), x) == ["float32"]


@pytest.mark.parametrize(("first", "then", "kept"), [("float32", "bfloat16", True), ("bfloat16", "float32", False)])
def test_blocks_that_are_not_faster_in_another_precision(
    first: str, then: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = randomized(ByHand()), image()
    with torch.no_grad():
        accelerate(block, x, precision=first)
        replace_measurement(monkeypatch, faster=False)
        _, report = accelerate(block, x, precision=then)
    fate = "it remains fused in float32" if kept else "it is no longer fused in bfloat16"
    assert report[""].reason == f"not faster; {fate}"
    assert precisions_of(block, x) == (["float32"] if kept else [])
    assert isinstance(block, FusedBlock) == kept


def test_errors_leave_blocks_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise MemoryError

    block, x = randomized(ByHand()), image()
    fused(block, x)
    before = kinds(block)
    monkeypatch.setattr(swapping, "try_blocks", fails)
    with pytest.raises(MemoryError):
        in_bfloat16(block, x)
    assert kinds(block) == before
    assert precisions_of(block, x) == ["float32"]


def test_classes_that_were_changed_are_left_alone() -> None:
    block, x = randomized(ByHand()), image()
    fused(block, x)
    block.__class__ = kind = type("Sub", (type(block),), {})
    assert fused(block, x)[1][""].reason == "fused already, and its class has been changed since"
    assert type(block) is kind


def test_copies_that_could_not_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = randomized(ByHand()), image()
    fused(block, x)
    other = copy.deepcopy(block)
    with monkeypatch.context() as patched:
        patched.setattr(module_of_fused, "missing", lambda _: "there is no native library")
        assert precisions_of(other, x) == []
    assert fused(other, x)[1][""].is_swapped
    assert precisions_of(other, x) == ["float32"]
