"""Data sets for detection: annotation files and batches."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data import scenes

from widekernel.data import BatchPlan, LoaderOptions, TrainingLoader, TrainingSamples
from widekernel.data.detection.annotation_checks import run_lengths
from widekernel.data.detection.annotations import read_coco
from widekernel.data.detection.batches import DetectionBatch, DetectionCollate
from widekernel.data.detection.config import DetectionDataConfig
from widekernel.data.detection.sources import open_detection, open_detection_splits
from widekernel.data.detection.transforms import TrainingTransform
from widekernel.errors import ConfigError, DataError

mask_tools = pytest.importorskip("pycocotools.mask", reason="masks are decoded by pycocotools")

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SMALL = {"image_scale": (160, 96), "short_sides": (64, 96), "crop_short_sides": (80,), "crop_range": (48, 72)}


@pytest.fixture(scope="module")
def made() -> tuple[list[scenes.Scene], list[scenes.Scene]]:
    return scenes.make_scenes(9), scenes.make_scenes(3, first=9)


@pytest.fixture
def own(tmp_path: Path, made: tuple) -> DetectionDataConfig:
    root = scenes.write_coco_json(tmp_path / "own", *made)
    return DetectionDataConfig(format="coco_json", root=str(root), images="pictures", **SMALL)


# -- annotation files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["coco", "coco_json"])
def test_both_forms_yield_the_scenes(form: str, tmp_path: Path, made: tuple) -> None:
    root = getattr(scenes, f"write_{form}")(tmp_path, *made)
    images = "pictures" if form == "coco_json" else None
    sources = open_detection_splits(DetectionDataConfig(format=form, root=str(root), images=images))
    for source, expected in zip(sources, made):
        assert source is not None
        assert len(source) == len(expected) and source.class_names == scenes.SHAPES
        for index, scene in enumerate(expected):
            item = source.load(index)
            assert item.image.shape[1:] == scene.labels.shape and item.id == scenes.coco_image_id(index)
            assert item.targets.boxes.tolist() == [list(instance.box) for instance in scene.instances]
            assert item.targets.labels.tolist() == [instance.shape for instance in scene.instances]
            assert item.targets.masks is not None
            for mask, instance in zip(item.targets.masks.numpy(), scene.instances, strict=True):
                assert (mask & instance.mask).sum() / (mask | instance.mask).sum() > 0.9
        assert source.shapes().tolist() == [int(scene.labels.shape[1] > scene.labels.shape[0]) for scene in expected]


def test_pictures_beside_the_annotation_file(tmp_path: Path, made: tuple) -> None:
    root = scenes.write_coco_json(tmp_path, *made)
    (root / "train.json").rename(root / "pictures" / "annotations.json")
    config = DetectionDataConfig(format="coco_json", root=str(root), train_split="pictures/annotations.json", val_split=None)
    assert len(open_detection(config, "train")) == 9
    with pytest.raises(DataError, match=r"9 of 9 images .* are not in .*data.images"):
        open_detection(replace(config, images="."), "train")


def change(config: DetectionDataConfig, edit: Callable[[dict[str, Any]], None], name: str = "train.json") -> None:
    path = Path(config.root or "") / name
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def setter(what: str, place: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        content[what][place].update(values)

    return edit


def remover(what: str, place: int, key: str) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        del content[what][place][key]

    return edit


SQUARE = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0, 1.0, 9.0]]
MISTAKES = {
    "unknown image": (setter("annotations", 1, image_id=4711), "annotation 101 belongs to the image 4711"),
    "unknown category": (setter("annotations", 1, category_id=1), "annotation 101 has the category 1,"),
    "no category": (remover("annotations", 1, "category_id"), "annotation 101 has the category None"),
    "repeated annotation": (setter("annotations", 1, id=100), "annotation 100 occurs more than once"),
    "repeated image": (setter("images", 1, id=10), "image 10 occurs more than once"),
    "repeated category": (setter("categories", 1, id=2), "category 2 occurs more than once"),
    "repeated name": (setter("categories", 1, name="disk"), "category 3 has the name 'disk' of another one"),
    "id as text": (setter("annotations", 1, id="7"), "annotation at place 1 has the id '7'"),
    "box with NaN": (setter("annotations", 1, bbox=[1.0, float("nan"), 2.0, 2.0]), "annotation 101: its bbox is [1.0, nan"),
    "infinite box": (setter("annotations", 1, bbox=[1.0, 2.0, float("inf"), 2.0]), "its bbox is [1.0, 2.0, inf"),
    "negative box": (setter("annotations", 1, bbox=[9, 9, -3, 2]), "width and height must not be negative"),
    "three numbers": (setter("annotations", 1, bbox=[9, 9, 3]), "must be four finite numbers: x, y, width, height"),
    "no box": (remover("annotations", 1, "bbox"), "annotation 101: its bbox is None"),
    "box of text": (setter("annotations", 1, bbox=["1", "2", "3", "4"]), "must be four finite numbers"),
    "negative area": (setter("annotations", 1, area=-1.0), "annotation 101: its area is -1.0"),
    "crowd": (setter("annotations", 1, iscrowd=2), "annotation 101: its iscrowd is 2"),
    "two corners": (setter("annotations", 1, segmentation=[[1, 1, 2, 2]]), "a polygon of its segmentation has 2 corners"),
    "odd": (setter("annotations", 1, segmentation=[[1, 1, 2, 2, 3, 3, 4]]), "7 numbers, but must have two for each corner"),
    "NaN in polygon": (
        setter("annotations", 1, segmentation=[[1, 1, 2, 2, 3, float("nan")]]), "is not a list of finite numbers",
    ),
    "nothing": (setter("annotations", 1, segmentation=[]), "annotation 101: it has no segmentation"),
    "run lengths": (setter("annotations", 1, segmentation={"size": [96, 128], "counts": [5]}), "add up to 96 × 128 pixels"),
    "text": (setter("annotations", 1, segmentation={"size": [96, 128], "counts": "zzz"}), "add up to 96 × 128 pixels"),
    "no text": (setter("annotations", 1, segmentation={"size": [96, 128], "counts": ""}), "add up to 96 × 128 pixels"),
    "other size": (setter("annotations", 1, segmentation={"size": [1, 2], "counts": [2]}), "run lengths are of size [1, 2]"),
    "height": (setter("images", 1, height=0), "image 17 has the height 0"),
    "file name": (setter("images", 1, file_name=""), "image 17 has the file name ''"),
    "no categories": (lambda content: content.update(categories=[]), "`categories` is empty"),
    "no images": (lambda content: content.pop("images"), "`images` must be a list, but is nothing"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_malformed_annotations_are_named(own: DetectionDataConfig, mistake: str) -> None:
    edit, text = MISTAKES[mistake]
    change(own, edit)
    with pytest.raises(DataError) as caught:
        open_detection(own, "train")
    assert text in str(caught.value)
    assert "train.json is malformed" in str(caught.value)


def test_compressed_run_lengths(own: DetectionDataConfig, made: tuple) -> None:
    """They yield the same masks as uncompressed ones, and are read as pycocotools reads them."""
    for scene in scenes.make_scenes(12, seed=5):
        for instance in scene.instances:
            form = scenes.run_lengths(instance.mask)
            encoded = mask_tools.encode(np.asfortranarray(instance.mask.astype(np.uint8)))["counts"].decode()
            assert run_lengths(encoded) == form["counts"]

    def edit(content: dict[str, Any]) -> None:
        for entry, instance in zip(content["annotations"], made[0][0].instances):
            encoded = mask_tools.encode(np.asfortranarray(instance.mask.astype(np.uint8)))
            entry["segmentation"] = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}

    change(own, edit)
    masks = open_detection(own, "train").load(0).targets.masks
    assert masks is not None
    assert np.array_equal(masks.numpy(), np.stack([instance.mask for instance in made[0][0].instances]))


def test_mistakes_are_counted(own: DetectionDataConfig) -> None:
    def edit(content: dict[str, Any]) -> None:
        for entry in content["annotations"][:12]:
            entry["bbox"] = None

    change(own, edit)
    with pytest.raises(DataError, match=r"(?s)malformed in 12 places.*annotation 100.*annotation 104.*\n  and 7 more$"):
        open_detection(own, "train")


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must hold an object"), ("\xff", "is not JSON")])
def test_other_files(own: DetectionDataConfig, text: str, message: str) -> None:
    (Path(own.root or "") / "train.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        open_detection(own, "train")


def test_masks_are_checked_only_if_they_are_wanted(own: DetectionDataConfig) -> None:
    change(own, remover("annotations", 0, "segmentation"))
    source = open_detection(replace(own, masks=False), "train")
    assert source.load(0).targets.masks is None
    with pytest.raises(DataError, match="annotation 100: it has no segmentation"):
        open_detection(own, "train")


def test_what_is_not_learned(own: DetectionDataConfig) -> None:
    """Thin and flagged boxes, boxes outside and those of area 0 are left out, crowds are kept apart; a note says so."""
    changes: list[dict[str, Any]] = [
        {"bbox": [5, 5, 0.9, 20]}, {"ignore": 1}, {"bbox": [300, 5, 20, 20]}, {"area": 0}, {"iscrowd": 1},
        {"bbox": [5, 5, 0, 9]},
    ]  # fmt: skip

    def edit(content: dict[str, Any]) -> None:
        content["annotations"] = [
            {"id": number, "image_id": 10, "category_id": 9, "bbox": [5, 5, 20, 20], "segmentation": SQUARE, **values}
            for number, values in enumerate([*changes, {}])
        ]

    change(own, edit)
    source = open_detection(own, "train")
    assert len(source) == 1, "images without annotations are left out"
    targets = source.load(0).targets
    assert targets.boxes.tolist() == [[5, 5, 25, 25]] and targets.labels.tolist() == [3]
    assert source.annotations.crowds(0).tolist() == [[5, 5, 25, 25]]
    assert "5 annotations that detectors do not learn" in source.notes[0] and "8 of 9 images" in source.notes[1]
    assert len(open_detection(replace(own, skip_empty=False), "train")) == 9


def test_images_without_objects(own: DetectionDataConfig) -> None:
    """They are held out, and can be learned from if this is wanted."""
    change(own, lambda content: content.update(annotations=content["annotations"][-1:]), "val.json")
    source = open_detection(own, "val")
    targets = source.load(0).targets
    assert len(source) == 3 and targets.boxes.shape == (0, 4) and targets.labels.dtype == torch.int64
    assert targets.masks is not None
    assert targets.masks.shape == (0, 96, 128)
    item = TrainingTransform(own, MEAN, STD)(source.load(0))
    assert item.targets.boxes.shape == (0, 4) and item.targets.masks is not None
    assert DetectionCollate()([item]).targets[0].masks.shape == (0, *DetectionCollate()([item]).images.shape[2:])  # type: ignore[union-attr]


def test_more_padding(own: DetectionDataConfig) -> None:
    batch = batches(own, 0)[0]
    height, width = batch.images.shape[2:]
    more = batch.padded(height + 32, width + 64)
    assert more.images.shape[2:] == (height + 32, width + 64)
    assert torch.equal(more.images[..., :height, :width], batch.images)
    assert not more.images[..., height:, :].any() and not more.images[..., width:].any()
    assert more[1:2] + more[3:] == batch[1:2] + batch[3:]
    for wide, narrow in zip(more.targets, batch.targets, strict=True):
        assert torch.equal(wide.boxes, narrow.boxes) and wide.masks is not None and narrow.masks is not None
        assert torch.equal(wide.masks[..., :height, :width], narrow.masks) and wide.masks.sum() == narrow.masks.sum()
        assert wide.masks.shape[1:] == more.images.shape[2:]


def test_small_images_are_not_learned(own: DetectionDataConfig) -> None:
    with pytest.raises(DataError, match=r"None of the 9 images .* data.min_size \(200\)"):
        open_detection(replace(own, min_size=200), "train")


def test_files_that_do_not_fit(own: DetectionDataConfig) -> None:
    root = Path(own.root or "")
    picture = root / "pictures" / "train_scene_0000.png"
    Image.open(picture).resize((64, 48)).save(picture)
    with pytest.raises(
        DataError, match=r"train_scene_0000.png: it has 64×48 pixels, but train.json says 128×96 \(image 10\)"
    ):
        open_detection(own, "train").load(0)
    picture.unlink()
    with pytest.raises(DataError, match=r"1 of 9 images .*train_scene_0000.png"):
        open_detection(own, "train")


def test_both_splits_need_the_same_categories(own: DetectionDataConfig) -> None:
    change(own, lambda content: content["categories"].reverse(), "val.json")
    with pytest.raises(DataError, match=r"different categories \(\(2, 'disk'\) and \(9, 'ring'\)\)"):
        open_detection_splits(own)


def test_labels_follow_the_order_of_the_file(own: DetectionDataConfig) -> None:
    before = open_detection(own, "train").load(0).targets.labels
    change(own, lambda content: content["categories"].reverse())
    source = open_detection(own, "train")
    assert source.class_names == scenes.SHAPES[::-1] and torch.equal(source.load(0).targets.labels, 3 - before)


def test_missing_package(own: DetectionDataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("pycocotools"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'widekernel\[detection\]'"):
        open_detection(own, "train")
    assert len(open_detection(replace(own, masks=False), "train")) == 9, "boxes alone do not need it"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"format": "voc"}, "data.format 'voc' is unknown"),
        ({"image_scale": (800, 1333)}, "data.image_scale is (800, 1333)"),
        ({"short_sides": ()}, "data.short_sides is ()"),
        ({"crop_range": (600, 384)}, "data.crop_range is (600, 384)"),
        ({"flip": -0.1}, "data.flip is -0.1"),
        ({"size_divisor": 0}, "data.size_divisor is 0"),
        ({"images": "pictures"}, "data.images is 'pictures', but data.format is 'coco'"),
        ({"max_unreadable": -1}, "data.max_unreadable is -1"),
    ],
)
def test_settings_out_of_range(values: dict, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DetectionDataConfig(**values)
    assert text in str(caught.value)


# -- loading ---------------------------------------------------------------------------------------------------------


def batches(config: DetectionDataConfig, workers: int, skip: int = 0) -> list[DetectionBatch]:
    source = open_detection(config, "train")
    samples = TrainingSamples(source, TrainingTransform(config, MEAN, STD), 3, DetectionCollate(config.size_divisor))
    loader = TrainingLoader(samples, LoaderOptions(workers), BatchPlan(2), groups=source.shapes())
    return [batch.content for batch in loader.epoch(2, skip)]


def test_batches_depend_only_on_seed_and_position(own: DetectionDataConfig) -> None:
    whole, others, resumed = batches(own, 0), batches(own, 2), batches(own, 0, skip=2)
    assert len(whole) == 4 and len(resumed) == 2
    for number, batch in enumerate(whole):
        for other in [others[number], *([resumed[number - 2]] if number >= 2 else [])]:
            assert isinstance(other, DetectionBatch) and torch.equal(batch.images, other.images)
            assert batch.sizes == other.sizes and batch.ids == other.ids
            for ours, theirs in zip(batch.targets, other.targets, strict=True):
                assert torch.equal(ours.boxes, theirs.boxes) and ours.masks is not None and theirs.masks is not None
                assert torch.equal(ours.masks, theirs.masks)
    shapes = [{number % 3 == 2 for number in ((id - 10) // 7 for id in batch.ids)} for batch in whole]
    assert sum(len(each) == 1 for each in shapes) >= 3


def test_annotations_of_one_image_keep_their_order(own: DetectionDataConfig) -> None:
    """Annotations of several images may be mixed in the file."""
    path = Path(own.root or "") / "train.json"
    before = read_coco(path, masks=True)

    def edit(content: dict[str, Any]) -> None:
        content["annotations"].sort(key=lambda entry: (entry["id"] % 3, entry["id"]))

    change(own, edit)
    after = read_coco(path, masks=True)
    order = sorted(range(int(before.starts[1])), key=lambda place: ((100 + place) % 3, place))
    assert torch.equal(after.targets(0).boxes, before.targets(0).boxes[order])
    assert torch.equal(after.targets(0).masks, before.targets(0).masks[order])  # type: ignore[arg-type, index]
    assert torch.equal(after.targets(4).boxes.sum(0), before.targets(4).boxes.sum(0))
