"""Checkpoints and replaced classifiers: the other weights load, the classifier that differs is left out and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import widekernel
from tests.models.checkpoints import save_as
from tests.models.zoo import NANO, alive, assert_same_state, create, snapshot
from widekernel.errors import CheckpointError

WITH_OFFICIAL = [name for name in NANO if name != "slak_pw_nano"]


def _sequential(width: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(width, 4))


HEADS: dict[str, Any] = {
    "sequential": lambda model: setattr(model.head, "fc", _sequential(model.num_features)),
    "mlp": lambda model: setattr(model.head, "fc", nn.ModuleDict({"a": nn.Linear(model.num_features, 4)})),
    "without_bias": lambda model: setattr(model.head, "fc", nn.Linear(model.num_features, 4, bias=False)),
    "linear_head": lambda model: setattr(model, "head", nn.Linear(model.num_features, 4)),
    "parametrized": lambda model: nn.utils.parametrizations.weight_norm(model.head.fc),
}


@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "convnext_isotropic_nano"])
def test_weights_load_except_for_the_classifier(name: str, head: str, layout: str, tmp_path: Path) -> None:
    source, model = alive(name, num_classes=10), create(name, num_classes=10)
    path = save_as(source, tmp_path, layout)
    HEADS[head](model)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="were left out: .*the classifier is untrained"):
        report = widekernel.load_checkpoint(model, path)
    fc = "head" if layout == "official" else "head.fc"
    assert {f"{fc}.weight", f"{fc}.bias"} <= set(report.dropped)
    for key, value in model.state_dict().items():
        own = key.startswith("head.") and not key.startswith("head.norm.")
        assert torch.equal(value, before[key] if own else source.state_dict()[key]), key


@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("name", WITH_OFFICIAL)
def test_custom_classifiers_round_trip(name: str, layout: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    source, model = alive(name), create(name)
    for each in (source, model):
        HEADS["sequential"](each)
    report = widekernel.load_checkpoint(model, save_as(source, tmp_path, layout))
    assert not report.dropped
    assert_same_state(model.state_dict(), source.state_dict())
    assert not [warning for warning in recwarn if "untrained" in str(warning.message)]


def test_file_with_a_custom_classifier(tmp_path: Path) -> None:
    source, model = alive("slak_nano"), create("slak_nano")
    HEADS["sequential"](source)
    before = snapshot(model)
    with pytest.warns(
        UserWarning, match=r"head\.fc\.1\.weight.* were left out: the network's classifier is built differently"
    ):
        widekernel.load_checkpoint(model, save_as(source, tmp_path, "native"))
    assert torch.equal(model.head.fc.weight, before["head.fc.weight"])
    source.head.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(128, 7))
    HEADS["sequential"](model)
    with pytest.warns(UserWarning, match=r"head\.fc\.1\.weight has shape \(7, 128\), the network's \(4, 128\)"):
        widekernel.load_checkpoint(model, save_as(source, tmp_path, "native"))


def test_other_weights_must_fit(tmp_path: Path) -> None:
    path, model = save_as(alive("slak_nano"), tmp_path, "official"), create("slak_nano", depths=(1, 1, 3, 1))
    HEADS["sequential"](model)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"nothing was loaded:\n.*the file holds no such weight"):
        widekernel.load_checkpoint(model, path)
    assert_same_state(model.state_dict(), before)
