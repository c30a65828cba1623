"""The catalog: complete against the collected list, and every entry belongs to a registered network and a layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import widekernel.models
from widekernel.models.layouts.registry import identify, layouts_of
from widekernel.weights import Checkpoint, find_checkpoint, list_checkpoints

EVERY = list_checkpoints()
every_checkpoint = pytest.mark.parametrize("checkpoint", EVERY, ids=lambda checkpoint: checkpoint.name)
PLACES = {
    "google_drive": "google_drive",
    "baidu": "by_hand",
    "mirror_openmmlab": "url",
    "fbaipublicfiles": "url",
    "pytorch": "url",
    "surfdrive": "url",
    "huggingface": "huggingface",
}
LARGE = re.compile("base|large|small|31l|xl")
_networks: dict[str, torch.nn.Module] = {}


def _key(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.model} {sorted(checkpoint.arguments.items())}"


def network(checkpoint: Checkpoint) -> torch.nn.Module:
    """Create the network of a checkpoint, without memory for its weights."""
    key = _key(checkpoint)
    if key not in _networks:
        # timm's networks have no argument for the device.
        with torch.device("meta"):
            _networks[key] = timm.create_model(checkpoint.model, **checkpoint.arguments)
    return _networks[key]


def test_numbers() -> None:
    assert len(EVERY) == len({each.name for each in EVERY}) == 108
    tasks = [each.task for each in EVERY]
    assert [tasks.count(task) for task in ("classification", "segmentation", "detection")] == [67, 21, 20]


@every_checkpoint
def test_entries_are_complete(checkpoint: Checkpoint) -> None:
    assert re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", checkpoint.name)
    assert checkpoint.training_data
    assert checkpoint.license in ("MIT", "Apache-2.0", "BSD-3-Clause")
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+", checkpoint.origin)
    assert set(checkpoint.preprocessing) == {"mean", "std", "interpolation", "crop_pct", "crop_mode"}
    assert checkpoint.resolution is None or re.fullmatch(r"\d+(x\d+)?", checkpoint.resolution)
    assert all(0 < value < 100 for value in checkpoint.metrics.values())
    order = [("url", "huggingface", "google_drive", "url", "by_hand").index(source.kind) for source in checkpoint.sources]
    assert order == sorted(order) or "surf" in checkpoint.sources[-1].place
    for source in checkpoint.sources:
        assert source.link.startswith("https://")
        assert source.place
        assert re.fullmatch(r"[0-9a-f]*", source.sha256)


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param(
            each,
            id=each.name,
            marks=[pytest.mark.slow] if re.search("base|large|small|31l|xl|unireplknet_[pnslb]", each.model) else [],
        )
        for each in EVERY
    ],
)
def test_entries_resolve(checkpoint: Checkpoint) -> None:
    """To a registered network that takes the arguments, and to a layout that the network can be loaded from."""
    model = network(checkpoint)
    layouts = [layout.family for layout in layouts_of(model)]
    for layout in (checkpoint.layout, *(source.layout or checkpoint.layout for source in checkpoint.sources)):
        if layout == "native":
            assert identify(model.state_dict()) is not None
        else:
            assert layout in layouts


@every_checkpoint
def test_timm_has_the_tags(checkpoint: Checkpoint) -> None:
    """Ours are registered under the names of the catalog; those that timm has are the same files there."""
    ours = checkpoint.model in widekernel.models.list_models()
    if checkpoint.timm:
        cfg = timm.get_pretrained_cfg(checkpoint.name)
        assert cfg is not None
        assert not ours
        links = [source.link for source in checkpoint.sources]
        assert cfg.url in links or f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors" in links
        assert (cfg.num_classes, cfg.mean, cfg.std) == (
            checkpoint.classes,
            checkpoint.preprocessing["mean"],
            checkpoint.preprocessing["std"],
        )
    elif ours and checkpoint.task == "classification":
        cfg = timm.get_pretrained_cfg(checkpoint.name)
        assert cfg is not None
        assert timm.is_model_pretrained(checkpoint.name)
        for key, value in checkpoint.preprocessing.items():
            assert getattr(cfg, key) == value
        assert cfg.num_classes == (checkpoint.classes or 0)
        if checkpoint.image_size():
            assert cfg.input_size == (3, checkpoint.image_size(), checkpoint.image_size())
        assert cfg.license == checkpoint.license.lower()
        assert cfg.origin_url == checkpoint.origin
    else:
        assert checkpoint.name not in timm.list_pretrained()


@pytest.mark.parametrize("name", widekernel.models.list_models())
def test_defaults_are_those_of_the_network_without_weights(name: str) -> None:
    """Networks that are created without a tag do not change because there are weights."""
    default, plain = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(f"{name}.untrained")
    assert default is not None and plain is not None
    changed = {key for key, value in vars(default).items() if value != vars(plain)[key]}
    assert changed <= {"tag", "url", "custom_load", "license", "origin_url"}
    if default.tag != "untrained":
        assert not find_checkpoint(f"{name}.{default.tag}").arguments


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("replknet_31b.in1k_224", "replknet31b"),
        ("slak_tiny.in1k_224", "slak_tiny"),
        ("slak_tiny.l2s_in1k_224", "slak_tiny_convnext7"),
        ("shiftwise_tiny.in1k_224", "shiftwise_v2_tiny"),
        ("convnext_tiny.fb_in1k", "convnext_tiny"),
        ("unireplknet_a.in1k_224", "unireplknet_a"),
        pytest.param("unireplknet_t.in1k_224", "unireplknet_t", marks=pytest.mark.slow),
        pytest.param("convnext_base.fb_in1k", "convnext_base", marks=pytest.mark.slow),
        pytest.param("convnext_isotropic_small.in1k_224", "convnext_isotropic_small", marks=pytest.mark.slow),
    ],
)
def test_keys_of_official_files(name: str, manifest: str, shared: Path) -> None:
    """The network has the keys and shapes of the official constructor that the checkpoint was made with."""
    keys = json.loads((shared / "parity" / "manifests" / f"{manifest}.json").read_text())["keys"]
    checkpoint = find_checkpoint(name)
    model = network(checkpoint)
    layout = next(layout for layout in layouts_of(model) if layout.family == checkpoint.layout)
    ours = {}
    for key, value in model.state_dict().items():
        found = layout.to_official(key)
        if found is None:
            assert layout.is_generated(key)
        else:
            ours[found[0]] = list(found[1].to_official(value).shape)
    assert ours == {key: shape for key, shape, _ in keys}


def test_the_catalog_holds_the_collected_list(shared: Path) -> None:
    collected = json.loads((shared / "design" / "weights.json").read_text())["checkpoints"]
    assert len(collected) == len(EVERY)
    for theirs, ours in zip(collected, EVERY):
        assert (theirs["ours"] or ours.model) == ours.model
        for field, name in {"task": "task", "classes": "classes", "metrics": "metrics", "resolution": "resolution"}.items():
            assert theirs[field] == getattr(ours, name)
        assert (theirs["params_M"], theirs["flops_G"]) == (ours.params, ours.macs)
        assert theirs["license"].startswith(ours.license)
        wanted = sorted((PLACES[place["kind"]], _id(place)) for place in theirs["locations"])
        found = sorted((source.kind, source.id or source.file or source.url) for source in ours.sources)
        assert [place for place in wanted if place[1]] == [place for place in found if "/tree/" not in place[1]]
        _check_arguments(theirs, ours)


def _id(place: dict[str, Any]) -> str:
    if place["kind"] == "huggingface":
        return place["file"] or ""
    return place.get("file_id") or place["url"]


def _check_arguments(theirs: dict[str, Any], ours: Checkpoint) -> None:
    """Compare the arguments with those collected; some are the network's defaults, or are seen in the file."""
    if ours.layout == "isotropic ConvNeXt" or not theirs["arguments"]:
        return
    model = network(ours)
    for key, value in theirs["arguments"].items():
        assert getattr(model.cfg, key) == (tuple(value) if isinstance(value, list) else value)
