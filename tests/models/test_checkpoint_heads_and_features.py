"""Checkpoints of networks with other heads, of feature extractors, and loaded by timm itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import widekernel
from tests.models.checkpoints import both_layouts, load_content, save_as, state_of
from tests.models.zoo import NANO, alive, assert_same_state, create, images, snapshot
from widekernel.errors import CheckpointError
from widekernel.models.checkpoint import reader

WITH_OFFICIAL = [name for name in NANO if name != "slak_pw_nano"]
every_family = pytest.mark.parametrize("name", NANO)


def _maps(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return model.eval()(images())


# ---- Other classes


@both_layouts
@pytest.mark.parametrize("name", WITH_OFFICIAL)
def test_classifier_for_other_classes_is_left_out_and_named(name: str, layout: str, tmp_path: Path) -> None:
    model, other = alive(name), alive(name, num_classes=7)
    before, path = snapshot(other), save_as(model, tmp_path, layout)
    head = "head" if layout == "official" else "head.fc"
    with pytest.warns(UserWarning, match="for 1000 classes, the network has 7; the classifier is untrained") as warned:
        report = widekernel.load_checkpoint(other, path)
    assert set(report.dropped) == {f"{head}.weight", f"{head}.bias"}
    assert all(key in str(report) and key in str(warned[0].message) for key in report.dropped)
    assert not report.missing
    for key, value in other.state_dict().items():
        assert torch.equal(value, (before if key.startswith("head.fc.") else model.state_dict())[key]), key


@pytest.mark.parametrize(
    ("name", "args", "head"),
    [
        ("resnet18", {"stem_width": 8, "channels": (8, 8, 8, 8)}, "fc"),
        ("convnext_atto", {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}, "head.fc"),
        ("deit_tiny_distilled_patch16_224", {"embed_dim": 24, "depth": 1}, "head"),
        ("mobilenetv2_050", {}, "classifier"),
    ],
)
def test_classifier_of_a_network_of_timm_is_left_out_whatever_its_name(
    name: str, args: dict[str, Any], head: str, tmp_path: Path
) -> None:
    model, other = (timm.create_model(name, num_classes=classes, **args) for classes in (10, 7))
    before, path = snapshot(other), tmp_path / "file.pth"
    torch.save(model.state_dict(), path)
    with pytest.warns(UserWarning, match="7.*the classifier is untrained"):
        report = widekernel.load_checkpoint(other, path)
    assert {f"{head}.weight", f"{head}.bias"} <= set(report.dropped)
    assert not report.missing
    for key, value in other.state_dict().items():
        assert torch.equal(value, (before if key in report.dropped else model.state_dict())[key]), key


@every_family
def test_network_without_classifier_needs_none(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, other = alive(name), alive(name, num_classes=0)
    report = widekernel.load_checkpoint(other, save_as(model, tmp_path, "native"))
    assert set(report.dropped) == {"head.fc.weight", "head.fc.bias"}
    assert not [warning for warning in recwarn if "untrained" in str(warning.message)]
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
        assert torch.equal(other(images()), pooled)


# ---- Feature extractors


@both_layouts
@pytest.mark.parametrize("name", WITH_OFFICIAL)
def test_feature_extractors_load(name: str, layout: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, extractor = alive(name), alive(name, features_only=True)
    report = widekernel.load_checkpoint(extractor, save_as(model, tmp_path, layout))
    assert not report.missing
    assert not report.ignored
    assert not [warning for warning in recwarn if "untrained" in str(warning.message)]
    with torch.no_grad():
        indices = list(extractor.out_indices)
        expected = model.forward_intermediates(images(), indices=indices, intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(_maps(extractor), expected))


@both_layouts
@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano", "convnext_isotropic_nano"])
def test_shortened_extractors_ignore_the_later_stages(name: str, layout: str, tmp_path: Path) -> None:
    model, extractor = alive(name), alive(name, features_only=True, out_indices=(0, 1))
    path = save_as(model, tmp_path, layout)
    report = widekernel.load_checkpoint(extractor, path)
    assert report.ignored
    assert len(report.ignored) + len(report.dropped) + len(report.loaded) == len(reader.read_checkpoint(path).state)
    with torch.no_grad():
        expected = model.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(_maps(extractor), expected))


@both_layouts
@pytest.mark.parametrize("name", WITH_OFFICIAL)
def test_feature_extractors_round_trip(name: str, layout: str, tmp_path: Path) -> None:
    extractor, other = alive(name, features_only=True), create(name, features_only=True)
    report = widekernel.load_checkpoint(other, save_as(extractor, tmp_path, layout))
    assert not report.dropped
    assert_same_state(other.state_dict(), extractor.state_dict())


def test_saved_feature_extractor_loads_as_a_backbone(tmp_path: Path) -> None:
    extractor, model = alive("slak_nano", features_only=True), alive("slak_nano")
    report = widekernel.load_checkpoint(model, save_as(extractor, tmp_path, "native"))
    assert set(report.missing) == {"head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}
    torch.save(extractor.state_dict(), tmp_path / "plain.pth")
    assert widekernel.load_checkpoint(model, tmp_path / "plain.pth").notes == ("removed the prefix 'model.'",)


def test_extractors_refuse_other_networks(tmp_path: Path) -> None:
    extractor = alive("slak_nano", features_only=True)
    before = snapshot(extractor)
    with pytest.raises(CheckpointError, match="holds widekernel's RepLKNet, but the model is a SLaK"):
        widekernel.load_checkpoint(extractor, save_as(create("replknet_nano"), tmp_path, "native"))
    assert_same_state(extractor.state_dict(), before)


# ---- timm.create_model(pretrained=True)


def _from_timm(name: str, path: Path, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


@pytest.mark.parametrize("name", WITH_OFFICIAL)
def test_timm_loads_official_files(name: str, tmp_path: Path) -> None:
    model = alive(name)
    path = save_as(model, tmp_path, "official")
    assert_same_state(_from_timm(name, path).state_dict(), model.state_dict())
    maps = _maps(_from_timm(name, path, features_only=True, out_indices=(0, 2)))
    with torch.no_grad():
        expected = model.forward_intermediates(images(), indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected))


@every_family
def test_timm_loads_our_files(name: str, tmp_path: Path) -> None:
    model = alive(name)
    assert_same_state(_from_timm(name, save_as(model, tmp_path, "native")).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano"])
def test_timm_adapts_classes_and_channels(name: str, tmp_path: Path) -> None:
    model = alive(name)
    adapted = _from_timm(name, save_as(model, tmp_path, "official"), num_classes=5, in_chans=1)
    first = f"{model.default_cfg['first_conv']}.weight"
    ours, theirs = adapted.state_dict(), model.state_dict()
    torch.testing.assert_close(ours[first], theirs[first].sum(1, keepdim=True))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != first and not key.startswith("head.fc."))
    assert ours["head.fc.weight"].shape == (5, 128)


@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano"])
def test_timm_names_unknown_keys(name: str, tmp_path: Path) -> None:
    path = save_as(alive(name), tmp_path, "official")
    state = torch.load(path, weights_only=True)["model"]
    torch.save({"model": {**state, "surplus.weight": torch.ones(1)}}, path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surplus\.weight"):
        _from_timm(name, path)
    del state["head.bias"]
    torch.save({"model": state}, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.fc\.bias"):
        _from_timm(name, path)
    with pytest.raises(CheckpointError, match="create the matching model"):
        _from_timm("slak_pww_nano", path)


@both_layouts
@pytest.mark.parametrize("indices", [(0, 1), (1, 3), (2,)], ids=str)
def test_norms_of_unused_feature_maps_are_ignored(indices: tuple[int, ...], layout: str, tmp_path: Path) -> None:
    name = "replknet_nano_feature_norms"
    model, extractor = alive(name), create(name, features_only=True, out_indices=indices)
    state = state_of(model, tmp_path, layout)
    report = load_content(extractor, tmp_path, state)
    norm = "feature_norms.{}.weight" if layout == "native" else "stages.{}.norm.weight"
    for i in range(4):
        assert (norm.format(i) in report.ignored) == (i not in indices)
    with torch.no_grad():
        want = model.forward_intermediates(images(), indices=list(indices), intermediates_only=True)
        got = extractor.eval()(images())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
