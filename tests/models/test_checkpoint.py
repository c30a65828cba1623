"""Saving and loading: our layout, the official ones, and everything that wrappers and scripts do to a file."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import widekernel
from tests.models.zoo import NANO, SMALL, alive, assert_near, assert_same_state, create, images, snapshot
from tests.parity.reference import create as create_official
from tests.parity.reference import manifest
from widekernel.errors import CheckpointError
from widekernel.models.checkpoint import LoadReport

# Networks of which there is official code, and the family that a report names.
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
}
MANIFESTS = ["convnext_mini", "replknet_mini", "shiftwise_v1_mini", "shiftwise_v2_mini"]
MANIFESTS += ["slak_mini", "slak_reg_mini", "slak_pww_mini"]
TABLES = ("tile_at", "centre", "selected", "ghosts")


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images())


def _official_state(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    path = widekernel.save_checkpoint(model, folder / "official.pth", layout="official")
    return torch.load(path, weights_only=True)["model"]


def _load(model: nn.Module, folder: Path, content: Any, **kwargs: Any) -> LoadReport:
    torch.save(content, folder / "file.pth")
    return widekernel.load_checkpoint(model, folder / "file.pth", **kwargs)


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
    assert torch.equal(_logits(other), _logits(model))
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("name", ["shiftwise_nano", "shiftwise_v1_nano", "slak_pw_nano", "slak_pw_nano_truncated"])
def test_altered_tables_come_back(name: str, tmp_path: Path) -> None:
    model, other = alive(name), create(name)
    before = _logits(model)
    for key, value in model.state_dict().items():
        if key.endswith(("tile_at", "centre")):
            value.copy_(value.flip(-1).clone())
    altered = _logits(model)
    assert not torch.allclose(altered, before)
    widekernel.load_checkpoint(other, widekernel.save_checkpoint(model, tmp_path / "a.safetensors"))
    assert_same_state(other.state_dict(), model.state_dict())
    assert torch.equal(_logits(other), altered)


@pytest.mark.parametrize("name", NANO)
def test_folded_networks_have_files_too(name: str, tmp_path: Path) -> None:
    folded = widekernel.fold(alive(name))
    other = widekernel.fold(create(name))
    widekernel.load_checkpoint(other, widekernel.save_checkpoint(folded, tmp_path / "a.safetensors"))
    assert torch.equal(_logits(other), _logits(folded))


def test_saving_does_not_touch_the_model(tmp_path: Path) -> None:
    model = alive("slak_nano").train()
    before = snapshot(model)
    widekernel.save_checkpoint(model, tmp_path / "a.safetensors")
    widekernel.save_checkpoint(model, tmp_path / "a.pt", layout="official")
    assert_same_state(model.state_dict(), before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_are_not_numbers_are_kept(tmp_path: Path) -> None:
    """A diverged network loads as it was saved; whoever evaluates it sees what happened."""
    model, other = alive("slak_nano"), create("slak_nano")
    with torch.no_grad():
        model.head.fc.weight[0, 0] = float("nan")
        model.head.fc.weight[1, 0] = float("inf")
    for path, layout in ((tmp_path / "a.safetensors", "native"), (tmp_path / "a.pth", "official")):
        widekernel.load_checkpoint(other, widekernel.save_checkpoint(model, path, layout=layout))
        assert_same_state(other.state_dict(), model.state_dict())
        assert not _logits(other).isfinite().all()


def test_half_precision_files_fill_a_single_precision_network(tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    _load(other, tmp_path, half)
    assert other.head.fc.weight.dtype is torch.float32
    assert torch.equal(other.head.fc.weight, half["head.fc.weight"].float())


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
    ],
)
def test_official_files_have_the_official_keys(name: str, shared: Path, tmp_path: Path) -> None:
    description = manifest(shared, name)
    model = create_official(description)
    state = _official_state(model, tmp_path)
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
    assert_near(_logits(other), _logits(model))


def _affine(state: dict[str, torch.Tensor], bn: str) -> tuple[torch.Tensor, torch.Tensor]:
    scale = state.pop(f"{bn}.weight") / (state.pop(f"{bn}.running_var") + 1e-5).sqrt()
    shift = state.pop(f"{bn}.bias") - state.pop(f"{bn}.running_mean") * scale
    del state[f"{bn}.num_batches_tracked"]
    return scale, shift


def _merge(state: dict[str, torch.Tensor]) -> None:
    """As the authors' structural_reparam: one kernel with a bias out of both branches."""
    for key in [key for key in state if key.endswith("large_kernel.lkb_origin.conv.weight")]:
        layer = key.removesuffix(".lkb_origin.conv.weight")
        scale, bias = _affine(state, f"{layer}.lkb_origin.bn")
        kernel = state.pop(key) * scale.view(-1, 1, 1, 1)
        if f"{layer}.small_conv.conv.weight" in state:
            scale, shift = _affine(state, f"{layer}.small_conv.bn")
            small = state.pop(f"{layer}.small_conv.conv.weight") * scale.view(-1, 1, 1, 1)
            margin = (kernel.shape[-1] - small.shape[-1]) // 2
            kernel, bias = kernel + nn.functional.pad(small, [margin] * 4), bias + shift
        state[f"{layer}.lkb_reparam.weight"], state[f"{layer}.lkb_reparam.bias"] = kernel, bias


