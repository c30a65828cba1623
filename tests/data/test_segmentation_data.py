"""Data sets for segmentation: files, labels and batches."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data import scenes

from widekernel.data import (
    BatchPlan,
    EvaluationLoader,
    EvaluationSamples,
    LoaderOptions,
    Shard,
    TrainingLoader,
    TrainingSamples,
)
from widekernel.data.class_tables import colors_of, published_classes, read_class_table
from widekernel.data.segmentation.batches import SegmentationBatch, SegmentationViews
from widekernel.data.segmentation.config import SegmentationDataConfig
from widekernel.data.segmentation.labels import LabelTable
from widekernel.data.segmentation.sources import open_segmentation
from widekernel.data.segmentation.transforms import EvaluationTransform, TrainingTransform
from widekernel.data.worker_faults import LoaderError
from widekernel.errors import ConfigError, DataError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SMALL = {"image_scale": (160, 96), "crop_size": 64}


@pytest.fixture(scope="module")
def made() -> tuple[list[scenes.Scene], list[scenes.Scene]]:
    return scenes.make_scenes(6), scenes.make_scenes(3, first=6)


@pytest.fixture
def plain(tmp_path: Path, made: tuple) -> SegmentationDataConfig:
    return SegmentationDataConfig(root=str(scenes.write_folder(tmp_path / "plain", *made)), **SMALL)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "ade20k", "cityscapes"])
def test_every_form_yields_the_same_scenes(form: str, tmp_path: Path, made: tuple) -> None:
    root = getattr(scenes, f"write_{form}")(tmp_path, *made)
    config = SegmentationDataConfig(format=form, root=str(root))
    for part, expected in zip(("train", "val"), made):
        source = open_segmentation(config, part)
        assert len(source) == len(expected)
        found = sorted((source.load(index) for index in range(len(source))), key=lambda item: item.name[-24:])
        names = [source.sample_name(index) for index in range(len(source))]
        assert names == sorted(names)
        by_content = {item.labels.numpy().tobytes() for item in found}
        assert by_content == {scene.labels.tobytes() for scene in expected}
        assert all(item.image.dtype == torch.uint8 and item.labels.dtype == torch.uint8 for item in found)
    assert source.class_names[0] == {"folder": "ground", "ade20k": "wall", "cityscapes": "road"}[form]


def test_numbers_of_ade20k(tmp_path: Path, made: tuple) -> None:
    """0 becomes the ignored value, the others one less; the ignored value stays."""
    root = scenes.write_ade20k(tmp_path, *made)
    path = root / "annotations" / "training" / "scene_0000.png"
    raw = np.array(Image.open(path))
    raw[:5], raw[5:9], raw[9:12] = 0, 255, 150
    Image.fromarray(raw).save(path)
    labels = open_segmentation(SegmentationDataConfig(format="ade20k", root=str(root)), "train").load(0).labels.numpy()
    assert (labels[:9] == 255).all() and (labels[9:12] == 149).all() and (labels[12:] == raw[12:] - 1).all()


def test_label_ids_of_cityscapes(tmp_path: Path, made: tuple) -> None:
    """Without files of training numbers, those with the original ones are translated."""
    root = scenes.write_cityscapes(tmp_path, *made)
    published = published_classes("cityscapes").label_ids
    assert published is not None
    table = np.full(256, 0, np.uint8)
    table[: len(published)] = published
    for path in list((root / "gtFine").rglob("*labelTrainIds.png")):
        Image.fromarray(table[np.array(Image.open(path))]).save(path.with_name(path.name.replace("TrainIds", "Ids")))
    config = SegmentationDataConfig(format="cityscapes", root=str(root))
    before = [open_segmentation(config, "val").load(index).labels for index in range(3)]
    for path in list((root / "gtFine").rglob("*labelTrainIds.png")):
        path.unlink()
    after = [open_segmentation(config, "val").load(index).labels for index in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    path = next((root / "gtFine" / "val").rglob("*labelIds.png"))
    Image.fromarray(np.full_like(np.array(Image.open(path)), 3)).save(path)  # "out of roi", which is not evaluated
    assert any((open_segmentation(config, "val").load(index).labels == 255).all() for index in range(3))


def test_more_classes_than_8_bits_hold(plain: SegmentationDataConfig) -> None:
    root = Path(plain.root or "")
    (root / "classes.json").unlink()
    (root / "classes.txt").write_text("\n".join(f"class {index}" for index in range(1000)))
    path = root / "train" / "masks" / "scene_0000.png"
    numbers = np.array(Image.open(path)).astype(np.uint16)
    numbers[0, 0], numbers[0, 1] = 999, 65535
    Image.fromarray(numbers).save(path)
    source = open_segmentation(replace(plain, ignore_index=65535), "train")
    labels = source.load(0).labels
    assert labels.dtype == torch.int32 and labels[0, :2].tolist() == [999, 65535] and len(source.class_names) == 1000


def spoil(root: Path, what: str) -> None:
    masks, images = root / "train" / "masks", root / "train" / "images"
    first = masks / "scene_0000.png"
    if what == "missing":
        first.unlink()
    elif what == "size":
        Image.open(first).resize((50, 40)).save(first)
    elif what == "turned":
        Image.open(first).rotate(90, expand=True).save(first)
    elif what == "colors":
        Image.open(first).convert("RGB").save(first)
    elif what == "jpeg":
        Image.open(first).save(first.with_suffix(".jpg"))
        first.unlink()
    elif what == "twins":
        shutil.copy(images / "scene_0000.png", images / "scene_0000.jpg")
    elif what == "no images":
        shutil.rmtree(images)
    elif what == "empty":
        shutil.rmtree(masks)
        masks.mkdir()
    elif what == "circle":
        (masks / "again").symlink_to(root)
    elif what == "no classes":
        (root / "classes.json").unlink()


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("missing", ["1 of 6 images", "scene_0000.png", "no label file"]),
        ("size", ["scene_0000.png", "50×40", "128×96"]),
        ("turned", ["scene_0000.png", "96×128", "data.exif_transpose"]),
        ("colors", ["scene_0000.png", "mode RGB", "class indices"]),
        ("jpeg", ["scene_0000.jpg", "JPEG", "PNG"]),
        ("twins", ["scene_0000.jpg", "scene_0000.png", "Remove one"]),
        ("no images", ["images does not exist", "data.root"]),
        ("empty", ["masks contains no label files"]),
        ("circle", ["again is a link", "Remove it"]),
        ("no classes", ["classes.json or classes.txt", "data.classes"]),
    ],
)
def test_malformed_sets_are_refused_when_they_are_opened(plain: SegmentationDataConfig, what: str, parts: list[str]) -> None:
    spoil(Path(plain.root or ""), what)
    with pytest.raises(DataError) as caught:
        open_segmentation(plain, "train")
    assert [part for part in parts if part not in str(caught.value)] == []


def test_numbers_out_of_range_stop_the_loading(plain: SegmentationDataConfig) -> None:
    path = Path(plain.root or "") / "train" / "masks" / "scene_0002.png"
    numbers = np.array(Image.open(path))
    numbers[:2, :3] = 17
    Image.fromarray(numbers).save(path)
    source = open_segmentation(plain, "train")
    with pytest.raises(
        DataError, match=r"scene_0002.png: 6 pixels are out of range, such as 17: allowed are 0 to 4, or 255"
    ):
        source.load(2)
    samples = TrainingSamples(source, TrainingTransform(plain, MEAN, STD), 0, SegmentationBatch.collate)
    with pytest.raises(
        LoaderError,
        match=r"scene_0002.png failed: .*6 pixels are out of range, such as 17.*data.reduce_zero_label\.$",
    ):
        list(TrainingLoader(samples, LoaderOptions(), BatchPlan(6)).epoch(0))


def test_masks_of_0_and_255_are_noted(plain: SegmentationDataConfig) -> None:
    """Their objects are taken for pixels without a class, which no error shows."""
    assert not open_segmentation(plain, "train").notes
    for path in (Path(plain.root or "") / "train" / "masks").iterdir():
        Image.fromarray(np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    (note,) = open_segmentation(plain, "train").notes
    assert "masks hold only the class 'ground' (6 of 6 were looked at). The number 255 means" in note
    assert not open_segmentation(plain, "val").notes


def test_damaged_files_are_left_out(plain: SegmentationDataConfig) -> None:
    """A damaged image or label file counts as unreadable: it is replaced in training and left out of evaluation."""
    root = Path(plain.root or "")
    path = root / "train" / "masks" / "scene_0001.png"
    path.write_bytes(path.read_bytes()[:60])
    path = root / "val" / "images" / "scene_0002.png"
    path.write_bytes(b"nothing")
    samples = TrainingSamples(open_segmentation(plain, "train"), TrainingTransform(plain, MEAN, STD), 0)
    sample = samples[0, 1]
    assert [image.name for image in sample.unreadable] == ["scene_0001.png"]
    assert torch.equal(sample.item[0], TrainingSamples(samples.source, samples.transform, 0)[0, 1].item[0])
    held_out = EvaluationSamples(open_segmentation(plain, "val"), EvaluationTransform(plain, MEAN, STD))
    assert held_out[2].item is None and held_out[2].unreadable[0].name == "scene_0002.png"


def test_masks_without_an_image_are_noted(plain: SegmentationDataConfig) -> None:
    (Path(plain.root or "") / "val" / "images" / "scene_0000.png").unlink()
    source = open_segmentation(plain, "val")
    assert len(source) == 2 and "1 label files" in source.notes[0]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"format": "voc"}, "data.format 'voc' is unknown"),
        ({"ignore_index": -1}, "data.ignore_index is -1"),
        ({"image_scale": (512, 2048)}, "data.image_scale is (512, 2048)"),
        ({"test_scale": (0, 0)}, "data.test_scale is (0, 0)"),
        ({"ratio_range": (2.0, 0.5)}, "data.ratio_range is (2.0, 0.5)"),
        ({"crop_size": 0}, "data.crop_size is 0"),
        ({"cat_max_ratio": 0.0}, "data.cat_max_ratio is 0.0"),
        ({"flip": 1.5}, "data.flip is 1.5"),
        ({"test_ratios": ()}, "data.test_ratios is ()"),
        ({"std": (58.0, 57.0, 57.0)}, "data.std is (58.0, 57.0, 57.0)"),
        ({"workers": -1}, "data.workers is -1"),
        ({"timeout": float("nan")}, "data.timeout is nan, but must be finite"),
    ],
)
def test_settings_out_of_range(values: dict, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SegmentationDataConfig(**values)
    assert text in str(caught.value)


def test_missing_folders_and_splits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.root is not set"):
        open_segmentation(SegmentationDataConfig(), "train")
    with pytest.raises(DataError, match="does not exist"):
        open_segmentation(SegmentationDataConfig(root=str(tmp_path / "nowhere")), "train")
    with pytest.raises(ConfigError, match=r"data.val_split is null"):
        open_segmentation(SegmentationDataConfig(root=str(tmp_path), val_split=None), "val")


def test_a_class_may_not_have_the_ignored_number() -> None:
    with pytest.raises(DataError, match=r"data.ignore_index is 255"):
        LabelTable(256, 255)
    with pytest.raises(DataError, match=r"data.ignore_index is 255"):
        LabelTable(255, 255, reduce_zero=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[]", "must hold a name in each line"),
        ("a.json", "{", "cannot be read"),
        ("a.json", '["a", "b", "a"]', "names 'a' more than once"),
        ("a.json", '{"classes": ["a", "b"], "palette": [[1, 2, 3]]}', "1 entries, but must be a list of 2 colors"),
        ("a.json", '{"classes": ["a"], "palette": [[1, 2, 300]]}', r"the color \[1, 2, 300\]"),
        ("a.txt", "\n\n", "must hold a name in each line"),
    ],
)
def test_malformed_files_of_classes(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_table(tmp_path / name)


def test_colors_differ() -> None:
    colors = colors_of([f"class {index}" for index in range(60)])
    assert len(set(colors)) == 60
    assert colors_of(published_classes("coco").names) == published_classes("coco").colors


# -- loading ---------------------------------------------------------------------------------------------------------


def batches(config: SegmentationDataConfig, workers: int, plan: BatchPlan, rank: int = 0, skip: int = 0) -> list:
    samples = TrainingSamples(
        open_segmentation(config, "train"), TrainingTransform(config, MEAN, STD), 5, SegmentationBatch.collate
    )
    return [batch.content for batch in TrainingLoader(samples, LoaderOptions(workers), plan, rank).epoch(1, skip)]


def test_batches_depend_only_on_seed_and_position(plain: SegmentationDataConfig) -> None:
    """Whatever the number of workers and processes, and from whatever step on."""
    whole = batches(plain, 0, BatchPlan(2))
    assert [tuple(batch.images.shape) for batch in whole] == [(2, 3, 64, 64)] * 3
    assert all(isinstance(batch, SegmentationBatch) for batch in whole)
    others = batches(plain, 2, BatchPlan(2))
    resumed = batches(plain, 0, BatchPlan(2), skip=1)
    halves = [batches(plain, 0, BatchPlan(2, world_size=2), rank) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert torch.equal(batch.images, others[number].images) and torch.equal(batch.labels, others[number].labels)
        assert torch.equal(batch.images, torch.cat([halves[0][number].images, halves[1][number].images]))
        if number:
            assert torch.equal(batch.labels, resumed[number - 1].labels)


def test_held_out_images_arrive_once(plain: SegmentationDataConfig) -> None:
    samples = EvaluationSamples(
        open_segmentation(plain, "val"), EvaluationTransform(plain, MEAN, STD), SegmentationViews.collate
    )
    names = []
    for rank in range(2):
        for batch in EvaluationLoader(samples, 1, LoaderOptions(), Shard(rank, 2)):
            names += batch.content.names
            moved = batch.to(torch.device("cpu"), torch.channels_last).content
            assert isinstance(moved, SegmentationViews) and moved.sizes == batch.content.sizes
    assert sorted(names) == [f"scene_000{number}.png" for number in range(3)]
