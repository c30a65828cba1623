"""Average precision: agreement with pycocotools, absent classes, several processes."""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data import scenes
from torch import Tensor, nn
from typing_extensions import override

from widekernel.data import EvaluationLoader, EvaluationSamples, LoaderOptions, Shard
from widekernel.data.detection.batches import DetectionCollate
from widekernel.data.detection.config import DetectionDataConfig
from widekernel.data.detection.sources import open_detection
from widekernel.data.detection.transforms import EvaluationTransform
from widekernel.dense.detection.structures import Detections
from widekernel.engine.evaluation import EvaluationOptions, evaluate
from widekernel.engine.processes import Processes
from widekernel.errors import ArgumentError
from widekernel.tasks.detection.average_precision import MAX_DETECTIONS, GroundTruth
from widekernel.tasks.detection.evaluation import CocoScores, metrics_of

pytest.importorskip("pycocotools", reason="average precision is computed by pycocotools")
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

COUNT = 8


@pytest.fixture(scope="module")
def made() -> list[scenes.Scene]:
    return scenes.make_scenes(COUNT)


@pytest.fixture
def truth(tmp_path: Path, made: list[scenes.Scene]) -> GroundTruth:
    path = tmp_path / "val.json"
    content = scenes.coco_content(made, [f"{number}.png" for number in range(COUNT)])
    content["annotations"][2]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    return GroundTruth(path, masks=True)


def detections_of(scene: scenes.Scene, seed: int) -> Detections:
    """Return shifted copies of the objects, some with another class, and some that are nowhere, by falling score."""
    random = np.random.RandomState(seed)
    height, width = scene.labels.shape
    boxes, labels, masks = [], [], []
    for instance in [*scene.instances, *scene.instances]:
        shift = random.randint(-4, 5, 2)
        masks.append(np.roll(instance.mask, shift, (0, 1)))
        boxes.append(np.array(instance.box) + random.uniform(-4, 4, 4))
        labels.append(instance.shape if random.uniform() < 0.8 else random.randint(4))
    for _ in range(3):
        mask = np.zeros((height, width), bool)
        top, left = random.randint(0, height - 20), random.randint(0, width - 20)
        mask[top : top + 20, left : left + 20] = True
        masks.append(mask)
        boxes.append(np.array([left, top, left + 20, top + 20], float))
        labels.append(random.randint(4))
    scores = np.sort(random.uniform(0, 1, len(boxes)).astype(np.float32))[::-1]
    parts = np.stack(boxes).astype(np.float32), scores.copy(), np.array(labels, np.int64), np.stack(masks)
    return Detections(*map(torch.from_numpy, parts))


def reference(truth: GroundTruth, found: dict[int, Detections], kind: str) -> np.ndarray:
    """Return the statistics of pycocotools' own summary, from a result list as published code writes it."""
    entries: list[dict[str, Any]] = []
    for image_id, detections in found.items():
        for box, score, label, mask in zip(*(part.numpy() for part in detections if part is not None)):
            x1, y1, x2, y2 = (float(value) for value in box)
            entry = {"image_id": image_id, "score": float(score), "category_id": scenes.CATEGORY_IDS[label]}
            if kind == "bbox":
                entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                entry["segmentation"] = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
            entries.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO(str(truth.path))
        measured = COCOeval(objects, objects.loadRes(entries), kind)
        measured.params.maxDets = list(MAX_DETECTIONS)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured.stats[:6]


def test_agreement_with_pycocotools(truth: GroundTruth, made: list[scenes.Scene], capsys: pytest.CaptureFixture) -> None:
    found = {scenes.coco_image_id(number): detections_of(scene, number) for number, scene in enumerate(made)}
    evaluator = CocoScores(truth)
    for image_id, detections in reversed(found.items()):
        evaluator.add(image_id, detections)
    evaluator.reduce(Processes())
    result = evaluator.result()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        stats = [100 * value if value >= 0 else math.nan for value in reference(truth, found, kind)]
        ours = [result[f"val_{name}_{key}"] for key in ("ap", "ap50", "ap75", "small", "medium", "large")]
        assert ours == pytest.approx(stats, abs=1e-9, nan_ok=True)
        assert 5 < ours[0] < 95 and math.isnan(ours[5]), "no scene has a large object"
    assert set(result) == {metric.name for metric in metrics_of(True)}
    table = evaluator.table()
    assert [line.name for line in table] == list(scenes.SHAPES)
    assert np.mean([line.box_ap for line in table]) == pytest.approx(result["val_box_ap"])
    assert np.mean([line.mask_ap50 for line in table]) == pytest.approx(result["val_mask_ap50"])
    assert capsys.readouterr().out == "", "pycocotools prints"


