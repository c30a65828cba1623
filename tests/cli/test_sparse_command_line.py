"""Sparse training and sparsification from the command line, on a folder of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.test_command_line_run import finished, images, write_config  # noqa: F401 - fixtures

from widekernel.cli.main import main
from widekernel.data import Preprocessing
from widekernel.engine.metrics_log import read_metrics
from widekernel.sparsity import load_masks
from widekernel.tasks.assembly import build_model
from widekernel.tasks.saved import SavedModel, restore_model, save_model


def said(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    capsys.readouterr()
    code = main(list(arguments))
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("drawn_pictures")
def test_sparse_training(images, tmp_path: Path, capsys) -> None:  # noqa: F811
    config = write_config(tmp_path, images, ema={"decay": None})
    run = tmp_path / "run"
    settings = ["--sparsity.method", "dynamic", "--sparsity.dynamic.update_interval", "2"]
    settings += ["--sparsity.dynamic.sparsity", "0.6", "--sparsity.dynamic.prune_schedule", "cosine"]
    settings += ["--sparsity.dynamic.exclude", "head.*"]
    said(capsys, "train", "--config", str(config), "--output", str(run), *settings)
    weights, masks = load_file(run / "model.safetensors"), load_masks(run / "masks.safetensors")
    assert masks and all(not weights[name][~mask].any() for name, mask in masks.items())
    assert not any(name.startswith("head") for name in masks)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.4 * total)
    report = json.loads((run / "sparsity.json").read_text())
    assert report["sparsity"] == pytest.approx(0.6, abs=1 / total) and len(report["churn"]) == 1
    assert {layer["reason"] for layer in report["layers"] if layer["name"] == "head.fc.weight"} == {"excluded by name"}
    assert (run / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    assert read_metrics(run / "metrics.jsonl")[-1]["sparsity"] == report["sparsity"]
    counted = json.loads(said(capsys, "complexity", str(run), "--json"))
    dead = total - sum(int(mask.sum()) for mask in masks.values())
    # Some live taps reach no pixel of such small maps, so after they grow they stay zero.
    assert dead <= counted["dense"]["params"] - counted["nonzero"]["params"] <= 1.02 * dead
    assert counted["nonzero"]["macs"] < counted["dense"]["macs"]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            ["--sparsity.dynamic.block", "channel", "--sparsity.dynamic.layers", "large_kernel_only"], marks=pytest.mark.slow
        ),
        ["--sparsity.dynamic.block", "[3, 3]", "--sparsity.dynamic.layers", "['*.kernels.*']"],
        [
            "--sparsity.dynamic.block",
            "semi_structured",
            "--sparsity.dynamic.sparsity",
            "0.5",
            "--sparsity.dynamic.init",
            "magnitude",
        ],
        pytest.param(
            ["--sparsity.dynamic.rule", "published", "--sparsity.dynamic.growth", "momentum"], marks=pytest.mark.slow
        ),
        [
            "--sparsity.dynamic.initial_sparsity",
            "0.0",
            "--sparsity.dynamic.init",
            "erk",
            "--sparsity.dynamic.update_interval",
            "1",
        ],
    ],
    ids=["channel", "tiles", "semi_structured", "published", "gradual"],
)
def test_sparse_training_with_every_kind_of_block(settings: list[str], images, tmp_path: Path, capsys) -> None:  # noqa: F811
    config = write_config(tmp_path, images, schedule={"epochs": 1, "warmup_epochs": 0})
    run = tmp_path / "run"
    said(capsys, "train", "--config", str(config), "--output", str(run), "--sparsity.method", "dynamic", *settings)
    weights, masks = load_file(run / "model.safetensors"), load_masks(run / "masks.safetensors")
    averaged = load_file(run / "model_ema.safetensors")
    assert masks and all(not weights[n][~m].any() and not averaged[n][~m].any() for n, m in masks.items())


def test_learned_masks_by_training(finished: Path, images, tmp_path: Path, capsys) -> None:  # noqa: F811
    config = write_config(tmp_path, images, ema={"decay": None})
    run = tmp_path / "run"
    given = ["--model.weights", str(finished / "model.safetensors"), "--sparsity.method", "semi_structured"]
    small = ["--sparsity.semi_structured.min_in_channels", "8"]
    said(capsys, "train", "--config", str(config), "--output", str(run), *given, *small)
    before, after = load_file(finished / "model.safetensors"), load_file(run / "model.safetensors")
    masks = load_masks(run / "masks.safetensors")
    assert before.keys() == after.keys() and masks
    for name, value in after.items():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(value, expected), name  # weights and statistics do not change
    assert all((mask.sum() == mask.numel() // 2) for mask in masks.values() if mask.shape[1] % 4 == 0)
    for state in ("last", "best"):
        assert "images" in said(capsys, "eval", str(run), "--state", state)


def test_an_unfinished_mask_training_of_version_0_4_is_named(finished: Path, images, tmp_path: Path, capsys) -> None:  # noqa: F811
    source = finished / "model.safetensors"
    copied = tmp_path / "model.safetensors"
    copied.write_bytes(source.read_bytes())
    (tmp_path / "model_2to4_learned").mkdir()
    error = refused(capsys, "sparsify", str(copied), "--method", "learned", "--data.root", str(images))
    assert "version 0.4" in error and "model_2to4_learned.safetensors" in error.replace("\n", "")


@pytest.mark.parametrize("method", ["magnitude", "permuted", "learned"])
def test_sparsify_semi_structured(method: str, finished: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    output = tmp_path / "sparse.safetensors"
    arguments = ["--method", method, "--output", str(output), "--batch_size", "6", "--exclude", "*.downsample.*, head.*"]
    text = said(capsys, "sparsify", str(finished), *arguments)
    assert "top-1" in text and "% before" in text and "kept magnitude" in text
    weights, masks = load_file(output), load_masks(tmp_path / "sparse_masks.safetensors")
    assert masks and all(not weights[name][~mask].any() for name, mask in masks.items())
    for name, mask in masks.items():
        groups = mask.movedim(1, -1).reshape(-1, 4)
        assert (groups.sum(1) <= 2).all(), name
    report = json.loads((tmp_path / "sparse_sparsity.json").read_text())
    assert {layer["name"] for layer in report["layers"] if layer["masked"]} == set(masks)
    assert (tmp_path / "sparse_sparsity.png").exists()
    assert "images" in said(capsys, "eval", str(output), "--data.root", str(images_of(finished)), "--data.workers", "0")
    # Existing files are not overwritten.
    assert "exists" in refused(capsys, "sparsify", str(finished), "--method", method, "--output", str(output))


def images_of(run: Path) -> str:
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())["data"]["root"]


def test_sparsify_in_blocks(finished: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    output = tmp_path / "sparse.safetensors"
    arguments = ["--block", "channel", "--sparsity", "0.25", "--layers", "*.kernels.*", "--output", str(output)]
    said(capsys, "sparsify", str(finished), *arguments)
    masks = load_masks(tmp_path / "sparse_masks.safetensors")
    assert all(torch.equal(mask.flatten(1).any(1), mask.flatten(1).all(1)) for mask in masks.values())
    counted = json.loads(said(capsys, "complexity", str(output), "--json"))
    assert counted["realized"]["macs"] < counted["dense"]["macs"]


def test_sparsify_a_file_without_data(finished: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    source = tmp_path / "net.safetensors"
    source.write_bytes((finished / "model.safetensors").read_bytes())
    assert "random images" in said(capsys, "sparsify", str(source))
    assert (tmp_path / "net_semi_structured_magnitude.safetensors").exists()
    assert "--data.root" in refused(capsys, "sparsify", str(source), "--method", "learned")


@pytest.mark.parametrize("method", ["permuted", "learned"])
def test_compressed_files(method: str, finished: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    plain, small = tmp_path / "plain.safetensors", tmp_path / "small.safetensors"
    arguments = ["sparsify", str(finished), "--method", method, "--batch_size", "6"]
    said(capsys, *arguments, "--output", str(plain))
    said(capsys, *arguments, "--output", str(small), "--compressed")
    assert small.stat().st_size < plain.stat().st_size
    evaluation = ["--data.root", images_of(finished), "--data.workers", "0", "--json"]
    assert said(capsys, "eval", str(small), *evaluation) == said(capsys, "eval", str(plain), *evaluation)
    ours, theirs = restore_model(small)[0].state_dict(), load_file(plain)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "permuted", "--block", "channel"], "creates 2:4 masks"),
        (["--sparsity", "0.4"], "block semi_structured (2:4) keeps half"),
        (["--block", "kernals", "--sparsity", "0.4"], "Did you mean 'kernel'"),
        (["--block", "element", "--sparsity", "1.0"], "from 0 to below 1"),
        (["--block", "element", "--sparsity", "0.4", "--compressed"], "--compressed is for 2:4 networks"),
        (["--methods", "magnitude"], "Did you mean '--method'"),
        (["--layers", "nothing*"], "nothing"),
        (["--output", "net.pth"], "are .safetensors files"),
    ],
)
def test_settings_that_sparsify_refuses(arguments: list[str], message: str, finished: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    if "--output" not in arguments:
        arguments = [*arguments, "--output", str(tmp_path / "out.safetensors")]
    assert message in refused(capsys, "sparsify", str(finished), *arguments)
    assert not list(tmp_path.iterdir())


def test_settings_that_train_refuses(images, tmp_path: Path, capsys) -> None:  # noqa: F811
    config = str(write_config(tmp_path, images))
    for arguments, message in (
        (["--sparsity.method", "semi_structured", "--ema.decay", "null"], "learns masks for trained weights"),
        (
            ["--sparsity.method", "dynamic", "--sparsity.dynamic.sparsity", "1"],
            "sparsity is 1, but must be from 0 to below 1",
        ),
        (["--sparsity.method", "dynamic", "--sparsity.dynamic.init", "snipp"], "Did you mean 'snip'"),
        (["--sparsity.dynamc.init", "snip"], "Did you mean"),
        (["--sparsity.method", "dynamic", "--sparsity.masks", "nowhere.safetensors"], "but there is no such file"),
    ):
        error = refused(capsys, "train", "--config", config, "--output", str(tmp_path / "run"), *arguments)
        assert message in error.replace("1.0", "1"), error


def test_a_folder_with_learned_masks_of_another_network_is_refused(finished: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    output = tmp_path / "out.safetensors"
    arguments = ["--method", "learned", "--batch_size", "6", "--output", str(output), "--overwrite"]
    said(capsys, "sparsify", str(finished), *arguments)
    said(capsys, "sparsify", str(finished), *arguments)  # repeated
    assert "learns masks of another network" in refused(capsys, "sparsify", str(finished), "--weights", "ema", *arguments)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    arguments[5] = str(tmp_path / "other.safetensors")
    assert "holds something else" in refused(capsys, "sparsify", str(finished), *arguments)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_a_named_data_set_is_evaluated_on(tmp_path: Path, capsys) -> None:
    pytest.importorskip("sklearn")
    preprocessing = Preprocessing(16, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    saved = SavedModel("test_resnet", {}, "training", 10, tuple("0123456789"), preprocessing)
    path = tmp_path / "m.safetensors"
    save_model(build_model("test_resnet", 10, {}), path, saved)
    text = said(capsys, "sparsify", str(path), "--data.name", "digits", "--data.workers", "0")
    assert "before" in text and "after (360 images)" in text and "no data was given" not in text
    error = refused(capsys, "sparsify", str(path), "--data.workers", "0", "--overwrite")
    assert "no data set: name one with --data.root or --data.name" in error


@pytest.mark.parametrize("command", ["fold", "sparsify"])
def test_outputs_that_would_overwrite_the_source(command: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"the source")
    (tmp_path / "link.safetensors").symlink_to(path)
    (tmp_path / "folder.safetensors").mkdir()
    for output, words in (
        (path, "is the source"),
        (tmp_path / "link.safetensors", "is the source"),
        (tmp_path / "folder.safetensors", "is a folder"),
        (path / "x.safetensors", "is a file"),
    ):
        assert words in refused(capsys, command, str(path), "--output", str(output), "--overwrite")
    assert path.read_bytes() == b"the source"
    (tmp_path / "model.safetensors").write_bytes(b"of the run")
    own = str(tmp_path / "model.safetensors")
    assert "is the source" in refused(capsys, command, str(tmp_path), "--output", own, "--overwrite")
