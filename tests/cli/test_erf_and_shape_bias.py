"""The commands `erf` and `shape-bias`: files, tables and errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from widekernel.analysis.shape_bias import CATEGORIES, COLUMNS, decide, read_decisions, shape_bias
from widekernel.cli.main import main
from widekernel.tasks.named_network import label_of, load_named


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return tmp_path / "pictures"


@pytest.fixture
def stimuli(tmp_path: Path) -> Path:
    folder = tmp_path / "cue-conflict"
    for number, (shape, texture) in enumerate([("cat", "dog"), ("dog", "cat"), ("cat", "cat"), ("car", "truck")]):
        (folder / shape).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / shape / f"{shape}{number}-{texture}1.png")
    return folder


def test_erf_of_a_name_a_file_and_a_matrix(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "broken.png").write_bytes(b"no image")
    weights, output = tmp_path / "official.pth", tmp_path / "out"
    torch.save(timm.create_model("replknet_nano").state_dict(), weights)
    np.save(tmp_path / "theirs.npy", np.random.default_rng(0).random((64, 64), dtype=np.float32))
    options = ["--data", str(pictures), "--images", "3", "--input_size", "64", "--output", str(output)]
    assert main(["erf", "slak_nano", f"replknet_nano={weights}", str(tmp_path / "theirs.npy"), *options]) == 0
    said = capsys.readouterr()
    assert all(name in said.out for name in ("slak_nano", "replknet_nano", "theirs"))
    assert "unreadable image: broken.png" in said.err
    rows = json.loads((output / "erf.json").read_text())
    assert rows["slak_nano"]["images"] == 3
    assert rows["theirs"]["areas"]["0.99"] is None or rows["theirs"]["areas"]["0.99"]["side"] % 2
    assert np.load(output / "slak_nano.npy").shape == (64, 64)
    assert sorted(path.name for path in output.iterdir()) == ["erf.json", "erf.png", "replknet_nano.npy", "slak_nano.npy"]


def test_erf_of_a_folded_network_and_of_its_training_form_agree(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("slak_nano").state_dict(), weights)
    found = []
    for fold in ("true", "false"):
        options = ["--data", str(pictures), "--input_size", "64", "--output", str(tmp_path / fold), "--fold", fold]
        assert main(["erf", f"slak_nano={weights}", *options, "--json"]) == 0
        found.append(np.load(tmp_path / fold / "slak_nano.npy"))
    assert np.abs(found[0] - found[1]).max() <= 1e-4 * found[1].max()


def test_the_choice_of_images_depends_on_the_seed_only(pictures: Path, tmp_path: Path) -> None:
    found = []
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("slak_nano").state_dict(), weights)
    for number, seed in enumerate((0, 0, 3)):
        options = ["--data", str(pictures), "--images", "1", "--seed", str(seed), "--input_size", "64"]
        assert main(["erf", f"slak_nano={weights}", *options, "--output", str(tmp_path / str(number))]) == 0
        found.append(np.load(tmp_path / str(number) / "slak_nano.npy"))
    assert np.allclose(found[0], found[1])
    assert not np.allclose(found[0], found[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slak_nano"], "--data is not set"),
        (["slak_nano", "--data", "EMPTY"], "holds no images"),
        (["slak_nano", "--data", "MISSING"], "MISSING does not exist"),
        (["slak_nani", "--data", "PICTURES"], "'slak_nano'"),
        (["slak_nano", "slak_nano", "--data", "PICTURES"], "Several models are called 'slak_nano'"),
        (["slak_nano", "--data", "PICTURES", "--images", "0"], "images is 0"),
        (["slak_nano", "--data", "PICTURES", "--layer", "stag"], "no module 'stag'"),
        (["slak_nano", "--data", "PICTURES", "--output", "FILE/erf"], "is a file"),
        (["slak_nano", "--data", "PICTURES", "--layer", "head.fc"], "name a module with spatial output"),
        (["slak_nano", "--data", "PICTURES", "--input_size", "20"], "both sides must be at least 32 pixels"),
        (["test_vit", "--data", "PICTURES", "--input_size", "100"], "Choose another --input_size; its own is 160"),
        (["slak_nano", "--data", "BROKEN"], "None of the images of"),
        (["slak_nano", "--data", "BROKEN/0.png", "--device", "cud"], "device is 'cud'"),
        (["slak_nano", "--data", "PICTURES", "--output", "DONE"], "holds earlier results (erf.json)"),
        (["missing.npy"], "missing.npy cannot be read"),
        (["BROKEN.npy"], "it is not a NumPy file of numbers"),
        (["BROKEN.pth", "--data", "PICTURES"], "write NAME="),
        (["slak_nano=BROKEN.pth", "--data", "PICTURES"], "is not a checkpoint"),
        (["RUN", "--data", "PICTURES"], "has no training states yet"),
        (["runs/none", "--data", "PICTURES"], "runs/none does not exist"),
    ],
)
def test_wrong_arguments_of_erf(
    arguments: list[str], message: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("broken/0.png", "broken.npy", "broken.pth", "done/erf.json", "run/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("seed: 0" if name == "run/config.yaml" else "garbage")
    named = {word: tmp_path / word.lower() for word in ("BROKEN", "BROKEN/0.png", "BROKEN.npy", "BROKEN.pth", "DONE", "RUN")}
    named["slak_nano=BROKEN.pth"] = f"slak_nano={tmp_path / 'broken.pth'}"
    named |= {"EMPTY": tmp_path / "empty", "PICTURES": pictures, "FILE/erf": tmp_path / "file" / "erf"}
    given = [str(named.get(word, word)) for word in arguments]
    if "--output" not in given:
        given += ["--output", str(tmp_path / "out")]
    assert main(["erf", *given]) == 2
    assert message in capsys.readouterr().err


def test_shape_bias_of_a_network_beside_observers(stimuli: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observers, weights = tmp_path / "observers", tmp_path / "weights.pth"
    observers.mkdir()
    lines = [",".join(COLUMNS), "subject-01,1,1,0.5,cat,cat,0,0001_s5n_s01_0_cat_00_cat1-dog1.png"]
    (observers / "subject-01.csv").write_text("\n".join(lines) + "\n")
    torch.save(timm.create_model("slak_nano").state_dict(), weights)
    options = ["--stimuli", str(stimuli), "--observers", str(observers), "--output", str(tmp_path / "out")]
    assert main(["shape-bias", f"slak_nano={weights}", *options, "--batch_size", "3", "--json"]) == 0
    rows = {row["observer"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["subject-01"]["shape_bias"] == 1.0
    observer, decisions = read_decisions(tmp_path / "out" / "cue-conflict_slak_nano_session-1.csv")
    assert observer == "slak_nano"
    assert [one.stimulus.name for one in decisions] == ["car3-truck1.png", "cat0-dog1.png", "cat2-cat1.png", "dog1-cat1.png"]
    model, saved = load_named(f"slak_nano={weights}")
    transform = saved.preprocessing.eval_transform()
    paths = sorted(stimuli.glob("*/*.png"))
    with torch.inference_mode():
        assert [one.response for one in decisions] == decide(
            torch.stack([model(transform(Image.open(path).convert("RGB"))[None])[0] for path in paths])
        )
    assert rows["slak_nano"]["trials"] == shape_bias("slak_nano", decisions).overall.trials == 3
    assert (tmp_path / "out" / "shape_bias.png").stat().st_size > 1000
    assert set(rows["slak_nano"]["categories"]) <= set(CATEGORIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["slak_nano"], "--stimuli is not set"),
        (["slak_nano", "--stimuli", "PICTURES"], "not the name of a stimulus"),
        (["--observers", "PICTURES"], "is no folder with decisions"),
        (["FILE", "--stimuli", "STIMULI"], "10 outputs"),
        (["slak_nano", "slak_nano", "--stimuli", "STIMULI"], "Several models are called 'slak_nano'"),
        (["slak_nano", "--stimuli", "STIMULI", "--output", "DONE"], "holds earlier results (shape_bias.json)"),
    ],
)
def test_wrong_arguments_of_shape_bias(
    arguments: list[str], message: str, pictures: Path, stimuli: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("slak_nano", num_classes=10)
    named = {"PICTURES": pictures, "STIMULI": stimuli, "FILE": tmp_path / "ten.safetensors", "DONE": tmp_path / "done"}
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "shape_bias.json").touch()
    if "FILE" in arguments:
        from widekernel.data import DataConfig, Preprocessing
        from widekernel.tasks.saved import SavedModel, save_model

        preprocessing = Preprocessing.resolve(DataConfig(), {"input_size": (3, 64, 64)})
        save_model(model, named["FILE"], SavedModel("slak_nano", {}, "training", 10, (), preprocessing))
    given = [str(named.get(word, word)) for word in arguments]
    given += [] if "--output" in given else ["--output", str(tmp_path / "out")]
    assert main(["shape-bias", *given]) == 2
    assert message in capsys.readouterr().err


def test_labels(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "model.safetensors").touch()
    (run / "other.pth").touch()
    assert label_of(str(run)) == label_of(str(run / "model.safetensors")) == "first"
    assert label_of(str(run / "other.pth")) == "other"
    assert label_of("slak_nano=file.pth") == label_of("slak_nano") == "slak_nano"
