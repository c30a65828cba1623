"""Pipelines, annotation rules and class tables of the official code for segmentation and detection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.downstream.arrays import filler
from widekernel.data.class_tables import published_classes
from widekernel.data.detection import transforms as detection
from widekernel.data.detection.annotations import read_coco
from widekernel.data.detection.batches import AnnotatedImage, DetectionCollate
from widekernel.data.detection.config import DetectionDataConfig
from widekernel.data.detection.sources import open_detection
from widekernel.data.rescaling import rescaled_size
from widekernel.data.segmentation import transforms as segmentation
from widekernel.data.segmentation.batches import LabeledScene
from widekernel.data.segmentation.config import SegmentationDataConfig
from widekernel.dense.detection.structures import ImageSize, Targets

GOLDEN = "parity/downstream/golden"
IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
XL = (127.5,) * 3, (127.5,) * 3


def rows(shared: Path) -> list[dict[str, Any]]:
    return json.loads((shared / GOLDEN / "test_pipelines.json").read_text())["rows"]


def ours(shared: Path, row: dict[str, Any]) -> tuple[torch.Tensor, ImageSize]:
    """Return our image of a row, and its size."""
    picture = filler(shared).make_image(row["image_seed"], *row["image_hw"])
    pixels = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    mean, std = (
        tuple(value / 255 for value in values) for values in (IMAGENET if row["mean"] > 100 and row["mean"] < 125 else XL)
    )
    if row["size_divisor"]:
        config = DetectionDataConfig(image_scale=tuple(row["img_scale"]))
        targets = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        item = detection.EvaluationTransform(config, mean, std)(AnnotatedImage(pixels, targets))
        return DetectionCollate(row["size_divisor"])([item]).images[0], item.size
    ratios = tuple(row["img_ratios"] or (1.0,))
    config = SegmentationDataConfig(image_scale=tuple(row["img_scale"]), test_ratios=ratios)
    scene = LabeledScene(pixels, torch.zeros(row["image_hw"], dtype=torch.uint8))
    views = segmentation.EvaluationTransform(config, mean, std)(scene)
    number = int(row["key"].rpartition("aug")[2]) // (2 if row["has_flips"] else 1)
    view = views.views[number]
    return view.flip(-1) if row["flip"] else view, views.sizes[number]


def test_pipelines_of_evaluation(shared: Path) -> None:
    """Sizes and factors are equal; pixels differ by at most the one level between two roundings of the same value."""
    stored = np.load(shared / GOLDEN / "test_pipelines.npz")
    found = rows(shared)
    flipped = {row["key"].rpartition("_aug")[0] for row in found if row["flip"]}
    largest = 0.0
    for row in found:
        image, size = ours(shared, {**row, "has_flips": row["key"].rpartition("_aug")[0] in flipped})
        assert list(image.shape) == row["tensor_shape"], row["key"]
        assert [size.height, size.width] == row["img_shape"][:2], row["key"]
        assert [size.scale_x, size.scale_y] == row["scale_factor"][:2], row["key"]
        assert size.original == tuple(row["image_hw"])
        key = row["key"]
        values = image.flatten()[torch.from_numpy(stored[f"{key}|idx"]).long()].numpy()
        std = np.repeat(np.array(IMAGENET[1] if 100 < row["mean"] < 125 else XL[1]), image.shape[1] * image.shape[2])
        levels = np.abs(values - stored[f"{key}|val"]) * std[stored[f"{key}|idx"]]
        largest = max(largest, levels.max())
    assert largest <= 1.001


def test_sizes_of_resized_images(shared: Path) -> None:
    table = json.loads((shared / GOLDEN / "test_pipelines.json").read_text())["rescale_size"]
    assert len(table) > 30
    for scale, (width, height), (new_width, new_height) in table:
        assert rescaled_size(height, width, tuple(scale)) == (new_height, new_width)


def test_what_the_training_loader_keeps(shared: Path, tmp_path: Path) -> None:
    rules = json.loads((shared / GOLDEN / "coco_eval_s750.json").read_text())
    content = read_coco(shared / GOLDEN / "coco_gt_s750.json", masks=True)
    assert {str(number): index for index, number in enumerate(content.category_ids)} == rules["cat2label"]
    for name in content.file_names:
        (tmp_path / name).touch()
    (tmp_path / "train.json").write_bytes((shared / GOLDEN / "coco_gt_s750.json").read_bytes())
    source = open_detection(DetectionDataConfig(format="coco_json", root=str(tmp_path)), "train")
    assert source.annotations.images[source.places].tolist() == rules["train_images"]
    for place, expected in zip(source.places, rules["parsed"], strict=True):
        targets = content.targets(place)
        assert content.images[place] == expected["image_id"]
        assert targets.boxes.tolist() == expected["bboxes"]
        assert targets.labels.tolist() == expected["labels"]
        assert targets.masks is not None
        assert len(targets.masks) == expected["masks"]
        assert content.crowds(place).tolist() == expected["bboxes_ignore"]


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "coco"])
def test_class_tables(shared: Path, name: str) -> None:
    expected = json.loads((shared / GOLDEN / "datasets.json").read_text())[name]
    table = published_classes(name)
    assert list(table.names) == [text.strip() for text in expected["classes"]]
    assert [list(color) for color in table.colors] == expected["palette"]
    assert table.label_ids == (tuple(expected["label_id_of_class"]) if name == "cityscapes" else None)
