"""Synthetic files in every published layout and container load by name, through the cache."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

import widekernel
from tests.parity.reference import create, manifest, weights
from widekernel.models.checkpoint import LoadReport

State = dict[str, Tensor]
MMENGINE = {"meta": {"epoch": 300, "mmcls_version": "1.0.0", "CLASSES": ("a", "b")}, "message_hub": None}
TRAINING = {
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
    "epoch": 299,
    "args": argparse.Namespace(model="SLaK_tiny"),
}


def put(cache: Path, name: str, content: Any) -> None:
    """Put a file into the cache as if it had been fetched by hand."""
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(content, cache / f"{name}.pth")


def load(model: nn.Module, name: str) -> LoadReport:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return widekernel.load_checkpoint(model, name)


def official(shared: Path, name: str) -> tuple[nn.Module, State]:
    """Return one of our networks, and official weights for it."""
    description = manifest(shared, name)
    return create(description).eval(), weights(shared, description["keys"], 0)


def saved(model: nn.Module, folder: Path) -> State:
    return torch.load(widekernel.save_checkpoint(model, folder / "out.pth", layout="official"), weights_only=True)["model"]


def assert_same(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def classifiers() -> Iterator[Any]:
    """Yield every layout in every container; each layout in one of them is a quick test."""
    quick = {"replknet_mini": "bare", "slak_mini": "training", "shiftwise_v2_mini": "model", "convnext_mini": "model"}
    quick["unireplknet_mini"] = "bare"
    for name, mini, layout in (
        ("replknet_31b.in22k_ft_in1k_384", "replknet_mini", "RepLKNet"),
        ("slak_tiny.in1k_224", "slak_mini", "SLaK"),
        ("shiftwise_tiny.in1k_224", "shiftwise_v2_mini", "ShiftWise_v2"),
        ("convnext_tiny.fb_in1k", "convnext_mini", "ConvNeXt"),
        ("unireplknet_t.in1k_224", "unireplknet_mini", "UniRepLKNet"),
    ):
        for container in ("bare", "model", "training"):
            marks = [] if quick[mini] == container else [pytest.mark.slow]
            yield pytest.param(name, mini, layout, container, marks=marks)


@pytest.mark.parametrize(("name", "mini", "layout", "container"), list(classifiers()))
def test_classifiers(name: str, mini: str, layout: str, container: str, shared: Path, cache: Path, tmp_path: Path) -> None:
    model, state = official(shared, mini)
    put(cache, name, {"bare": state, "model": {"model": state}, "training": {"model": state, **TRAINING}}[container])
    report = load(model, name)
    assert (report.layout, report.container) == (layout, "" if container == "bare" else "model")
    assert not (report.dropped or report.missing or report.ignored)
    if layout != "ConvNeXt":
        assert_same(saved(model, tmp_path), state)


def from_openmmlab(state: State) -> State:
    """Rename official weights of RepLKNet as in OpenMMLab's copies."""
    prefixes = {"norm.": "backbone.stages.3.norm.", "head.": "head.fc."}
    out = {}
    for key, value in state.items():
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        out[prefixes.get(old, "backbone.") + key.removeprefix(old)] = value
    return out


@pytest.mark.parametrize("small_kernel", [5, pytest.param(0, marks=pytest.mark.slow)])
def test_openmmlab(small_kernel: int, shared: Path, cache: Path, tmp_path: Path) -> None:
    description = manifest(shared, "replknet_mini")
    description["kwargs"]["small_kernel"] = small_kernel or None  # XL has none
    model = create(description).eval()
    keys = [row for row in description["keys"] if small_kernel or ".small_conv." not in row[0]]
    state = weights(shared, keys, 0)
    put(cache, "replknet_31b.in1k_224", {"state_dict": from_openmmlab(state), **MMENGINE})
    report = load(model, "replknet_31b.in1k_224")
    assert (report.layout, report.container) == ("RepLKNet", "state_dict")
    assert report.notes == ("renamed the weights of OpenMMLab's RepLKNet classifier",)
    assert not (report.dropped or report.missing or report.ignored)
    assert_same(saved(model, tmp_path), state)


def test_slak_as_tiles(shared: Path, cache: Path) -> None:
    description = manifest(shared, "slak_mini")
    state = weights(shared, description["keys"], 0)
    strips, tiles = create(description).eval(), create({**description, "constructor": "SLaK_reg"}).eval()
    for model, name in ((strips, "slak_tiny.in1k_224"), (tiles, "slak_reg_tiny.in1k_224")):
        put(cache, name, {"model": state})
        assert load(model, name).layout == "SLaK"
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(tiles(x), strips(x))


def test_undecomposed_slak(shared: Path, cache: Path, tmp_path: Path) -> None:
    """The students of the distillation have kernels of 7; here they are narrower."""
    keys = manifest(shared, "slak_tiny_convnext7")["keys"]
    model = timm.create_model(
        "slak_tiny.l2s_in1k_224", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5, drop_path_rate=0.0
    )
    ours = saved(model, tmp_path)
    first_blocks = [key for key, _, _ in keys if not any(f".{j}." in key[8:11] for j in range(1, 9)) or "stages" not in key]
    assert list(ours) == first_blocks
    state = {key: torch.randn(value.shape).to(value.dtype) for key, value in ours.items()}
    put(cache, "slak_tiny.l2s_in1k_224", {"model": state})
    assert load(model, "slak_tiny.l2s_in1k_224").layout == "SLaK"
    assert_same(saved(model, tmp_path), state)