def test_exact_detections_are_perfect(truth: GroundTruth, made: list[scenes.Scene]) -> None:
    evaluator = CocoScores(GroundTruth(truth.path, masks=False))
    for number, scene in enumerate(made):
        boxes = torch.tensor([instance.box for instance in scene.instances])
        labels = torch.tensor([instance.shape for instance in scene.instances])
        evaluator.add(scenes.coco_image_id(number), Detections(boxes, torch.linspace(1, 0.5, len(labels)), labels))
    evaluator.reduce(Processes())
    result = evaluator.result()
    assert result["val_box_ap"] == pytest.approx(100) and set(result) == {metric.name for metric in metrics_of(False)}
    assert math.isnan(evaluator.table()[0].mask_ap)


def nothing(size: tuple[int, int] = (96, 128)) -> Detections:
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, *size).bool())


def test_without_detections_the_precision_is_zero(truth: GroundTruth) -> None:
    evaluator = CocoScores(truth)
    for number in range(COUNT):
        evaluator.add(scenes.coco_image_id(number), nothing())
    evaluator.reduce(Processes())
    assert evaluator.result()["val_box_ap"] == 0 and evaluator.result()["val_mask_ap50"] == 0


def test_classes_without_objects_are_nan(truth: GroundTruth) -> None:
    content = json.loads(truth.path.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == scenes.CATEGORY_IDS[1]]
    truth.path.write_text(json.dumps(content))
    first = content["annotations"][0]
    x, y, width, height = first["bbox"]
    boxes = torch.tensor([[x, y, x + width, y + height]])
    boxes_only = CocoScores(GroundTruth(truth.path, masks=False))
    boxes_only.add(first["image_id"], Detections(boxes, torch.ones(1), torch.tensor([0])))
    boxes_only.reduce(Processes())
    values = [line.box_ap for line in boxes_only.table()]
    assert values[1] == 0 and all(math.isnan(value) for place, value in enumerate(values) if place != 1)
    assert boxes_only.result()["val_box_ap"] == 0


def test_the_table_follows_the_order_of_the_categories_in_the_file(truth: GroundTruth, made: list[scenes.Scene]) -> None:
    """pycocotools sorts the identifiers, whatever their order in the file."""
    content = json.loads(truth.path.read_text())
    content["categories"].reverse()
    tables = []
    for name, reversed_ in (("a.json", False), ("b.json", True)):
        path = truth.path.with_name(name)
        path.write_text(json.dumps(content) if reversed_ else truth.path.read_text())
        evaluator = CocoScores(GroundTruth(path, masks=False))
        for number, scene in enumerate(made):
            found = detections_of(scene, number)
            labels = len(scenes.SHAPES) - 1 - found.labels if reversed_ else found.labels
            evaluator.add(scenes.coco_image_id(number), found._replace(labels=labels, masks=None))
        evaluator.reduce(Processes())
        tables.append({line.name: (line.box_ap, line.box_ap50) for line in evaluator.table()})
    assert len(set(tables[0].values())) > 1 and tables[0] == tables[1]


def test_a_class_that_the_file_does_not_have(truth: GroundTruth) -> None:
    evaluator = CocoScores(GroundTruth(truth.path, masks=False))
    evaluator.add(10, Detections(torch.rand(1, 4), torch.ones(1), torch.tensor([4])))
    with pytest.raises(ArgumentError, match=r"class index 4, but .* has 4 categories"):
        evaluator.reduce(Processes())


def test_boxes_alone_have_no_masks_to_measure(truth: GroundTruth) -> None:
    evaluator = CocoScores(truth)
    evaluator.add(10, Detections(torch.rand(1, 4), torch.ones(1), torch.tensor([0])))
    with pytest.raises(ArgumentError, match="the detector yields only boxes"):
        evaluator.reduce(Processes())


def test_areas_and_flags_may_be_missing(truth: GroundTruth, made: list[scenes.Scene]) -> None:
    """As in files that people write themselves: areas are then those of the masks, or of the boxes."""
    content = json.loads(truth.path.read_text())
    for entry in content["annotations"]:
        del entry["area"], entry["iscrowd"]
    truth.path.write_text(json.dumps(content))
    areas = [entry["area"] for entry in truth.coco.dataset["annotations"]]
    expected = [instance.mask.sum() for scene in made for instance in scene.instances]
    assert areas == pytest.approx(expected, rel=0.1)
    boxes = GroundTruth(truth.path, masks=False).coco.dataset["annotations"][0]
    assert boxes["area"] == boxes["bbox"][2] * boxes["bbox"][3] and boxes["iscrowd"] == 0


