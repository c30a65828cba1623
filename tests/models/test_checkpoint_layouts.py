"""Saving and loading in our layout and in the official ones, merged forms included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import widekernel
from tests.models.checkpoints import (
    TABLES,
    assert_content_refused,
    fuse_batch_norms,
    load_content,
    logits,
    merge_branches,
    state_of,
)
from tests.models.zoo import NANO, SMALL, alive, assert_near, assert_same_state, create
from tests.parity.reference import create as create_official
from tests.parity.reference import manifest
from widekernel.errors import CheckpointError
from widekernel.models.checkpoint import LoadReport

# Networks with official code, and the family that the report names.
OFFICIAL = {
    "replknet_nano": "RepLKNet",
    "replknet_nano_feature_norms": "RepLKNet",
    "slak_nano": "SLaK",
    "slak_nano_square": "SLaK",
    "slak_nano_without_bn": "SLaK",
    "slak_reg_nano": "SLaK_reg",
    "slak_pww_nano": "SLaK_pww",
    "shiftwise_nano": "ShiftWise_v2",
    "shiftwise_nano_without_ghosts": "ShiftWise_v2",
    "shiftwise_v1_nano": "ShiftWise_v1",
    "convnext_isotropic_nano": "isotropic ConvNeXt",
    "roadmap_nano": "ConvNeXt",
    "unireplknet_nano": "UniRepLKNet",
    "unireplknet_nano_every_kernel": "UniRepLKNet",
    "unireplknet_nano_without_large_kernels": "UniRepLKNet",
}


def _nothing_left_out(report: LoadReport, but: tuple[str, ...] = ()) -> bool:
    return not (report.dropped or report.ignored or set(report.missing) - set(but))


# ---- Our own layout


@pytest.mark.parametrize("name", SMALL)
def test_native_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    model, other = alive(name), create(name)
    path = widekernel.save_checkpoint(model, tmp_path / "new" / "folder" / "a.safetensors", metadata={"epoch": 3})
    report = widekernel.load_checkpoint(other, path)
    assert report.layout == "native"
    assert report.container == ""
    assert set(report.loaded) == set(model.state_dict())
    assert _nothing_left_out(report)
    assert_same_state(other.state_dict(), model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("name", NANO)
def test_folded_networks_round_trip(name: str, tmp_path: Path) -> None:
    folded = widekernel.fold(alive(name))
    other = widekernel.fold(create(name))
    widekernel.load_checkpoint(other, widekernel.save_checkpoint(folded, tmp_path / "a.safetensors"))
    assert torch.equal(logits(other), logits(folded))


# ---- Official layouts


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    model, other = alive(name), create(name)
    path = widekernel.save_checkpoint(model, tmp_path / "a.pth", layout="official")
    report = widekernel.load_checkpoint(other, path)
    assert report.layout == OFFICIAL[name]
    assert report.container == "model"
    assert _nothing_left_out(report)
    assert set(report.loaded) | set(report.generated) == set(model.state_dict())
    assert all(key.endswith(TABLES) for key in report.generated)
    assert bool(report.generated) == name.startswith("shiftwise")
    assert_same_state(other.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "slak_mini",
        "slak_reg_mini",
        "slak_pww_mini",
        "replknet_mini",
        "shiftwise_v1_mini",
        "shiftwise_v2_mini",
        "convnext_mini",
        "unireplknet_mini",
        "unireplknet_mini_kernels",
        "unireplknet_mini_nols",
    ],
)
def test_official_files_have_the_official_keys(name: str, shared: Path, tmp_path: Path) -> None:
    description = manifest(shared, name)
    model = create_official(description)
    state = state_of(model, tmp_path, "official")
    ours = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()]
    assert sorted(ours) == sorted(description["keys"])
    # In the same order: the official conversion of SLaK to SLaK_reg pairs weights by their position.
    assert [key for key, *_ in ours] == [key for key, *_ in description["keys"]]


@pytest.mark.parametrize("name", ["slak_pw_nano", "roadmap_05_inverted_small"])
def test_networks_without_official_code_have_no_official_layout(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no official layout here.*layout='native'"):
        widekernel.save_checkpoint(create(name), tmp_path / "a.pth", layout="official")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [{}, {"kernel_sizes": (13, 11, 9, 7), "small_kernel": 5}, {"bn": False}, {"kernel_sizes": (21, 15, 9, 9)}],
    ids=["nano", "other_kernels", "without_bn", "divisible"],
)
def test_strips_are_cut_into_tiles(arguments: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = alive("slak_nano", **arguments), create("slak_reg_nano", **arguments)
    path = widekernel.save_checkpoint(model, tmp_path / "a.pth", layout="official")
    report = widekernel.load_checkpoint(other, path)
    assert report.layout == "SLaK"
    assert _nothing_left_out(report)
    assert len(report.notes) == 1
    assert report.notes[0].startswith("cut 10 strips into")
    assert_near(logits(other), logits(model))


@pytest.mark.parametrize("arguments", [{}, {"small_kernel": 0}], ids=["two_branches", "one_branch"])
@pytest.mark.parametrize("deep", [False, True], ids=["merged", "deeply_fused"])
def test_merged_replknet(arguments: dict[str, Any], deep: bool, tmp_path: Path) -> None:
    model, other = alive("replknet_nano", **arguments), alive("replknet_nano", **arguments)
    state = state_of(model, tmp_path, "official")
    merge_branches(state)
    if deep:
        fuse_batch_norms(state)
    report = load_content(other, tmp_path, {"model": state})
    assert report.layout == "RepLKNet"
    assert _nothing_left_out(report)
    assert "5 merged kernels were put into the large branches" in report.notes[0]
    assert ("fused norms were put back" in report.notes[0]) == deep
    assert_near(logits(other), logits(model))


def test_merged_files_in_networks_with_another_eps(tmp_path: Path) -> None:
    """The variance of a norm that only adds a bias depends on its `eps`."""
    model, other = alive("replknet_nano"), alive("replknet_nano")
    state = state_of(model, tmp_path, "official")
    merge_branches(state)
    fuse_batch_norms(state)
    norms = [module for module in other.stages.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eps = 1e-2
    load_content(other, tmp_path, {"model": state})
    passing = [norm for norm in norms if norm.running_var.sub(1 - 1e-2).abs().max() < 1e-6]
    assert len(passing) > len(norms) / 2
    for norm in set(norms) - set(passing):  # those before a convolution are in no file merged
        norm.eps = 1e-5
    for norm in (module for module in other.stem.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.running_var.sub(1 - 1e-5).abs().max() < 1e-6
    assert_near(logits(other), logits(model))


@pytest.mark.parametrize("name", ["shiftwise_nano", "shiftwise_v1_nano"])
def test_merged_shiftwise(name: str, tmp_path: Path) -> None:
    model, other = alive(name), alive(name)
    state = state_of(model, tmp_path, "official")
    for key in [key for key in state if key.endswith("LoRAs.0.weight")]:
        tiles = [state.pop(key), state.pop(key.replace("LoRAs.0", "LoRAs.1"))]
        state[key.replace("LoRAs.0", "LoRA")] = tiles[0] + tiles[1]
    report = load_content(other, tmp_path, {"model": state})
    assert _nothing_left_out(report)
    assert "5 merged tile sets" in report.notes[0]
    assert_near(logits(other), logits(model))


@pytest.mark.parametrize("small", [3, 7, 0], ids=["small_kernel", "small_kernel_in_some_stages", "one_kernel"])
def test_merged_slak_without_strips(small: int, tmp_path: Path) -> None:
    arguments = {"decomposed": False, "small_kernel": small}
    model, other = (alive("slak_nano", **arguments) for _ in range(2))
    state = state_of(model, tmp_path, "official")
    assert merge_branches(state) == 5
    assert not [key for key in state if "small_conv" in key or "lkb_origin" in key]
    report = load_content(other, tmp_path, {"model": state})
    assert report.layout == "SLaK"
    assert "5 merged kernels were put into the large branches" in report.notes[0]
    assert _nothing_left_out(report)
    assert_near(logits(other), logits(model))


# ---- ConvNeXt, timm's and official


def _convnext() -> nn.Module:
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_((0.0 if key.endswith("bias") else 1.0) + 0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("source", ["timm's ConvNeXt", "ConvNeXt"])
def test_last_roadmap_step_is_convnext(source: str, tmp_path: Path) -> None:
    model, last = _convnext(), timm.create_model("roadmap_13_convnext_t", depths=(1, 1, 1, 1))
    state = model.state_dict() if source == "timm's ConvNeXt" else state_of(model, tmp_path, "official")
    report = load_content(last, tmp_path, {"model": state})
    assert report.layout == source
    assert _nothing_left_out(report)
    assert_near(logits(last), logits(model))


def test_official_weights_in_timms_convnext(tmp_path: Path) -> None:
    model, other = _convnext(), timm.create_model("convnext_tiny", depths=(1, 1, 1, 1))
    state = state_of(model, tmp_path, "official")
    assert "downsample_layers.0.0.weight" in state
    assert "stages.0.0.dwconv.weight" in state
    assert _nothing_left_out(load_content(other, tmp_path, {"model": state}))
    assert_same_state(other.state_dict(), model.state_dict())


# ---- One weight twice


def test_one_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    """Some of our names are also the authors' names, so a file may mix both."""
    model = alive("replknet_nano")
    state = state_of(model, tmp_path, "official")
    official, native = "large_kernel.lkb_origin.conv.weight", "large_kernel.source.kernels.0"
    prefix = "stages.0.blocks.0."
    message = f"holds one weight twice, as {prefix}{official} and as {prefix}{native}: remove one"
    assert_content_refused(model, tmp_path, {**state, prefix + native: torch.ones(16, 1, 31, 31)}, message)


