"""Checkpoints in containers and wrappers: training states, averaged weights, backbones; reading and writing of files."""

from __future__ import annotations

import argparse
import errno
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import AveragedModel

import widekernel
from tests.models.checkpoints import (
    assert_content_refused,
    both_layouts,
    load_content,
    state_of,
)
from tests.models.zoo import alive, assert_same_state, create, snapshot
from widekernel.errors import CheckpointError
from widekernel.models.checkpoint import reader, saving

# ---- Containers


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("layout", ["native", "official"])
def test_prefixes_of_wrappers(prefix: str, layout: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    state = model.state_dict() if layout == "native" else state_of(model, tmp_path, "official")
    report = load_content(other, tmp_path, {"model": OrderedDict((prefix + key, value) for key, value in state.items())})
    assert_same_state(other.state_dict(), model.state_dict())
    removed = [note for note in report.notes if note.startswith("removed the prefix")]
    assert len(removed) == prefix.count(".")


@pytest.mark.parametrize("container", ["model", "state_dict", "module", "model_state", None])
def test_containers(container: str | None, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    state = state_of(model, tmp_path, "official")
    content = {container: state, "epoch": 7, "optimizer": {"state": {}}} if container else state
    report = load_content(other, tmp_path, content)
    assert report.container == (container or "")
    assert_same_state(other.state_dict(), model.state_dict())


def test_a_container_within_a_container(tmp_path: Path) -> None:
    model, other = alive("replknet_nano"), create("replknet_nano")
    report = load_content(other, tmp_path, {"model": {"state_dict": state_of(model, tmp_path, "official")}, "epoch": 1})
    assert report.container == "model.state_dict"
    assert_same_state(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema"])
def test_averaged_weights(key: str, tmp_path: Path) -> None:
    live, averaged = alive("slak_nano"), alive("slak_nano")
    content = {"model": state_of(live, tmp_path, "official"), key: state_of(averaged, tmp_path, "official")}
    other = create("slak_nano")
    assert load_content(other, tmp_path, content, weights="ema").container == key
    assert_same_state(other.state_dict(), averaged.state_dict())
    assert load_content(other, tmp_path, content).container == "model"
    assert_same_state(other.state_dict(), live.state_dict())


@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano"])
def test_backbone_of_a_larger_network(name: str, tmp_path: Path) -> None:
    model, other = alive(name), alive(name)
    before = snapshot(other)
    state = {
        f"backbone.{key}": value
        for key, value in state_of(model, tmp_path, "official").items()
        if not key.startswith(("head.", "norm."))
    }
    foreign = {"backbone.norm0.weight": torch.ones(16), "decode_head.conv.weight": torch.ones(3), "neck.bias": torch.ones(2)}
    report = load_content(other, tmp_path, {"meta": {}, "state_dict": {**state, **foreign}})
    assert set(report.ignored) == {"norm0.weight", "decode_head.conv.weight", "neck.bias"}
    assert report.missing
    assert all(key.startswith(("head.", "norm_pre.")) for key in report.missing)
    for key, value in other.state_dict().items():
        expected = before if key in report.missing else model.state_dict()
        assert torch.equal(value, expected[key]), key
    assert all(key in str(report) for key in foreign if not key.startswith("backbone."))


@both_layouts
def test_entries_without_weights_are_listed(layout: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    state = state_of(model, tmp_path, layout)
    content = {
        "model": {**state, "version": 2, "_metadata": {"a": 1}},
        "epoch": 7,
        "optimizer": {"state": {}},
        "loss_weights": torch.ones(3),
    }
    report = load_content(other, tmp_path, content)
    assert set(report.unused) == {"epoch", "optimizer", "loss_weights", "model.version", "model._metadata"}
    assert all(entry in str(report) for entry in report.unused)
    assert_same_state(other.state_dict(), model.state_dict())
    assert set(load_content(other, tmp_path, {**state, "epoch": 7, "args": [1]}).unused) == {"epoch", "args"}
    nested = {"model": {"state_dict": state, "iteration": 3}, "epoch": 7}
    assert set(load_content(other, tmp_path, nested).unused) == {"epoch", "iteration"}
    assert not load_content(other, tmp_path, state).unused


@both_layouts
@pytest.mark.parametrize("within", [None, "model", "model_ema"])
def test_averaged_models(within: str | None, layout: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    state = {f"module.{key}": value for key, value in state_of(model, tmp_path, layout).items()}
    state["n_averaged"] = averaged.n_averaged
    if layout == "native":
        assert list(averaged.state_dict()) == ["n_averaged", *list(state)[:-1]]
    report = load_content(
        other, tmp_path, {within: state} if within else state, weights="ema" if within == "model_ema" else "model"
    )
    assert report.ignored == ("n_averaged",)
    assert report.notes == ("removed the prefix 'module.'",)
    assert_same_state(other.state_dict(), model.state_dict())


@both_layouts
def test_missing_classifier_is_reported(layout: str, tmp_path: Path) -> None:
    state = state_of(alive("slak_nano"), tmp_path, layout)
    headless = {key: value for key, value in state.items() if not key.startswith("head")}
    other = alive("slak_nano")
    with pytest.warns(UserWarning, match="holds no classifier: the network's is untrained"):
        report = load_content(other, tmp_path, headless)
    assert {"head.fc.weight", "head.fc.bias"} <= set(report.missing)
    assert torch.equal(
        other.stem[0].weight, state["stem.0.weight" if layout == "native" else "downsample_layers.0.0.weight"]
    )


def test_network_without_classifier_misses_none(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    state = {key: value for key, value in alive("slak_nano").state_dict().items() if not key.startswith("head.fc")}
    load_content(create("slak_nano", num_classes=0), tmp_path, state)
    assert not [warning for warning in recwarn if "untrained" in str(warning.message)]


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema"])
def test_files_of_averaged_weights_alone(key: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), alive("slak_nano")
    content = {key: state_of(model, tmp_path, "native"), "epoch": 3}
    assert_content_refused(other, tmp_path, content, f"holds no weights; its entries are {key}, epoch: load weights='ema'$")
    load_content(other, tmp_path, content, weights="ema")
    assert_same_state(other.state_dict(), model.state_dict())


# ---- Reading and writing


def test_many_threads_read_one_file(tmp_path: Path) -> None:
    """PyTorch's list of loadable classes is global to the process; reading must leave it unchanged."""
    model, path = alive("slak_nano"), tmp_path / "a.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    before = list(torch.serialization.get_safe_globals())
    others = [create("slak_nano") for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(4):
            reports = list(pool.map(lambda other: widekernel.load_checkpoint(other, path), others))
            assert {report.unused for report in reports} == {("args",)}
    for other in others:
        assert_same_state(other.state_dict(), model.state_dict())
    assert list(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("written", [0, 100], ids=["nothing", "a_part"])
def test_a_full_disk(written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: Any, file: Path, **kwargs: Any) -> None:
        if written:
            Path(file).write_bytes(bytes(written))
        raise SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be written: .*No space left on device"):
        widekernel.save_checkpoint(create("slak_nano"), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


WRAPPERS = {
    "compiled": torch.compile,
    "data_parallel": nn.DataParallel,
    "compiled_data_parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "data_parallel_compiled": lambda model: nn.DataParallel(torch.compile(model)),
}


@both_layouts
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_networks_load_and_save_like_the_inner_one(wrapper: str, layout: Any, tmp_path: Path) -> None:
    wrap, suffix = WRAPPERS[wrapper], {"native": ".safetensors", "official": ".pth"}[layout]
    model, other = alive("slak_nano"), create("slak_nano")
    plain = widekernel.save_checkpoint(model, tmp_path / f"plain{suffix}", layout=layout)
    wrapped = widekernel.save_checkpoint(wrap(model), tmp_path / f"wrapped{suffix}", layout=layout)
    states = [reader.read_checkpoint(path).state for path in (plain, wrapped)]
    assert_same_state(*states)
    report = widekernel.load_checkpoint(wrap(other), plain)
    assert not report.notes
    assert set(report.loaded) == set(model.state_dict())
    assert_same_state(other.state_dict(), model.state_dict())


def test_saving_does_not_touch_the_model(tmp_path: Path) -> None:
    model = alive("slak_nano").train()
    before = snapshot(model)
    widekernel.save_checkpoint(model, tmp_path / "a.safetensors")
    widekernel.save_checkpoint(model, tmp_path / "a.pt", layout="official")
    assert_same_state(model.state_dict(), before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
