"""Weights that do not fit a folded or compacted network are refused before any is loaded."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import nn

import widekernel
from tests.models.zoo import alive, assert_same_state, images, snapshot
from widekernel.errors import CheckpointError
from widekernel.layers import FoldedLargeKernel, Rect
from widekernel.layers.grouped import GroupedKernels
from widekernel.layers.sources import Rectangles
from widekernel.sparsity import compact as compact_at_price
from widekernel.transforms.compaction.cost import CostModel


def masked(dead: int, **kwargs: Any) -> nn.Module:
    """Make a network in which three of four channels of each kernel are dead, counted from quarter `dead` on."""
    model = alive("slak_nano", num_classes=5, **kwargs)
    with torch.no_grad():
        for source in (module for module in model.modules() if isinstance(module, Rectangles)):
            for kernel in source.kernels:
                kernel[dead * len(kernel) // 4 : (dead + 3) * len(kernel) // 4] = 0
    return model


def _logits(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(images())


def _refused(model: nn.Module, state: Any, message: str) -> None:
    before, out = snapshot(model), _logits(model)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert_same_state(model.state_dict(), before)
    torch.testing.assert_close(_logits(model), out)


def compact(model: nn.Module) -> nn.Module:
    """Compact where moving channels is free, so that every dead one is left out."""
    return compact_at_price(model, CostModel(move=0.0, outside=0.0, call=0.0, group=0.0, block=1))


WRAPPED = {
    "itself": lambda model: model,
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "in_another": lambda model: nn.Sequential(model, nn.Linear(5, 2)),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_refused_state_leaves_a_compacted_network_unchanged(how: str) -> None:
    model, other = (WRAPPED[how](compact(masked(dead))) for dead in (0, 1))
    assert any(isinstance(module, GroupedKernels) for module in model.modules())
    _refused(model, other.state_dict(), "nothing was loaded:\n.*names other channels in the file")
    model.load_state_dict(like := WRAPPED[how](compact(masked(0))).state_dict())
    assert_same_state(model.state_dict(), like)


def test_weights_of_the_network_that_was_compacted() -> None:
    _refused(compact(masked(0)), masked(0).state_dict(), "nothing was loaded:\n.*belongs to another form of the layer")


def test_files_of_another_compacted_network(tmp_path: Any) -> None:
    model = compact(masked(0))
    before = snapshot(model)
    path = widekernel.save_checkpoint(compact(masked(1)), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="names other channels in the file"):
        widekernel.load_checkpoint(model, path)
    assert_same_state(model.state_dict(), before)


def test_a_compacted_network_within_an_extractor() -> None:
    model, other = (compact(masked(dead, features_only=True)) for dead in (0, 1))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="names other channels"):
        model.load_state_dict(other.state_dict())
    assert_same_state(model.state_dict(), before)


def test_a_folded_network_and_its_training_form() -> None:
    model = alive("slak_nano")
    folded = widekernel.fold(model)
    _refused(
        folded,
        model.state_dict(),
        r"nothing was loaded:\n.*stages\.0\.blocks\.0\.mixer\.source\.kernels\.0 belongs to another form of the layer",
    )
    _refused(folded, widekernel.fold(alive("slak_nano", num_classes=3)).state_dict(), r"head.fc.weight has shape \(3, 128\)")
    some = {key: value for key, value in widekernel.fold(alive("slak_nano")).state_dict().items() if "stem" in key}
    assert folded.load_state_dict(some, strict=False).missing_keys
    assert torch.equal(folded.stem[0].weight, some["stem.0.weight"])


def test_layers_that_stand_alone() -> None:
    def layer(column: int) -> FoldedLargeKernel:
        return FoldedLargeKernel([Rect(torch.randn(4, 1, 3, 12), (1, column))], torch.randn(4))

    model = nn.Sequential(layer(5))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"0\.anchors are \[\[1, 6\]\] in the file but \[\(1, 5\)\] here"):
        model.load_state_dict(nn.Sequential(layer(6)).state_dict())
    assert_same_state(model.state_dict(), before)


def test_networks_without_tables_load_as_before() -> None:
    model = timm.create_model("slak_nano", num_classes=3)
    assert model.load_state_dict({}, strict=False).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