MERGED = {
    "slak_nano_square": ("stages.0.0.large_kernel", "lkb_reparam", "lkb_origin.conv.weight", (16, 1, 31, 31)),
    "replknet_nano": ("stages.0.blocks.0.large_kernel", "lkb_reparam", "lkb_origin.conv.weight", (16, 1, 31, 31)),
    "shiftwise_nano": ("stages.0.0.large_kernel", "LoRA", "LoRAs.0.weight", (132, 1, 3, 3)),
}


@pytest.mark.parametrize("merged_first", [False, True])
@pytest.mark.parametrize("name", MERGED)
def test_merged_and_separate_kernels_in_one_file_are_refused(name: str, merged_first: bool, tmp_path: Path) -> None:
    layer, merged, separate, shape = MERGED[name]
    model = alive(name)
    state, more = state_of(model, tmp_path, "official"), {f"{layer}.{merged}.weight": torch.ones(shape)}
    if merged == "lkb_reparam":
        more[f"{layer}.{merged}.bias"] = torch.ones(shape[0])
    message = rf"holds weights twice, in two forms: remove one of {layer}\.{separate}"
    assert_content_refused(model, tmp_path, {**more, **state} if merged_first else {**state, **more}, message)


# ---- Folded networks


# UniRepLKNet's official code has a merged form, and the other two have nothing to fold or no official code.
WITHOUT_MERGED = [name for name in NANO if name not in ("slak_pw_nano", "convnext_isotropic_nano", "unireplknet_nano")]


