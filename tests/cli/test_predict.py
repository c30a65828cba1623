"""`widekernel predict`: the results of evaluation, for images without labels, in files and pictures."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.scenes import CLASSES, PALETTE, SHAPES, make_scenes, write_coco_json, write_folder

from widekernel.cli.main import main
from widekernel.cli.prediction_output import file_stems, image_ids
from widekernel.data import Preprocessing
from widekernel.data.class_tables import published_classes, read_class_table
from widekernel.tasks.assembly import build_model
from widekernel.tasks.classification.names import class_names_of
from widekernel.tasks.network_config import DetectorConfig, SegmenterConfig
from widekernel.tasks.networks import build_detector, build_segmenter
from widekernel.tasks.saved import SavedModel, save_model

BACKBONE = "test_convnext"
FIRST = "scene_0000.png"
SHOWN = Preprocessing(64, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three generated scenes in `folder` and `coco`."""
    root, pictures = tmp_path_factory.mktemp("scenes"), make_scenes(3)
    write_folder(root / "folder", pictures[:1], pictures)
    write_coco_json(root / "coco", pictures[:1], pictures)
    return root


@pytest.fixture(scope="module")
def images(scenes: Path) -> Path:
    return scenes / "folder" / "val" / "images"


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model file of an untrained segmenter, for images at two scales in windows, each mirrored as well."""
    config = SegmenterConfig(name=BACKBONE, channels=16, auxiliary_channels=None)
    test = {"mode": "slide", "crop": [48, 48], "stride": [32, 32], "flip": True}
    details = {"colors": [list(color) for color in PALETTE], "data": {"test_scale": [128, 80]}, "test": test}
    torch.manual_seed(0)
    network = build_segmenter(config, len(CLASSES))
    return _saved(tmp_path_factory, network, config, CLASSES, "segmentation", details)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model file of an untrained detector of masks."""
    sizes = {"channels": 32, "fc_channels": 32, "proposals": 20, "max_detections": 6}
    config = DetectorConfig(name=BACKBONE, detector="mask_rcnn", score_threshold=0.0, **sizes)
    details = {"masks": True, "category_ids": [2, 3, 5, 9], "data": {"image_scale": [128, 96], "size_divisor": 32}}
    torch.manual_seed(1)
    network = build_detector(config, len(SHAPES), True)
    return _saved(tmp_path_factory, network, config, SHAPES, "detection", details)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model file of an untrained classifier of seven classes."""
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("classifier") / "net.safetensors"
    names = ("n01440764", "n01443537", "n02012849", "n03126707", "n01491361", "n01494475", "n01496331")
    save_model(build_model(BACKBONE, 7, {}), path, SavedModel(BACKBONE, {}, "training", 7, names, SHOWN))
    return path


def _saved(
    factory: pytest.TempPathFactory, network: Any, config: Any, names: tuple[str, ...], task: str, details: dict[str, Any]
) -> Path:
    path = factory.mktemp(task) / "net.safetensors"
    details = {"heads": config.heads(), **details}
    save_model(network, path, SavedModel(BACKBONE, {}, "training", len(names), names, SHOWN, task, details))
    return path


def run(*arguments: object) -> int:
    return main(["predict", *(str(argument) for argument in arguments), "--device", "cpu"])


# -- results -----------------------------------------------------------------------------------------------------------


def test_class_maps_are_those_of_evaluation(
    segmenter: Path, images: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(segmenter, images, "--output", out, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [f"scene_{number:04d}.png" for number in range(3)]
    counts = np.zeros((5, 5), np.int64)
    for line in lines:
        found = Image.open(out / "classes" / line["image"])
        assert found.mode == "P" and np.array(found.getpalette()[:15]).reshape(5, 3).tolist() == [list(c) for c in PALETTE]
        indices = np.array(found)
        assert {CLASSES.index(name) for name in line["classes"]} == set(np.unique(indices))
        assert sum(line["classes"].values()) == pytest.approx(1)
        truth = np.array(Image.open(images.parent / "masks" / line["image"]))
        np.add.at(counts, (truth, indices), 1)
        assert max(Image.open(out / "overlays" / line["image"]).size) >= 480
    assert read_class_table(out / "classes.json").colors == PALETTE

    capsys.readouterr()
    assert (
        main(
            [
                "eval",
                str(segmenter),
                "--data.root",
                str(scenes / "folder"),
                "--device",
                "cpu",
                "--json",
                "--data.workers",
                "0",
            ]
        )
        == 0
    )
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["aacc"] == pytest.approx(100 * counts.trace() / counts.sum())
    for index, line in enumerate(evaluated["classes"]):
        assert line["pixels"] == counts[index].sum() and line["accuracy"] == pytest.approx(
            100 * counts[index, index] / counts[index].sum()
        )


def test_test_settings_can_be_changed(segmenter: Path, images: Path, tmp_path: Path) -> None:
    assert run(segmenter, images / FIRST, "--output", tmp_path / "a") == 0
    whole = ("--test.mode", "whole", "--test.flip", "false", "--data.test_ratios", "[0.5,1]")
    assert run(segmenter, images / FIRST, "--output", tmp_path / "b", *whole) == 0
    maps = [np.array(Image.open(tmp_path / name / "classes" / FIRST)) for name in "ab"]
    assert (maps[0] != maps[1]).any()


def test_detections_are_those_of_evaluation(
    detector: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO

    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    content = json.loads((scenes / "coco" / "val.json").read_text())
    for entry in content["images"]:
        image = Image.open(scenes / "coco" / "pictures" / entry["file_name"])
        image.save(pictures / f"{entry['id']:012d}.png")
    assert run(detector, pictures, "--output", out, "--score_threshold", "0.2", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    results = json.loads((out / "detections.json").read_text())
    assert {entry["image_id"] for entry in results} == {entry["id"] for entry in content["images"]}
    assert {entry["category_id"] for entry in results} <= {2, 3, 5, 9} and len(results) == 18
    drawn = [item for line in lines for item in line["objects"]]
    assert len(drawn) == sum(entry["score"] >= 0.2 for entry in results)
    assert len(list((out / "overlays").iterdir())) == 3

    root = ("--data.root", str(scenes / "coco"), "--data.format", "coco_json", "--data.images", "pictures")
    assert main(["eval", str(detector), *root, "--device", "cpu", "--json", "--data.workers", "0"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    truth = COCO(str(scenes / "coco" / "val.json"))
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        assert _ap(truth, out / "detections.json", kind) == pytest.approx(evaluated[f"{name}_ap50"] / 100, abs=1e-6)
    assert [line["objects"] for line in evaluated["classes"]] == [
        sum(entry["category_id"] == number for entry in content["annotations"]) for number in (2, 3, 5, 9)
    ]


def _ap(truth: Any, results: Path, kind: str) -> float:
    from pycocotools.cocoeval import COCOeval

    measured = COCOeval(truth, truth.loadRes(str(results)), kind)
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    return float(measured.stats[1])


def test_classes_with_names_and_a_contact_sheet(
    classifier: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(classifier, images, "--output", tmp_path / "out", "--json", "--top", "3") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    for line in lines:
        shares = [entry["probability"] for entry in line["top"]]
        assert shares == sorted(shares, reverse=True) and len(shares) == 3 and 0 < sum(shares) < 1
        names = ("tench", "goldfish", "crane", "crane", "tiger shark", "hammerhead", "electric ray")
        assert all(entry["class"] == names[entry["index"]] for entry in line["top"])
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.width > 3 * 180
    assert run(classifier, images / "scene_0001.png") == 0
    out = capsys.readouterr().out
    assert out.startswith("scene_0001.png  ") and out.count(" %") == 5
    assert not Path("predictions").exists()


def test_an_archive_and_a_named_backbone(segmenter: Path, images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(images, "inside")
    archive_out, folder_out = tmp_path / "a", tmp_path / "b"
    assert run(f"{BACKBONE}={segmenter}", tmp_path / "images.tar", "--output", archive_out) == 0
    assert run(segmenter, images, "--output", folder_out) == 0
    for name in ("classes", "overlays"):
        found = (archive_out / name / "inside" / "scene_0002.png").read_bytes()
        assert found == (folder_out / name / "scene_0002.png").read_bytes()


# -- errors ------------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_and_left_out(
    segmenter: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "broken.png").write_bytes(b"nothing")
    assert run(segmenter, pictures, "--output", tmp_path / "none") == 2
    assert "None of the 1 images could be read" in capsys.readouterr().err
    Image.open(images / "scene_0000.png").save(pictures / "whole.png")
    assert run(segmenter, pictures, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "broken.png: not an image of a known format" in printed.err
    assert printed.out.startswith("whole.png  ") and printed.out.count("\n") == 1


def test_outputs_that_cannot_be_used(
    segmenter: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(segmenter, images / FIRST, "--output", out) == 0
    before = (out / "classes" / FIRST).stat().st_mtime_ns
    assert run(segmenter, images / FIRST, "--output", out) == 2
    assert "holds files. Choose another --output, or add --overwrite." in capsys.readouterr().err
    assert (out / "classes" / FIRST).stat().st_mtime_ns == before
    assert run(segmenter, images / FIRST, "--output", out, "--overwrite") == 0
    assert run(segmenter, images, "--output", images / "predictions") == 2
    assert "inside the folder of images" in capsys.readouterr().err
    assert run(segmenter, images / FIRST, "--output", out / "classes.json") == 2
    assert "which is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{net}", "missing"), "missing does not exist. Give an image"),
        (("{net}", "{empty}"), "holds no images"),
        (("nowhere/model.safetensors", "{images}"), "nowhere/model.safetensors does not exist"),
        (("slak_nano={net}", "{images}"), "holds a network on test_convnext, not on slak_nano"),
        (("{net}", "{images}", "--task", "detection"), "holds a network for segmentation, but the arguments ask for"),
        (("{net}", "{images}", "--score_threshold", "0.5"), "has no option --score_threshold"),
        (("{weights}", "{images}", "--task", "segmentation"), "does not name its classes"),
        (("{weights}", "{images}", "--task", "poses"), "task"),
        (("{net}", "{images}", "--state", "best"), "is a file"),
        (("resnet18", "{images}", "--weights", "ema"), "has one set of weights"),
        (("{weights}", "{images}", "--state", "best", "--task", "segmentation", "--data.format", "ade20k"), "is none"),
    ],
)
def test_errors(
    segmenter: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    empty, weights = tmp_path / "empty", tmp_path / "weights.pth"
    empty.mkdir()
    torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, weights)
    places = {"net": segmenter, "images": images, "empty": empty, "weights": weights}
    assert run(*(argument.format(**places) for argument in arguments), "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_of_an_unknown_task(
    segmenter: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    from widekernel.tasks.saved import read_saved
    from widekernel.tensor_files import DESCRIPTION

    values = {**read_saved(segmenter).to_dict(), "task": "poses"}
    save_file(load_file(segmenter), tmp_path / "net.safetensors", {DESCRIPTION: json.dumps(values)})
    assert run(tmp_path / "net.safetensors", images, "--output", tmp_path / "out") == 2
    assert "poses" in capsys.readouterr().err


# -- names -------------------------------------------------------------------------------------------------------------


def test_files_about_images_do_not_replace_each_other_or_leave_the_folder() -> None:
    names = ["a.jpg", "a.png", "b/a.jpg", "../../c.png", "/d.png", "A.tif", "e.x.png", "a_png.gif"]
    stems = file_stems(names)
    assert len({stem.lower() for stem in stems}) == len(names)
    assert stems[2:5] == ["b/a", "c", "d"] and stems[6] == "e.x"
    assert not any(stem.startswith("/") or ".." in stem for stem in stems)


def test_identifiers_of_images() -> None:
    assert image_ids(["000000000139.jpg", "x/000000000285.jpg"]) == {"000000000139.jpg": 139, "x/000000000285.jpg": 285}
    assert image_ids(["1.jpg", "x.jpg"]) == {"1.jpg": 1, "x.jpg": 2}
    assert image_ids(["1.jpg", "a/1.jpg"]) == {"1.jpg": 1, "a/1.jpg": 2}


def test_names_of_outputs() -> None:
    known, note = class_names_of(SavedModel("net", {}, "training", 1000, (), SHOWN))
    assert known[0] == "tench" and known[999] == "toilet tissue" and "taken as those of ImageNet-1K" in note
    assert len(set(known)) >= 998
    unknown, note = class_names_of(SavedModel("net", {}, "training", 3, (), SHOWN))
    assert unknown == ("class 0", "class 1", "class 2") and note
    assert class_names_of(SavedModel("net", {}, "training", 2, ("a", "n01440764"), SHOWN)) == (("a", "n01440764"), "")


def test_coco_has_its_category_ids() -> None:
    table = published_classes("coco")
    assert table.category_ids is not None
    assert dict(zip(table.names, table.category_ids))["toothbrush"] == 90
    assert dict(zip(table.names, table.category_ids))["stop sign"] == 13


def test_results_go_to_standard_output_while_a_bar_is_shown(
    segmenter: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    assert run(segmenter, images / FIRST, "--output", tmp_path / "out", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["image"] == FIRST
    assert "evaluating" in printed.err


def test_a_file_that_describes_nothing(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its backbone, heads and classes come from the command line, as for official checkpoints."""
    torch.manual_seed(3)
    network = build_segmenter(SegmenterConfig(name=BACKBONE, channels=16, auxiliary_channels=8), 150)
    torch.save({"state_dict": network.state_dict(), "meta": {}}, tmp_path / "net.pth")
    heads = ("--model.channels", "16", "--model.auxiliary_channels", "8", "--data.image_scale", "[128,96]")
    task = ("--task", "segmentation", "--data.format", "ade20k")
    source = f"{BACKBONE}={tmp_path / 'net.pth'}"
    assert run(source, images / FIRST, *task, *heads, "--output", tmp_path / "out") == 0, capsys.readouterr().err
    table = read_class_table(tmp_path / "out" / "classes.json")
    assert (table.names, table.colors) == (published_classes("ade20k").names, published_classes("ade20k").colors)
    assert np.array(Image.open(tmp_path / "out" / "classes" / FIRST)).shape == (96, 128)
