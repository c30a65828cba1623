"""Metrics of the official code for segmentation and detection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_tools
from torch import Tensor

from widekernel.data.detection.annotations import read_coco
from widekernel.dense.detection.structures import Detections
from widekernel.engine.processes import Processes
from widekernel.tasks.detection.average_precision import GroundTruth
from widekernel.tasks.detection.evaluation import CocoScores
from widekernel.tasks.segmentation.evaluation import PixelScores, SegmentationScores, confusion

GOLDEN = "parity/downstream/golden"
CLASSES = 7
LABEL_MAP = {0: 1, 1: 0, 2: 255}


def labels_of(stored: np.lib.npyio.NpzFile, setting: str) -> Tensor:
    """Return the true classes as loading would translate them."""
    if setting == "reduce_zero":
        raw = stored["gt_raw"]
        return torch.from_numpy(np.where((raw == 0) | (raw == 255), 255, raw - 1))
    labels = torch.from_numpy(stored["gt"])
    if setting == "label_map":
        mapped = labels.clone()
        for old, new in LABEL_MAP.items():
            mapped[labels == old] = new
        return mapped
    return labels


@pytest.mark.parametrize("setting", ["plain", "reduce_zero", "label_map"])
def test_segmentation_metrics(shared: Path, setting: str) -> None:
    stored = np.load(shared / GOLDEN / "seg_metrics_s500.npz")
    predictions, labels = torch.from_numpy(stored["pred"]), labels_of(stored, setting)
    evaluator = PixelScores([f"class {index}" for index in range(CLASSES)], lambda model, views: [])
    for number, (prediction, truth) in enumerate(zip(predictions, labels, strict=True)):
        evaluator.add(prediction, truth)
        counts = confusion(prediction, truth, CLASSES)
        assert counts.diagonal().tolist() == stored[f"{setting}:area_intersect"][number].tolist()
        assert counts.sum(0).tolist() == stored[f"{setting}:area_pred"][number].tolist()
        assert counts.sum(1).tolist() == stored[f"{setting}:area_label"][number].tolist()
    evaluator.reduce(Processes())
    scores = SegmentationScores.of(evaluator.counts)
    np.testing.assert_allclose(scores.iou.numpy(), stored[f"{setting}:IoU"], rtol=1e-12)
    np.testing.assert_allclose(scores.accuracy.numpy(), stored[f"{setting}:Acc"], rtol=1e-12)
    assert scores.overall == pytest.approx(float(stored[f"{setting}:aAcc"]), rel=1e-12)
    summary = dict(zip(stored[f"{setting}:summary_names"].tolist(), stored[f"{setting}:summary_values"].tolist()))
    result = evaluator.result()
    for ours, theirs in (("val_miou", "mIoU"), ("val_macc", "mAcc"), ("val_aacc", "aAcc")):
        assert round(result[ours] / 100, 4) == pytest.approx(summary[theirs], abs=1e-7)  # stored as float32


def test_detection_metrics(shared: Path) -> None:
    path = shared / GOLDEN / "coco_gt_s750.json"
    stored = json.loads((shared / GOLDEN / "coco_eval_s750.json").read_text())
    truth = GroundTruth(path, masks=True)
    evaluator = CocoScores(truth)
    for place in range(len(read_coco(path, masks=True).images)):
        image_id = truth.coco.dataset["images"][place]["id"]
        found = [entry for entry in stored["detections"]["segm"] if entry["image_id"] == image_id]
        found.sort(key=lambda entry: -entry["score"])
        height, width = (truth.coco.imgs[image_id][key] for key in ("height", "width"))
        boxes = torch.tensor([entry["bbox"] for entry in found], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [torch.from_numpy(mask_tools.decode(entry["segmentation"])).bool() for entry in found]
        labels = [truth.category_ids.index(entry["category_id"]) for entry in found]
        scores = torch.tensor([entry["score"] for entry in found], dtype=torch.float64)
        empty = torch.zeros(0, height, width, dtype=torch.bool)
        detections = Detections(
            boxes, scores, torch.tensor(labels, dtype=torch.int64), torch.stack(masks) if masks else empty
        )
        evaluator.add(image_id, detections)
    evaluator.reduce(Processes())
    result = evaluator.result()
    names = {"": "ap", "_50": "ap50", "_75": "ap75", "_s": "small", "_m": "medium", "_l": "large"}
    for kind, ours in (("bbox", "box"), ("segm", "mask")):
        for theirs, field in names.items():
            expected = stored["metrics"][f"{kind}_mAP{theirs}"]
            assert round(result[f"val_{ours}_{field}"] / 100, 4) == pytest.approx(expected, abs=1e-9), (kind, theirs)
