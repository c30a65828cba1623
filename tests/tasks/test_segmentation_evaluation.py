"""Metrics of segmentation: counts, absent classes, several processes, and an independent computation."""

from __future__ import annotations

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

from widekernel.data import Batch, EvaluationLoader, EvaluationSamples, LoaderOptions, Shard
from widekernel.data.segmentation.batches import SegmentationViews
from widekernel.data.segmentation.config import SegmentationDataConfig
from widekernel.data.segmentation.sources import open_segmentation
from widekernel.data.segmentation.transforms import EvaluationTransform
from widekernel.dense.detection.structures import ImageSize
from widekernel.engine.evaluation import EvaluationOptions, evaluate
from widekernel.engine.processes import Processes
from widekernel.errors import ShapeError
from widekernel.tasks.segmentation.evaluation import METRICS, PixelScores, SegmentationScores, confusion

NAMES = ["a", "b", "c", "d"]


@dataclass(frozen=True)
class Together(Processes):
    """Processes that hand over what the others have, in the order in which `sum` and `gather` are called."""

    others: list[list[Any]] = field(default_factory=list)

    @override
    def sum(self, values: Tensor) -> Tensor:
        return values + sum(part.pop(0) for part in self.others)


def evaluator_of(pairs: list[tuple[Tensor, Tensor]]) -> PixelScores:
    evaluator = PixelScores(NAMES, lambda model, views: [])
    for prediction, labels in pairs:
        evaluator.add(prediction, labels)
    return evaluator


def random_pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    pairs = []
    for number in range(count):
        size = (11 + number, 17)
        labels = torch.randint(0, 4, size, generator=generator)
        labels[torch.rand(size, generator=generator) < 0.1] = 255
        pairs.append((torch.randint(0, 4, size, generator=generator), labels))
    return pairs


def test_counts_equal_a_computation_pixel_by_pixel() -> None:
    pairs = random_pairs(5)
    evaluator = evaluator_of(pairs)
    evaluator.reduce(Processes())
    predictions = np.concatenate([prediction.numpy().ravel() for prediction, _ in pairs])
    labels = np.concatenate([truth.numpy().ravel() for _, truth in pairs])
    predictions, labels = predictions[labels != 255], labels[labels != 255]
    ious = [np.sum((predictions == c) & (labels == c)) / np.sum((predictions == c) | (labels == c)) for c in range(4)]
    accuracies = [np.mean(predictions[labels == c] == c) for c in range(4)]
    result = evaluator.result()
    assert result["val_miou"] == pytest.approx(100 * np.mean(ious), abs=1e-9)
    assert result["val_macc"] == pytest.approx(100 * np.mean(accuracies), abs=1e-9)
    assert result["val_aacc"] == pytest.approx(100 * np.mean(predictions == labels), abs=1e-9)
    assert result["val_images"] == 5
    table = evaluator.table()
    assert [line.name for line in table] == NAMES
    assert [line.iou for line in table] == pytest.approx([100 * value for value in ious])
    assert [line.accuracy for line in table] == pytest.approx([100 * value for value in accuracies])
    assert [line.pixels for line in table] == np.bincount(labels, minlength=4).tolist()
    assert {metric.name for metric in METRICS} <= result.keys()


def test_absent_classes() -> None:
    """`b` is predicted but not there, `c` there but not predicted, `d` neither; only `d` is left out of the mean IoU."""
    labels, prediction = torch.tensor([[0, 0, 2, 255]]), torch.tensor([[0, 1, 0, 3]])
    scores = SegmentationScores.of(confusion(prediction, labels, 4))
    assert scores.iou[:3].tolist() == [1 / 3, 0, 0] and math.isnan(scores.iou[3])
    assert scores.accuracy[[0, 2]].tolist() == [0.5, 0] and torch.isnan(scores.accuracy[[1, 3]]).all()
    assert (
        scores.mean_iou == pytest.approx(1 / 9) and scores.mean_accuracy == 0.25 and scores.overall == pytest.approx(1 / 3)
    )


def test_without_labeled_pixels_all_is_nan() -> None:
    evaluator = evaluator_of([(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))])
    evaluator.reduce(Processes())
    result = evaluator.result()
    assert math.isnan(result["val_miou"]) and math.isnan(result["val_aacc"]) and result["val_images"] == 1


def test_counts_do_not_round() -> None:
    """More pixels than float32 distinguishes."""
    evaluator = evaluator_of([])
    evaluator._counts[0, 0] = 2**24
    evaluator.add(torch.tensor([[0]]), torch.tensor([[0]]))
    assert int(evaluator.counts[0, 0]) == 2**24 + 1


def test_several_processes_equal_one() -> None:
    """Also if one of them has had no image."""
    pairs = random_pairs(5)
    whole = evaluator_of(pairs)
    whole.reduce(Processes())
    parts = [evaluator_of(pairs[:2]), evaluator_of([]), evaluator_of(pairs[2:])]
    others = [[part._counts, torch.tensor([part._images])] for part in parts[1:]]
    parts[0].reduce(Together(world_size=3, others=others))
    assert parts[0].result() == whole.result()


def test_maps_of_another_size_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 4\), but the labels \(4, 3\)"):
        confusion(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64), 4)


class Painter(nn.Module):
    """Network that classifies pixels by the nearest of the colors with which the scenes are painted."""

    def forward(self, images: Tensor) -> Tensor:
        colors = torch.tensor(scenes.PALETTE) / 255
        return -(images[:, None] - colors[None, :, :, None, None]).square().sum(2)


def at_original_size(model: nn.Module, views: SegmentationViews) -> list[Tensor]:
    maps = []
    for number, image in enumerate(views.images[0]):
        size: ImageSize = views.sizes[0][number]
        logits = model(image[None, :, : size.height, : size.width])
        resized = nn.functional.interpolate(logits, size.original, mode="bilinear", align_corners=False)
        maps.append(resized[0].argmax(0))
    return maps


def test_evaluation_of_scenes(tmp_path: Path) -> None:
    """The engine evaluates held-out files, whatever the batch size, with a network that needs no training."""
    root = scenes.write_folder(tmp_path, scenes.make_scenes(1), scenes.make_scenes(5, first=20))
    config = SegmentationDataConfig(root=str(root), image_scale=(256, 192))
    source = open_segmentation(config, "val")
    results = []
    for batch_size in (1, 3):
        samples = EvaluationSamples(source, EvaluationTransform(config, (0.0,) * 3, (1.0,) * 3), SegmentationViews.collate)
        loader = EvaluationLoader(samples, batch_size, LoaderOptions(), Shard())
        evaluator = PixelScores(source.class_names, at_original_size)
        options = EvaluationOptions(torch.device("cpu"), 0)
        results.append(evaluate(Painter(), loader, evaluator, options))
    assert results[0] is not None
    assert results[0] == results[1]
    assert results[0]["val_miou"] > 70 and results[0]["val_images"] == 5 and results[0]["val_unreadable"] == 0


def test_observers_receive_the_maps() -> None:
    seen = []
    evaluator = PixelScores(NAMES, lambda model, views: views.labels, observe=lambda maps, views: seen.append((maps, views)))
    labels = torch.tensor([[0, 1], [2, 255]])
    views = SegmentationViews([torch.zeros(1, 3, 2, 2)], [labels], [[ImageSize(2, 2)]], ["x"])
    evaluator.update(nn.Identity(), Batch(views, 1))
    assert seen[0][0] == [labels] and seen[0][1].names == ["x"]