@pytest.mark.parametrize("features_only", [False, True], ids=["network", "features"])
@pytest.mark.parametrize("name", WITHOUT_MERGED)
def test_folded_networks_have_no_official_form(name: str, features_only: bool, tmp_path: Path) -> None:
    """This is true even if only the layer scale was folded and every name has a counterpart."""
    folded = widekernel.fold(alive(name, features_only=features_only))
    for copied in (folded, copy.deepcopy(folded)):
        with pytest.raises(CheckpointError, match=r"is folded and has no place in an official layout: .*layout='native'"):
            widekernel.save_checkpoint(copied, tmp_path / "a.pth", layout="official")
    assert not list(tmp_path.iterdir())
    assert widekernel.save_checkpoint(folded, tmp_path / "a.safetensors").exists()


def test_merged_form_of_unireplknet(tmp_path: Path) -> None:
    """The folded network is saved in the official merged layout, which loads into both forms."""
    model = alive("unireplknet_nano_every_kernel")
    folded = widekernel.fold(model)
    path = widekernel.save_checkpoint(folded, tmp_path / "a.pth", layout="official")
    again, plain = widekernel.fold(create("unireplknet_nano_every_kernel")), create("unireplknet_nano_every_kernel").eval()
    report = widekernel.load_checkpoint(again, path)
    assert report.layout == "a merged UniRepLKNet" and all(key.endswith("anchor_table") for key in report.generated)
    assert_same_state(again.state_dict(), folded.state_dict())
    assert widekernel.load_checkpoint(plain, path).notes
    assert_near(logits(plain), logits(model))


def test_official_files_do_not_go_into_folded_networks(tmp_path: Path) -> None:
    state = state_of(alive("roadmap_nano"), tmp_path, "official")
    assert_content_refused(
        widekernel.fold(alive("roadmap_nano")), tmp_path, {"model": state}, "does not fit: the checkpoint holds ConvNeXt"
    )