@pytest.mark.parametrize("form", [None, []])
def test_a_crowd_without_a_mask_is_its_box(form: list | None, truth: GroundTruth, made: list[scenes.Scene]) -> None:
    """Detections inside it count neither for nor against the detector, of masks as of boxes."""
    content = json.loads(truth.path.read_text())
    crowd = next(entry for entry in content["annotations"] if entry["iscrowd"])
    del crowd["segmentation"]
    if form is not None:
        crowd["segmentation"] = form
    truth.path.write_text(json.dumps(content))
    evaluator = CocoScores(truth)
    for number, scene in enumerate(made):
        boxes = torch.tensor([instance.box for instance in scene.instances])
        labels = torch.tensor([instance.shape for instance in scene.instances])
        masks = torch.from_numpy(np.stack([instance.mask for instance in scene.instances]))
        evaluator.add(scenes.coco_image_id(number), Detections(boxes, torch.ones(len(boxes)), labels, masks))
    evaluator.reduce(Processes())
    assert evaluator.result()["val_box_ap"] == pytest.approx(100) == evaluator.result()["val_mask_ap50"]


@dataclass(frozen=True)
class Together(Processes):
    """Processes that hand over what the others have gathered."""

    others: list[Any] = field(default_factory=list)

    @override
    def gather(self, value: Any) -> list[Any]:
        return [*self.others, value]


def test_several_processes_equal_one(truth: GroundTruth, made: list[scenes.Scene]) -> None:
    whole, parts = CocoScores(truth), [CocoScores(truth) for _ in range(3)]
    for number, scene in enumerate(made):
        for evaluator in (whole, parts[number % 2]):
            evaluator.add(scenes.coco_image_id(number), detections_of(scene, number))
    whole.reduce(Processes())
    parts[0].reduce(Together(world_size=3, others=[part._found for part in parts[1:]]))
    np.testing.assert_equal(parts[0].result(), whole.result())


class Oracle(nn.Module):
    """Detector that finds shapes by their colors: the bounding box and the mask of all pixels of a class."""

    def forward(self, images: Tensor, sizes: list[Any]) -> list[Detections]:
        return [self._one(image[:, : size.height, : size.width], size) for image, size in zip(images, sizes)]

    def _one(self, image: Tensor, size: Any) -> Detections:
        colors = torch.tensor(scenes.PALETTE) / 255
        nearest = (image[None] - colors[:, :, None, None]).square().sum(1).argmin(0)
        masks = torch.stack([nearest == index + 1 for index in range(4)])
        masks = nn.functional.interpolate(masks[None].float(), size.original)[0] > 0.5
        kept = [index for index in range(4) if masks[index].sum() > 60]
        boxes = [[c.min(), r.min(), c.max() + 1, r.max() + 1] for r, c in (masks[index].nonzero().T for index in kept)]
        return Detections(torch.tensor(boxes).float(), torch.linspace(0.9, 0.5, len(kept)), torch.tensor(kept), masks[kept])


def test_evaluation_of_scenes(tmp_path: Path, made: list[scenes.Scene]) -> None:
    """The engine evaluates held-out files, whatever the batch size, and leaves out what cannot be read."""
    root = scenes.write_coco_json(tmp_path, made[:1], made)
    (root / "pictures" / "val_scene_0003.png").write_bytes(b"nothing")
    config = DetectionDataConfig(format="coco_json", root=str(root), images="pictures", image_scale=(256, 192))
    source = open_detection(config, "val")
    results = []
    for batch_size in (1, 3):
        samples = EvaluationSamples(source, EvaluationTransform(config, (0.0,) * 3, (1.0,) * 3), DetectionCollate())
        evaluator = CocoScores(GroundTruth(source.annotations.path, masks=True))
        loader = EvaluationLoader(samples, batch_size, LoaderOptions(), Shard())
        results.append(evaluate(Oracle(), loader, evaluator, EvaluationOptions(torch.device("cpu"), 1)))
    assert results[0] is not None
    np.testing.assert_equal(results[0], results[1])
    assert results[0]["val_mask_ap50"] > 20 and results[0]["val_unreadable"] == 1
