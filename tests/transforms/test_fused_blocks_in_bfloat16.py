"""`accelerate(precision="bfloat16")`: what runs, what it changes, what the report says, and what is refused."""

from __future__ import annotations

import copy
import json
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
from widekernel.ops.pointwise_reference import ReferenceBlock
from widekernel.transforms import AccelerationReport, to_torch
from widekernel.transforms.acceleration import swapping
from widekernel.transforms.acceleration.fusion import FusedBlock
from widekernel.transforms.acceleration.fusion import fused as module_of_fused
from widekernel.transforms.acceleration.fusion.deviation import TOLERANCES
from widekernel.transforms.acceleration.outputs import OutputDeviation

pytestmark = pytest.mark.usefixtures("always_faster", "packs", "packs_lower")


def lowered(model: nn.Module, x: Any) -> tuple[Any, AccelerationReport]:
    with torch.no_grad():
        return accelerate(model, x, precision="bfloat16")


def image() -> Tensor:
    return torch.randn(2, 12, 6, 5)


@pytest.mark.parametrize("make", [ByHand, Convolutional, InPlace, Normalized])
def test_blocks_by_hand(make: Callable[[], nn.Module]) -> None:
    block, x = randomized(make()), image()
    exact, _ = accelerate(copy.deepcopy(block), x)
    with torch.no_grad():
        want = block(x)
    _, report = lowered(block, x)
    assert isinstance(block, (FusedBlock, make))
    assert report[""].after == f"Fused{make.__name__}InBFloat16"
    got, precisions = precisions_of(block, x)
    assert precisions == {"bfloat16"}
    assert precisions_of(exact, x)[1] == {"float32"}
    assert got.dtype == torch.float32
    deviation = (got - want).abs().max() / want.abs().max()
    assert 1e-5 < deviation < TOLERANCES["bfloat16"]
    assert 1e-5 < report[""].deviation <= TOLERANCES["bfloat16"]  # type: ignore[operator]
    assert block.reasons_against(x) != []  # gradients are on here


def test_the_report() -> None:
    network, x = randomized(timm.create_model("slak_nano", num_classes=7)), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        want = network(x)
    _, report = lowered(network, x)
    got, precisions = precisions_of(network, x)
    assert precisions == {"bfloat16"}
    assert report.precision == "bfloat16" and report.fused
    assert all(0 < row.deviation <= TOLERANCES["bfloat16"] for row in report.fused)  # type: ignore[operator]
    outputs = report.outputs
    assert outputs == OutputDeviation.of(want, got)
    assert outputs is not None and outputs.images == 3
    assert outputs.same_class == (want.argmax(1) == got.argmax(1)).sum()
    assert outputs.relative == pytest.approx((got - want).norm().item() / want.norm().item(), rel=1e-3)
    assert 0 < outputs.largest < 0.1
    text = str(report)
    assert "blocks fused in bfloat16" in text and "deviation" in text and "cosine" in text
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["precision"] == "bfloat16" and saved["outputs"]["images"] == 3
    _, exact = accelerate(randomized(timm.create_model("slak_nano")), torch.randn(1, 3, 64, 64))
    assert exact.precision == "float32" and exact.outputs is None and "cosine" not in str(exact)


def test_outputs_of_any_structure() -> None:
    old, new = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    found = OutputDeviation.of(old, new)
    assert (found.images, found.same_class, found.largest) == (2, 1, 0.25)
    assert found.relative == pytest.approx(2**0.5 / 30**0.5)
    assert found.cosine == pytest.approx(29 / 30)
    nested = OutputDeviation.of({"a": [old, "text"], "b": torch.ones(3)}, {"a": [new, "text"], "b": torch.ones(3)})
    assert (nested.images, nested.largest) == (None, 0.25)
    assert OutputDeviation.of([], []).cosine == 1
    assert OutputDeviation.of(old, torch.full_like(old, float("nan"))).relative != 0
    assert "the largest output stays in its place for 1 of 2 images" in str(found) and "images" not in str(nested)


