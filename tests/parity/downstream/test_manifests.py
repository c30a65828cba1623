"""The keys of all official segmentation and detection files are those of our networks, in both directions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import widekernel
from tests.parity.downstream.networks import network
from tests.parity.downstream.reference import (
    images,
    manifest,
    manifest_names,
    official_file,
    weights,
)
from widekernel.models.layouts.conversion import to_native, to_official


@pytest.mark.parametrize("name", manifest_names())
def test_keys(name: str, shared: Path) -> None:
    described = manifest(shared, name)
    official = {key: torch.empty(shape, device="meta") for key, shape, *_ in described["keys"]}
    with torch.device("meta"):
        ours = network(described["config"])
    own = ours.state_dict()
    converted = to_native(ours, official)
    assert not converted.unknown
    assert {key: value.shape for key, value in converted.state.items()} == {key: value.shape for key, value in own.items()}
    back = to_official(ours)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in official.items()}
    ordered = described["config"]["type"] in ("EncoderDecoder", "FCOS")  # the box heads are defined in another order
    part = "" if ordered else "backbone."
    assert [key for key in back if key.startswith(part)] == [key for key in official if key.startswith(part)]
    assert sum(parameter.numel() for parameter in ours.parameters()) == described["n_params"]


MINI = [name for name in manifest_names() if name.endswith("_mini")]


@pytest.mark.parametrize("name", MINI)
def test_files(name: str, shared: Path, tmp_path: Path) -> None:
    """Every weight of an official file is used, and our file of it holds the same."""
    ours = network(manifest(shared, name)["config"])
    report = widekernel.load_checkpoint(ours, official_file(shared, tmp_path, name, seed=3))
    assert report.container == "state_dict"
    assert set(report.unused) == {"meta", "optimizer"}
    assert not (report.dropped or report.missing or report.ignored or report.generated)
    assert set(report.loaded) == set(ours.state_dict())
    saved = torch.load(widekernel.save_checkpoint(ours, tmp_path / "ours.pth", layout="official"), weights_only=True)
    assert set(saved) == {"meta", "state_dict"}
    official = weights(shared, name, seed=3)
    assert saved["state_dict"].keys() == official.keys()
    assert all(torch.equal(saved["state_dict"][key], value) for key, value in official.items())


def merged(ours: nn.Module, official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an official state dict with the merged kernels that deployment gives."""
    state = {key: value for key, value in official.items() if not re.search(r"\.(lkb_origin|small_conv)\.", key)}
    folded = widekernel.fold(ours)
    for name, layer in folded.named_modules():
        if name.endswith(".large_kernel"):
            prefix = f"{name.replace('.body.', '.')}.lkb_reparam"
            (state[f"{prefix}.weight"],), state[f"{prefix}.bias"] = layer.kernels, layer.bias
    return state


@pytest.mark.parametrize("name", [name for name in MINI if "replknet_mini" in name or "fcos" in name])
def test_merged_backbone(name: str, shared: Path, tmp_path: Path) -> None:
    """A deployed RepLKNet gives the same maps; convolutions of heads that have a bias are left alone."""
    config = manifest(shared, name)["config"]
    ours, other = network(config).eval(), network(config).eval()
    widekernel.load_checkpoint(ours, official_file(shared, tmp_path, name, seed=3))
    state = merged(ours, weights(shared, name, seed=3))
    torch.save({"state_dict": state}, tmp_path / "deployed.pth")
    report = widekernel.load_checkpoint(other, tmp_path / "deployed.pth")
    assert report.notes == ("5 merged kernels were put into the large branches, the small branches set to zero",)
    assert not (report.dropped or report.missing or report.ignored)
    x = images(shared, 3, [2, 3, 64, 96])
    with torch.no_grad():
        for a, b in zip(ours.backbone(x), other.backbone(x)):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    own = other.state_dict()
    assert all(torch.equal(own[key], value) for key, value in ours.state_dict().items() if not key.startswith("backbone."))