def _fuse(state: dict[str, torch.Tensor]) -> None:
    """As the authors' deep_fuse_BN: every batch norm right after a convolution."""
    for key in [key for key in state if key.endswith(".conv.weight")]:
        prefix = key.removesuffix(".conv.weight")
        scale, state[f"{prefix}.conv.bias"] = _affine(state, f"{prefix}.bn")
        state[key] = state[key] * scale.view(-1, 1, 1, 1)


@pytest.mark.parametrize("arguments", [{}, {"small_kernel": 0}], ids=["two_branches", "one_branch"])
@pytest.mark.parametrize("deep", [False, True], ids=["merged", "deeply_fused"])
def test_merged_replknet(arguments: dict[str, Any], deep: bool, tmp_path: Path) -> None:
    model, other = alive("replknet_nano", **arguments), alive("replknet_nano", **arguments)
    state = _official_state(model, tmp_path)
    _merge(state)
    if deep:
        _fuse(state)
    report = _load(other, tmp_path, {"model": state})
    assert report.layout == "RepLKNet"
    assert _nothing_left_out(report)
    assert "5 merged kernels were put into the large branches" in report.notes[0]
    assert ("fused norms were put back" in report.notes[0]) == deep
    assert_near(_logits(other), _logits(model))


def test_merged_files_in_networks_with_another_eps(tmp_path: Path) -> None:
    """The norm that is to pass everything on has to know what it adds to the variance."""
    model, other = alive("replknet_nano"), alive("replknet_nano")
    state = _official_state(model, tmp_path)
    _merge(state)
    _fuse(state)
    norms = [module for module in other.stages.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eps = 1e-2
    _load(other, tmp_path, {"model": state})
    passing = [norm for norm in norms if norm.running_var.sub(1 - 1e-2).abs().max() < 1e-6]
    assert len(passing) > len(norms) / 2
    for norm in set(norms) - set(passing):  # those before a convolution are in no file merged
        norm.eps = 1e-5
    for norm in (module for module in other.stem.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.running_var.sub(1 - 1e-5).abs().max() < 1e-6
    assert_near(_logits(other), _logits(model))


@pytest.mark.parametrize("name", ["shiftwise_nano", "shiftwise_v1_nano"])
def test_merged_shiftwise(name: str, tmp_path: Path) -> None:
    model, other = alive(name), alive(name)
    state = _official_state(model, tmp_path)
    for key in [key for key in state if key.endswith("LoRAs.0.weight")]:
        tiles = [state.pop(key), state.pop(key.replace("LoRAs.0", "LoRAs.1"))]
        state[key.replace("LoRAs.0", "LoRA")] = tiles[0] + tiles[1]
    report = _load(other, tmp_path, {"model": state})
    assert _nothing_left_out(report)
    assert "5 merged tile sets" in report.notes[0]
    assert_near(_logits(other), _logits(model))


# ---- ConvNeXt, timm's and official


def _convnext() -> nn.Module:
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_((0.0 if key.endswith("bias") else 1.0) + 0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("source", ["timm's ConvNeXt", "ConvNeXt"])
def test_the_end_of_the_road_is_convnext(source: str, tmp_path: Path) -> None:
    model, last = _convnext(), timm.create_model("roadmap_13_convnext_t", depths=(1, 1, 1, 1))
    state = model.state_dict() if source == "timm's ConvNeXt" else _official_state(model, tmp_path)
    report = _load(last, tmp_path, {"model": state})
    assert report.layout == source
    assert _nothing_left_out(report)
    assert_near(_logits(last), _logits(model))


def test_official_weights_in_timms_convnext(tmp_path: Path) -> None:
    model, other = _convnext(), timm.create_model("convnext_tiny", depths=(1, 1, 1, 1))
    state = _official_state(model, tmp_path)
    assert "downsample_layers.0.0.weight" in state
    assert "stages.0.0.dwconv.weight" in state
    assert _nothing_left_out(_load(other, tmp_path, {"model": state}))
    assert_same_state(other.state_dict(), model.state_dict())


# ---- Containers and wrappers


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("layout", ["native", "official"])
def test_prefixes_of_wrappers(prefix: str, layout: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    state = model.state_dict() if layout == "native" else _official_state(model, tmp_path)
    report = _load(other, tmp_path, {"model": OrderedDict((prefix + key, value) for key, value in state.items())})
    assert_same_state(other.state_dict(), model.state_dict())
    removed = [note for note in report.notes if note.startswith("removed the prefix")]
    assert len(removed) == prefix.count(".")


@pytest.mark.parametrize("container", ["model", "state_dict", "module", "model_state", None])
def test_containers(container: str | None, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    state = _official_state(model, tmp_path)
    content = {container: state, "epoch": 7, "optimizer": {"state": {}}} if container else state
    report = _load(other, tmp_path, content)
    assert report.container == (container or "")
    assert_same_state(other.state_dict(), model.state_dict())


def test_a_container_within_a_container(tmp_path: Path) -> None:
    model, other = alive("replknet_nano"), create("replknet_nano")
    report = _load(other, tmp_path, {"model": {"state_dict": _official_state(model, tmp_path)}, "epoch": 1})
    assert report.container == "model.state_dict"
    assert_same_state(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema"])
def test_averaged_weights(key: str, tmp_path: Path) -> None:
    live, averaged = alive("slak_nano"), alive("slak_nano")
    content = {"model": _official_state(live, tmp_path), key: _official_state(averaged, tmp_path)}
    other = create("slak_nano")
    assert _load(other, tmp_path, content, weights="ema").container == key
    assert_same_state(other.state_dict(), averaged.state_dict())
    assert _load(other, tmp_path, content).container == "model"
    assert_same_state(other.state_dict(), live.state_dict())


@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano"])
def test_backbone_of_a_larger_network(name: str, tmp_path: Path) -> None:
    model, other = alive(name), alive(name)
    before = snapshot(other)
    state = {
        f"backbone.{key}": value
        for key, value in _official_state(model, tmp_path).items()
        if not key.startswith(("head.", "norm."))
    }
    foreign = {"backbone.norm0.weight": torch.ones(16), "decode_head.conv.weight": torch.ones(3), "neck.bias": torch.ones(2)}
    report = _load(other, tmp_path, {"meta": {}, "state_dict": {**state, **foreign}})
    assert set(report.ignored) == {"norm0.weight", "decode_head.conv.weight", "neck.bias"}
    assert report.missing
    assert all(key.startswith(("head.", "norm_pre.")) for key in report.missing)
    for key, value in other.state_dict().items():
        expected = before if key in report.missing else model.state_dict()
        assert torch.equal(value, expected[key]), key
    assert all(key in str(report) for key in foreign if not key.startswith("backbone."))