def test_copies_and_pickles_keep_the_precision() -> None:
    block, x = randomized(ByHand()), image()
    lowered(block, x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is type(block)
        calls_of(other, x)  # the first call compares the native calls with the code of the block
        got, precisions = precisions_of(other, x)
        assert precisions == {"bfloat16"}
        assert torch.equal(got, precisions_of(block, x)[0])


def test_copies_on_machines_without_it_run_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = randomized(ByHand()), image()
    lowered(block, x)
    alone = copy.deepcopy(block)
    monkeypatch.setattr(module_of_fused, "missing", lambda precision: f"no {precision} here")
    got, precisions = precisions_of(alone, x)
    assert precisions == set()
    assert_close(got, precisions_of(to_torch(block), x)[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert alone.reasons_against(x) == ["no bfloat16 here"]


def test_writes_to_weights_are_noticed() -> None:
    block, x = randomized(ByHand()), image()
    lowered(block, x)
    before, _ = precisions_of(block, x)
    with torch.no_grad():
        block.mlp.fc1.weight.mul_(1.5)
    after, precisions = precisions_of(block, x)
    want, _ = precisions_of(to_torch(block), x)
    assert precisions == {"bfloat16"}
    assert (after - want).norm() < 0.01 * want.norm() < (before - want).norm()


def test_to_torch_and_a_second_call() -> None:
    block, x = randomized(ByHand()), image()
    with torch.no_grad():
        want = block(x)
    lowered(block, x)
    assert lowered(block, x)[1][""].reason == "fused already"
    plain = to_torch(block)
    assert fused_names(plain) == []
    assert_close(precisions_of(plain, x)[0], want, rtol=1e-5, atol=1e-5)


class Canceling(nn.Module):
    """Two columns of the second product that nearly cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8, bias=False)
        with torch.no_grad():
            self.first.weight[16:] = self.first.weight[:16]
            self.first.bias[16:] = self.first.bias[:16] + 0.1
            self.second.weight[:, 16:] = -self.second.weight[:, :16]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


def test_a_block_that_deviates_too_much_is_left_alone() -> None:
    block, x = Canceling().eval(), 4 + torch.randn(16, 8)
    _, report = lowered(block, x)
    row = report[""]
    assert not row.is_swapped and row.deviation > TOLERANCES["bfloat16"]  # type: ignore[operator]
    assert "first and second: the output differs by" in row.reason
    assert precisions_of(block, x)[1] == set()
    with torch.no_grad():
        assert accelerate(block, x)[1][""].is_swapped, "in float32 it may be fused later"


def test_errors_that_rounding_would_hide_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weights: Any, precision: str) -> Callable[..., Tensor]:
        return ReferenceBlock(weights.first * 1.0001, *weights[1:], precision)

    monkeypatch.setattr(module_of_fused, "pack", wrong)
    _, report = lowered(randomized(ByHand()), image())
    assert "mlp.fc1 and mlp.fc2: the output differs by" in report[""].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bfloat"}, "precision is 'bfloat'.* Did you mean 'bfloat16'"),
        ({"precision": "bfloat16", "example_input": None}, "which only fused blocks have.*give example_input"),
        ({"precision": "bfloat16", "blocks": False}, "which only fused blocks have.*leave blocks at True"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    block = randomized(ByHand())
    before = kinds(block)
    with pytest.raises(ArgumentError, match=message):
        accelerate(block, **{"example_input": image(), **options})
    assert kinds(block) == before


def test_machines_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        swapping, "missing", lambda precision: f"precision is {precision!r}, but there is none: use 'float32'"
    )
    block = randomized(ByHand())
    before = kinds(block)
    with pytest.raises(ArgumentError, match="precision is 'bfloat16', but there is none: use 'float32'"):
        lowered(block, image())
    assert kinds(block) == before
    assert accelerate(block, image())[1].precision == "float32"


def test_an_error_in_the_last_run_leaves_the_network_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    block = randomized(ByHand())
    before, runs = kinds(block), []

    def outputs_of(model: nn.Module, example: Any) -> Tensor:
        runs.append(type(model))
        if len(runs) == 2:
            raise MemoryError
        return model(example)

    monkeypatch.setattr(swapping, "outputs_of", outputs_of)
    with pytest.raises(MemoryError):
        lowered(block, image())
    assert kinds(block) == before
    assert issubclass(runs[1], FusedBlock)