@pytest.mark.parametrize("layer_scale", [0.0, 1e-6])
def test_isotropic(layer_scale: float, cache: Path, tmp_path: Path) -> None:
    """Whether the published files have a layer scale is seen in their keys."""
    small: dict[str, Any] = {"depth": 2, "dim": 16}
    model = timm.create_model("convnext_isotropic_base", layer_scale=layer_scale, **small)
    state = saved(model, tmp_path)
    assert any("gamma" in key for key in state) == (layer_scale > 0)
    put(cache, "convnext_isotropic_base.in1k_224", {"model": state})
    for name in ("convnext_isotropic_base", "convnext_isotropic_base.in1k_224"):
        loaded = timm.create_model(name, pretrained=True, **small)
        assert_same(saved(loaded, tmp_path), state)
        assert loaded.cfg.layer_scale == layer_scale
    assert load(model, "convnext_isotropic_base.in1k_224").layout == "isotropic ConvNeXt"


def torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig

    following = {8: 16, 16: 32, 32: 64, 64: None}
    setting = [CNBlockConfig(width, after, 2 if width == 32 else 1) for width, after in following.items()]
    model = torchvision.models.ConvNeXt(setting, num_classes=10).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("name", ["convnext_tiny", pytest.param("roadmap_13_convnext_t", marks=pytest.mark.slow)])
def test_torchvision_convnext(name: str, cache: Path) -> None:
    theirs = torchvision_convnext()
    put(cache, "convnext_tiny.tv_in1k", theirs.state_dict())
    size = {"dims": (8, 16, 32, 64)} if name == "convnext_tiny" else {"width": 8}
    model = timm.create_model(name, depths=(1, 1, 2, 1), num_classes=10, **size).eval()
    assert load(model, "convnext_tiny.tv_in1k").layout == "torchvision's ConvNeXt"
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x))


@pytest.mark.slow
def test_torchvision_resnet(cache: Path) -> None:
    theirs = torchvision.models.resnet18(num_classes=1000).eval()
    put(cache, "resnet18.tv_in1k", theirs.state_dict())
    model = timm.create_model("resnet18").eval()
    assert load(model, "resnet18.tv_in1k").layout == "native"
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x))


def test_copies_of_timm(cache: Path) -> None:
    """timm's copies on Hugging Face are safetensors files with timm's own keys."""
    small: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    theirs, model = (timm.create_model("convnext_tiny", **small) for _ in range(2))
    cache.mkdir(parents=True)
    save_file(theirs.state_dict(), cache / "convnext_tiny.fb_in1k.safetensors")
    assert load(model, "convnext_tiny.fb_in1k").layout == "native"
    assert_same(model.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    ("mini", "name", "constructor", "extra"),
    [
        ("seg_replknet_mini", "replknet_31b.in1k_ft_ade20k_upernet_512", "RepLKNet", {}),
        pytest.param(
            "seg_replknet_norm_mini", "replknet_xl.megdata73m_ft_ade20k_upernet_640", "RepLKNet", {}, marks=pytest.mark.slow
        ),
        ("seg_slak_mini", "slak_tiny.in1k_ft_ade20k_upernet_512", "SLaK", {}),
        pytest.param(
            "seg_convnext_mini", "convnext_tiny.in1k_ft_ade20k_upernet_512", "ConvNeXt", {}, marks=pytest.mark.slow
        ),
        pytest.param("det_fcos_mini", "replknet_31b.in1k_ft_coco_fcos", "RepLKNet", {}, marks=pytest.mark.slow),
        ("det_cascade_replknet_mini", "replknet_xl.megdata73m_ft_coco_cascade", "RepLKNet", {}),
        pytest.param(
            "det_cascade_slak_mini", "slak_tiny.in1k_ft_coco_cascade_1x", "SLaK", {"Decom": True}, marks=pytest.mark.slow
        ),
        ("det_mask_convnext_mini", "convnext_tiny.in1k_ft_coco_maskrcnn", "ConvNeXt", {}),
    ],
)
def test_backbones(mini: str, name: str, constructor: str, extra: dict, shared: Path, cache: Path) -> None:
    """The backbone of a segmentation or detection network is loaded; its head is left out."""
    description = json.loads((shared / "parity" / "downstream" / "manifests" / f"{mini}.json").read_text())
    backbone = description["config"].get("backbone", description["config"])
    left = {**extra, **{key: value for key, value in backbone.items() if key not in ("type", "LoRA", "sparse")}}
    if constructor == "ConvNeXt":
        left["ls_init_value"] = left.pop("layer_scale_init_value")
    model = create({"constructor": constructor, "kwargs": {**left, "num_classes": 0}})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: torch.randn(shape).to(getattr(torch, kind)) for key, shape, kind in description["keys"]}
    put(cache, name, {"meta": {"CLASSES": ("a",)}, "state_dict": state, "optimizer": {"param_groups": [{"lr": 0.1}]}})
    report = load(model, name)
    assert report.container == "state_dict"
    assert any(key.startswith(("decode_head.", "bbox_head.", "rpn_head.")) for key in report.ignored)
    assert all(key.startswith(("norm_pre.", "head.norm.")) for key in report.missing)
    assert "removed the prefix 'backbone.'" in report.notes
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert set(changed) | set(report.missing) >= {key for key, value in before.items() if value.is_floating_point()}
