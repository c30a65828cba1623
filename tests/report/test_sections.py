"""The data of the sections on the model, its training and its results, without a page."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from tests.report.conftest import CLASSES, QUICK
from widekernel.data import open_split
from widekernel.engine.metrics_log import read_metrics
from widekernel.errors import ConfigError, DataError, WidekernelError
from widekernel.files import sha256_of
from widekernel.report.accuracy import Measured, _by_class, measured
from widekernel.report.circumstances import circumstances
from widekernel.report.collecting import Report, collect
from widekernel.report.comparison import Comparison
from widekernel.report.costs import Costs
from widekernel.report.identity import identity
from widekernel.report.images import find_images
from widekernel.report.parts import Missing, ReportOptions, silent
from widekernel.report.plain_data import plain_data
from widekernel.report.receptive_field import ReceptiveField, receptive_field
from widekernel.report.subject import Subject, open_subject
from widekernel.report.training import Training, training
from widekernel.weights.catalog import list_checkpoints


def test_all_sections_have_a_form_in_json(report: Report) -> None:
    data = json.loads(json.dumps(plain_data(report), allow_nan=False))
    assert data["accuracy"]["top1"] == report.accuracy.top1
    assert data["masks"]["layers"] and data["comparison"]["rows"] and data["acceleration"]
    assert data["identity"]["facts"][0] == ["Model", "slak_nano"]
    with pytest.raises(TypeError, match="holds a object"):
        plain_data(replace(report, text=object()))


def test_identity_of_a_run(subject: Subject, run_folder: Path) -> None:
    found = identity(subject)
    assert found.name == "slak_nano" and found.form == "training" and not found.is_random
    assert "for 6 steps" in found.origin and "random weights" in found.origin
    facts = dict(found.weights)
    assert facts["SHA-256"] == sha256_of(run_folder / "model.safetensors")
    assert facts["Images"] == "24" and facts["Held-out images"] == "9"
    assert [row[:3] for row in found.stages] == [(f"stages.{n}", blocks, 8) for n, blocks in enumerate((1, 1, 2, 1))]
    assert found.stages[0][3] == "31×3 + 3×31 + 3×3"


def test_identity_of_a_name_a_file_and_a_published_checkpoint(named: Subject, other: Subject, tmp_path: Path) -> None:
    assert identity(named).is_random and identity(named).weights == ()
    assert not identity(other).is_random and "in the file" in identity(other).origin
    weights = tmp_path / "official.pth"
    torch.save(timm.create_model("slak_nano").state_dict(), weights)
    by_file = open_subject(f"slak_nano={weights}")
    assert by_file.file == weights and not identity(by_file).is_random
    first = list_checkpoints(task="classification")[0]
    described = identity(replace(named, text=first.name))
    assert (
        not described.is_random and first.title in described.origin and dict(described.weights)["License"] == first.license
    )


def test_settings_and_versions(subject: Subject, named: Subject) -> None:
    found = circumstances(subject)
    assert not isinstance(found.settings, Missing)
    settings = {setting.key: setting for setting in found.settings}
    assert settings["model.name"].value == "slak_nano" and settings["model.name"].is_changed
    assert settings["model.pretrained"].value == "false" and not settings["model.pretrained"].is_changed
    assert settings["sparsity.dynamic.update_interval"].value == "2"
    assert found.trained_with["torch"] == found.versions["PyTorch"] == torch.__version__
    assert not [name for name in found.trained_with if "digest" in name]
    missing = circumstances(named).settings
    assert isinstance(missing, Missing) and "widekernel report runs/NAME" in missing.advice


def test_training(subject: Subject, named: Subject, run_folder: Path) -> None:
    found = training(subject)
    rows = read_metrics(run_folder / "metrics.jsonl")
    assert isinstance(found, Training) and found.is_finished
    assert found.steps == 6 and found.epochs == 2 and len(found.evaluations) == 2
    assert found.evaluations[-1][2]["val_top1"] == found.final["val_top1"] == rows[-1]["val_top1"]
    assert found.best is not None and found.best[1] in (3, 6)
    assert isinstance(training(named), Missing)


def test_training_of_damaged_metrics(run_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    (copy / "metrics.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl cannot be read"):
        training(open_subject(str(copy)))
    (copy / "metrics.jsonl").unlink()
    missing = training(open_subject(str(copy)))
    assert isinstance(missing, Missing) and "logged nothing" in missing.reason


def test_accuracy_is_that_of_the_network_itself(subject: Subject) -> None:
    images = find_images(subject, None)
    found = measured(subject, images, QUICK, silent)
    assert isinstance(found, Measured) and images.of_the_run
    source, transform = open_split(images.config, "val"), subject.saved.preprocessing.eval_transform()
    loaded = [source.load(index) for index in range(len(source))]
    with torch.inference_mode():
        predicted = subject.model(torch.stack([transform(image) for image, _ in loaded])).argmax(1).tolist()
    pairs = Counter(zip((target for _, target in loaded), predicted, strict=True))
    assert found.images == len(source) == 9
    assert found.top1 == pytest.approx(100 * sum(n for (t, p), n in pairs.items() if t == p) / 9)
    assert found.recorded == pytest.approx(found.top1)
    assert found.matrix == tuple(tuple(pairs[t, p] for p in range(3)) for t in range(3))
    assert found.names == tuple(sorted(CLASSES)) and [each.images for each in found.classes] == [3, 3, 3]
    assert sum(row[2] for row in found.confusions) == 9 - sum(each.right for each in found.classes)
    assert list(found.worst) == sorted(found.classes, key=lambda each: (each.share, each.name))


def test_accuracy_on_a_random_part(subject: Subject) -> None:
    found = measured(subject, find_images(subject, None), replace(QUICK, eval_images=4), silent)
    assert isinstance(found, Measured)
    assert found.images == 4 and found.available == 9 and found.recorded is None


def test_classes_without_images_are_left_out() -> None:
    names = {0: "a", 1: "b", 2: "c"}
    rows = _by_class(Counter({(0, 0): 2, (0, 2): 1, (2, 0): 1, (2, 1): 1}), (0, 1, 2), names)
    assert [(row.name, row.images, row.right, row.taken_for, row.taken) for row in rows] == [
        ("a", 3, 2, "c", 1),
        ("c", 2, 0, "a", 1),
    ]


def test_images_of_others(named: Subject, pictures: Path, run_folder: Path, subject: Subject) -> None:
    unlabeled = find_images(named, str(pictures))
    assert isinstance(unlabeled.labeled, Missing) and len(unlabeled) == 5
    assert len(list(unlabeled.draw(3, seed=0))) == 3
    first, again = ([np.asarray(image).sum() for image in unlabeled.draw(5, seed=1)] for _ in range(2))
    assert first == again
    missing = measured(named, unlabeled, QUICK, silent)
    assert isinstance(missing, Missing) and "no classes" in missing.reason
    labeled = find_images(named, str(run_folder.parent / "images" / "val"))
    assert len(labeled) == 9 and not labeled.of_the_run
    foreign = measured(named, labeled, QUICK, silent)
    assert isinstance(foreign, Missing) and "not those of the network" in foreign.reason
    none = find_images(named, None)
    assert len(none) == 0 and isinstance(receptive_field(named, none, QUICK, silent), Missing)
    with pytest.raises(DataError, match="does not exist"):
        find_images(named, str(pictures / "none"))


def test_images_of_a_run_that_have_gone(run_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    config = (copy / "config.yaml").read_text().replace(str(run_folder.parent / "images"), str(tmp_path / "gone"))
    (copy / "config.yaml").write_text(config)
    found = find_images(open_subject(str(copy)), None)
    assert isinstance(found.labeled, Missing) and "gone" in found.labeled.reason and "--data DIR" in found.labeled.advice


def test_receptive_field(subject: Subject) -> None:
    steps: list[tuple[int, int]] = []
    found = receptive_field(
        subject, find_images(subject, None), QUICK, lambda what, done, total: steps.append((done, total))
    )
    assert isinstance(found, ReceptiveField)
    assert found.scores.shape == (32, 32) and found.scores.max() == 1 and found.images == 2
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_receptive_field_of_a_size_that_the_network_does_not_take(subject: Subject, pictures: Path) -> None:
    vit = open_subject("test_vit")
    missing = receptive_field(vit, find_images(vit, str(pictures)), replace(QUICK, erf_size=33), silent)
    assert isinstance(missing, Missing) and "33 × 33" in missing.reason and "--erf_size" in missing.advice


def test_comparison(report: Report) -> None:
    found = report.comparison
    assert isinstance(found, Comparison) and found.same_images
    rows = {row.label: row for row in found.rows}
    assert rows["Model"].first == "slak_nano" and rows["Model"].second == "replknet_nano"
    assert rows["Parameters, dense"].better == 1 and rows["Model"].better == 0
    assert not isinstance(found.similarity, Missing)
    assert found.similarity.matrix.shape == (4, 4) and found.similarity.images == 6


def test_a_network_of_others(pictures: Path) -> None:
    resnet = open_subject("test_resnet")
    found = collect(resnet, find_images(resnet, str(pictures)), replace(QUICK, time=False))
    assert isinstance(found.accuracy, Missing) and isinstance(found.comparison, Missing)
    assert isinstance(found.costs, Costs) and isinstance(found.field, ReceptiveField)


@pytest.mark.parametrize(
    "changes", [{"seconds": 0}, {"batch_sizes": ()}, {"batch_sizes": (0,)}, {"seed": -1}, {"erf_size": 0}]
)
def test_options_out_of_range(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        ReportOptions(**changes)  # type: ignore[arg-type]


def test_weights_of_a_name() -> None:
    with pytest.raises(WidekernelError, match="--weights ema is for run folders"):
        open_subject("slak_nano", weights="ema")
