"""Networks in timm's hub format: saved by `save_for_hf`, created by `create_model` from a folder or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import _hub, save_for_hf
from timm.utils import reparameterize_model
from torch import nn

import widekernel
from tests.models.zoo import NANO, alive, assert_same_state, create, images
from widekernel.errors import ArgumentError, CheckpointError
from widekernel.sparsity import compact

pytestmark = pytest.mark.clients


def _logits(model: nn.Module, channels: int = 3) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images(channels=channels))  # type: ignore[no-any-return]


def _again(folder: Path, **kwargs: Any) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride_and_act": {"output_stride": 16, "act_layer": "silu"},
    "channels_and_pool": {"in_chans": 1, "global_pool": "max", "num_classes": 3},
    "no_classifier": {"num_classes": 0, "drop_path_rate": 0.1, "drop_rate": 0.2},
}


@pytest.mark.parametrize("safe", [False, True, "both"], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano", "unireplknet_nano", "roadmap_nano"])
def test_network_round_trip(name: str, arguments: str, safe: Any, tmp_path: Path) -> None:
    given = ARGUMENTS[arguments]
    model = alive(name, **given)
    save_for_hf(model, str(tmp_path), safe_serialization=safe)
    again = _again(tmp_path)
    channels = given.get("in_chans", 3)
    assert_same_state(again.state_dict(), model.state_dict())
    assert torch.equal(_logits(again, channels), _logits(model, channels))
    assert again.num_classes == model.num_classes


@pytest.mark.parametrize("how", [widekernel.fold, reparameterize_model])
@pytest.mark.parametrize("name", NANO)
def test_folded_network_round_trip(name: str, how: Any, tmp_path: Path) -> None:
    model = how(alive(name, num_classes=4))
    save_for_hf(model, str(tmp_path))
    again = _again(tmp_path)
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(_logits(again), _logits(model))
    for folder in (tmp_path / "b",):
        save_for_hf(again, str(folder))
        assert torch.equal(_logits(_again(folder)), _logits(model))
    if name != "convnext_isotropic_nano":  # it has nothing to fold
        assert json.loads((tmp_path / "config.json").read_text())["model_args"]["folded"] is True


def test_other_classes_and_channels_for_what_was_saved(tmp_path: Path) -> None:
    model = alive("slak_nano", num_classes=10)
    save_for_hf(model, str(tmp_path))
    other = _again(tmp_path, num_classes=3, in_chans=1)
    assert other.head.fc.weight.shape == (3, 128)
    assert torch.equal(other.stages[0].blocks[0].norm.weight, model.stages[0].blocks[0].norm.weight)
    maps = _again(tmp_path, features_only=True).eval()(images())
    assert len(maps) == 4
    model.reset_classifier(6, "max")
    save_for_hf(model, str(tmp_path / "b"))
    assert torch.equal(_logits(_again(tmp_path / "b")), _logits(model))


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is the same; the files are downloaded."""
    model = widekernel.fold(alive("replknet_nano", num_classes=4))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    monkeypatch.setattr(_hub, "hf_hub_download", lambda repo_id, filename, **kwargs: str(tmp_path / filename))
    again = timm.create_model("hf-hub:someone/replknet", pretrained=True)
    assert torch.equal(_logits(again), _logits(model))


def test_networks_that_the_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"a compacted network .* timm's hub format cannot store it"):
        save_for_hf(compact(alive("slak_nano")), str(tmp_path / "a"))
    with pytest.raises(ValueError, match="'act_layer' is not serializable"):
        save_for_hf(create("slak_nano", act_layer=nn.SiLU), str(tmp_path / "b"))
    save_for_hf(alive("slak_nano"), str(tmp_path / "c"))
    with pytest.raises(CheckpointError, match="load the weights before folding the model"):
        _again(tmp_path / "c", folded=True)


def test_all_arguments_of_timms_factory(tmp_path: Path) -> None:
    state = alive("slak_nano").state_dict()
    torch.save(state, tmp_path / "a.pth")
    model = timm.create_model(
        "slak_nano",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "a.pth")},
        pretrained_strict=True,
        pretrained_model_args={"in_chans": 3},
        cache_dir=str(tmp_path),
        scriptable=False,
        exportable=True,
        no_jit=True,
        device="cpu",
        dtype=torch.float32,
    )
    assert_same_state(model.state_dict(), state)
    other = timm.create_model("slak_nano", checkpoint_path=str(tmp_path / "a.pth"))
    assert_same_state(other.state_dict(), state)
