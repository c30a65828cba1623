"""Checkpoints of third-party training scripts: entries and prefixes of any name, shards, leftovers of tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm.utils
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import widekernel
from tests.models.checkpoints import assert_content_refused, both_layouts, load_content, state_of
from tests.models.zoo import alive, assert_same_state, create
from widekernel.errors import ArgumentError, CheckpointError
from widekernel.models.checkpoint import reader
from widekernel.sparsity import semi_structured
from widekernel.sparsity.semi_structured import SemiStructuredConfig

ASIDE = {
    "epoch": 1,
    "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
    "loss": torch.tensor(0.1),
    "rng": {"cpu": torch.ones(2), "cuda.0": torch.ones(2)},
    "criterion": {"module.weight": torch.ones(2)},
}
PREFIXES = (
    *("model.", "net.", "network.", "encoder.", "encoder.model.", "timm_model.", "student.", "teacher.backbone."),
    *("base_model.model.", "image_encoder.", "visual.", "backbone.", "student._orig_mod.module."),
)


# ---- Entries


@pytest.mark.parametrize("name", ["model_state_dict", "net", "network", "weights", "params", "generator", "student"])
def test_weights_in_an_entry_of_any_name(name: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    content = {**ASIDE, name: model.state_dict(), "ema_state_dict": alive("slak_nano").state_dict()}
    report = load_content(other, tmp_path, content)
    assert report.container == name
    assert set(report.unused) == {*ASIDE, "ema_state_dict"}
    assert_same_state(other.state_dict(), model.state_dict())


def test_settings_are_not_taken_for_weights(tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    report = load_content(other, tmp_path, {"model": {"name": "slak", "depth": 3}, "weights": model.state_dict()})
    assert (report.container, report.unused) == ("weights", ("model",))
    assert_same_state(other.state_dict(), model.state_dict())


def test_error_names_several_networks(tmp_path: Path) -> None:
    content = {"generator": create("slak_nano").state_dict(), "discriminator": nn.Sequential(nn.Linear(2, 2)).state_dict()}
    message = r"several networks, in generator, discriminator: save the one .*torch\.load\(path\)\['generator'\]"
    assert_content_refused(create("slak_nano"), tmp_path, {**ASIDE, **content}, message)
    assert_content_refused(create("slak_nano"), tmp_path, content, r"no averaged \(EMA\) weights", weights="ema")


@pytest.mark.parametrize(
    "name", ["ema_state_dict", "ema_model", "averaged_model", "model_ema_state_dict", "net_ema", "params_ema", "swa_net"]
)
def test_averaged_weights_in_an_entry_of_any_name(name: str, tmp_path: Path) -> None:
    live, averaged, other = (alive("slak_nano") for _ in range(3))
    content = {**ASIDE, "net": live.state_dict(), name: averaged.state_dict()}
    assert load_content(other, tmp_path, content, weights="ema").container == name
    assert_same_state(other.state_dict(), averaged.state_dict())
    assert load_content(other, tmp_path, content).container == "net"
    assert_same_state(other.state_dict(), live.state_dict())
    assert_content_refused(
        create("slak_nano"), tmp_path, {name: averaged.state_dict()}, "holds no weights; .*: load weights='ema'$"
    )


def test_error_suggests_no_weights_if_there_are_none(tmp_path: Path) -> None:
    assert_content_refused(
        create("slak_nano"),
        tmp_path,
        {"epoch": 1},
        r"holds no averaged \(EMA\) weights; its entries are epoch$",
        weights="ema",
    )


def test_error_names_numpy_arrays(tmp_path: Path) -> None:
    arrays = {key: value.numpy() for key, value in create("slak_nano").state_dict().items()}
    for content in (arrays, {"model": arrays}):
        assert_content_refused(
            create("slak_nano"), tmp_path, content, r"holds NumPy arrays, not tensors: save .*torch\.from_numpy"
        )


# ---- Prefixes


@both_layouts
@pytest.mark.parametrize("prefix", PREFIXES)
def test_network_inside_a_larger_one(prefix: str, layout: str, tmp_path: Path) -> None:
    model, other = alive("slak_nano"), create("slak_nano")
    inside = {prefix + key: value for key, value in state_of(model, tmp_path, layout).items()}
    report = load_content(
        other, tmp_path, {"state_dict": {"loss.weight": torch.ones(2), **inside, "decoder.0.bias": torch.ones(3)}}
    )
    assert set(report.ignored) == {"loss.weight", "decoder.0.bias"}
    assert report.notes[0].startswith("removed the prefix")
    assert_same_state(other.state_dict(), model.state_dict())


def test_two_copies_of_the_network_are_refused(tmp_path: Path) -> None:
    state = create("slak_nano").state_dict()
    both = {f"{who}.backbone.{key}": value for who in ("student", "teacher") for key, value in state.items()}
    assert_content_refused(
        create("slak_nano"),
        tmp_path,
        both,
        r"does not fit: the file holds the network 2 times, under student\.backbone\., teacher\.backbone\.: ",
    )


def test_only_keys_outside_the_network_are_ignored(tmp_path: Path) -> None:
    state = {f"encoder.{key}": value for key, value in create("slak_nano").state_dict().items()}
    assert_content_refused(
        create("slak_nano"),
        tmp_path,
        {**state, "encoder.more": torch.ones(2), "loss.x": torch.ones(2)},
        "more: the network has no such weight",
    )
    del state["encoder.stem.0.weight"]
    assert_content_refused(
        create("slak_nano"), tmp_path, {**state, "loss.x": torch.ones(2)}, r"stem\.0\.weight: the file holds no such weight"
    )


def test_head_of_a_larger_network_is_ignored(tmp_path: Path) -> None:
    state = {
        f"encoder.{key}": value for key, value in alive("slak_nano").state_dict().items() if not key.startswith("head.")
    }
    with pytest.warns(UserWarning, match="holds no classifier"):
        report = load_content(create("slak_nano"), tmp_path, {**state, "classifier.weight": torch.ones(2)})
    assert report.ignored == ("classifier.weight",)
    assert all(key.startswith("head.") for key in report.missing)


@both_layouts
def test_leftovers_of_tools(layout: str, tmp_path: Path) -> None:
    """The leftovers are counters of operations and the names of compiled stages."""
    model, other = alive("slak_nano"), create("slak_nano")
    state = {key.replace("stages.0.", "stages.0._orig_mod."): v for key, v in state_of(model, tmp_path, layout).items()}
    counters = {"total_ops": torch.ones(1), "stages.0.total_params": torch.ones(1)}
    report = load_content(other, tmp_path, {**state, **counters})
    assert set(report.ignored) == set(counters)
    assert report.notes[0] == "removed the prefix '_orig_mod.'"
    assert_same_state(other.state_dict(), model.state_dict())


# ---- Shards


def _shards(model: nn.Module, folder: Path) -> Path:
    items = list(model.state_dict().items())
    parts = {f"model-0000{i + 1}-of-00002.safetensors": dict(items[i::2]) for i in range(2)}
    for name, part in parts.items():
        save_file(part, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, part in parts.items() for key in part}}))
    return index


def test_sharded_checkpoints(tmp_path: Path) -> None:
    model = alive("slak_nano")
    index = _shards(model, tmp_path)
    for path in (index, tmp_path):
        other = create("slak_nano")
        widekernel.load_checkpoint(other, path)
        assert_same_state(other.state_dict(), model.state_dict())
    shard = tmp_path / "model-00002-of-00002.safetensors"
    for path, message, weights in (
        (shard, r"is one shard of several: load .*model\.safetensors\.index\.json", "model"),
        (index, "is sharded and holds only one set of weights", "ema"),
    ):
        with pytest.raises(CheckpointError, match=message):
            reader.read_checkpoint(path, weights)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"names the shard {shard.name}, which is missing"):
        reader.read_checkpoint(index)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/a.safetensors", "a\\b.safetensors", "", "model.safetensors.index.json"]
)
def test_shards_must_be_beside_their_index(name: str, tmp_path: Path) -> None:
    save_file({"x.y": torch.ones(2)}, tmp_path / "a.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"x.y": name}}))
    with pytest.raises(CheckpointError, match="shards must be files in the same folder"):
        reader.read_checkpoint(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_indices(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not the index of a sharded checkpoint"):
        reader.read_checkpoint(tmp_path / "model.safetensors.index.json")


# ---- Wrappers and arguments


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [AveragedModel, timm.utils.ModelEmaV3, _Wrapper], ids=lambda wrap: wrap.__name__)
def test_averaging_wrappers_are_seen_through(wrap: Any, tmp_path: Path) -> None:
    model, wrapped = alive("slak_nano"), wrap(create("slak_nano"))
    report = widekernel.load_checkpoint(wrapped, widekernel.save_checkpoint(model, tmp_path / "a.safetensors"))
    assert set(report.loaded) == set(model.state_dict())
    assert_same_state(wrapped.module.state_dict(), model.state_dict())
    found = reader.read_checkpoint(widekernel.save_checkpoint(wrapped, tmp_path / "b.safetensors")).state
    assert found.keys() == model.state_dict().keys()


@pytest.mark.parametrize("path", [None, {"a": torch.ones(2)}, 3, b"a.pth"], ids=str)
def test_invalid_paths(path: Any) -> None:
    model = create("slak_nano")
    for call in (widekernel.load_checkpoint, widekernel.save_checkpoint):
        with pytest.raises(ArgumentError, match=rf"path is a {type(path).__name__}: it must be the path of a file"):
            call(model, path)
    with pytest.raises(ArgumentError, match=r"model is a str: it must be an nn\.Module, and the path comes second"):
        widekernel.load_checkpoint("a.pth", model)  # type: ignore[arg-type]


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert widekernel.save_checkpoint(create("slak_nano"), "~/a.safetensors") == tmp_path / "a.safetensors"
    assert widekernel.load_checkpoint(create("slak_nano"), "~/a.safetensors").path == str(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("normalize", "message"),
    [
        (nn.utils.weight_norm, "call torch.nn.utils.remove_weight_norm on its layers"),
        (nn.utils.spectral_norm, "call torch.nn.utils.remove_spectral_norm on its layers"),
        (nn.utils.parametrizations.weight_norm, "remove_parametrizations on its layers"),
    ],
    ids=["weight_norm", "spectral_norm", "parametrized"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_error_says_how_to_remove_weight_normalization(normalize: Any, message: str, tmp_path: Path) -> None:
    model = create("slak_nano")
    normalize(model.get_submodule("stem.0"))
    assert_content_refused(create("slak_nano"), tmp_path, model.state_dict(), message)


def test_error_says_how_to_convert_learned_masks(tmp_path: Path) -> None:
    model = create("slak_nano")
    semi_structured.prepare(model, SemiStructuredConfig(method="learned", min_in_channels=4, min_out_channels=4))
    assert_content_refused(
        create("slak_nano"),
        tmp_path,
        model.state_dict(),
        r"2:4 masks are being learned: save it after .*semi_structured\.convert",
    )
