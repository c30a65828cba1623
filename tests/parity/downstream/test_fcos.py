"""FCOS against the official one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import widekernel
from tests.parity.downstream.arrays import Golden
from tests.parity.downstream.gradients import check_gradients, official_gradients
from tests.parity.downstream.reference import images, official_file, pyramid
from widekernel.dense.detection.anchors import grid_points
from widekernel.dense.detection.fcos import Fcos, FcosDetectionOptions, FcosOptions
from widekernel.dense.detection.fcos_targets import centerness, fcos_targets, point_ranges
from widekernel.dense.detection.structures import ImageSize, Targets

BOUNDS, STRIDES = (64.0, 128.0, 256.0, 512.0), (8, 16, 32, 64, 128)


def test_targets_of_stored_boxes(shared: Path) -> None:
    golden = Golden(shared, "det_ops_s700")
    points = grid_points([(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)], STRIDES)
    ranges = point_ranges(BOUNDS, list(map(len, points)))
    wanted = fcos_targets(torch.cat(points), ranges, [Targets(golden["in:fcos_gt"], golden["in:fcos_gt_labels"])])
    parts = [part[0].split(list(map(len, points))) for part in wanted]
    for level, (labels, distances) in enumerate(zip(*parts)):
        # Officially, the background is the class after the last one.
        assert torch.equal(torch.where(labels < 0, 5, labels), golden[f"fcos:labels{level}"].long())
        positive = distances[labels >= 0]
        golden.check(f"fcos:pos_targets{level}", positive, 1e-7)
        golden.check(f"fcos:pos_centerness{level}", centerness(positive), 1e-6)


def build(shared: Path, golden: Golden, target: Path) -> Fcos:
    """Build the detector of a case and load a file with its weights."""
    config = golden.manifest["config"]
    head, testing = config["bbox_head"], config["test_cfg"]
    detections = FcosDetectionOptions(per_map=testing["nms_pre"], number=testing["max_per_img"])
    options = FcosOptions(head["num_classes"], head["feat_channels"], detections=detections)
    fcos = Fcos(pyramid(config["backbone"]), options)
    widekernel.load_checkpoint(fcos, official_file(shared, target, golden.row["manifest"], golden.row["seed"]))
    return fcos


def check_outputs(golden: Golden, fcos: Fcos, pictures: torch.Tensor) -> None:
    features = fcos.backbone(pictures)
    for level, feature in enumerate(features):
        golden.check(f"feat{level}", feature, 2e-5)
    maps = fcos.neck(features[fcos.first :])
    for level, (map_, *outputs) in enumerate(zip(maps, *fcos.bbox_head(maps))):
        golden.check(f"fpn{level}", map_, 2e-5)
        logits, log_distances, center = outputs
        golden.check(f"cls{level}", logits, 2e-5)
        golden.check(f"reg{level}", log_distances.exp(), 2e-5)
        golden.check(f"ctr{level}", center, 2e-5)


@pytest.fixture(scope="module")
def evaluated(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Golden, Fcos]:
    golden = Golden(shared, "det_fcos_mini_s200")
    return golden, build(shared, golden, tmp_path_factory.mktemp("fcos")).eval()


def test_outputs(evaluated: tuple[Golden, Fcos]) -> None:
    golden, fcos = evaluated
    with torch.no_grad():
        check_outputs(golden, fcos, golden.images())


@pytest.mark.parametrize("prefix", ["", "norescale:"])
def test_detections(evaluated: tuple[Golden, Fcos], prefix: str) -> None:
    golden, fcos = evaluated
    sizes = [ImageSize(*size[:2]) for size in golden.sizes()] if prefix else golden.sizes()
    for number, found in enumerate(fcos(golden.images(), sizes)):
        assert torch.equal(found.labels, golden[f"{prefix}labels_img{number}"])
        wanted = golden[f"{prefix}dets_img{number}"]
        assert (found.boxes - wanted[:, :4]).abs().max() <= 1e-3
        assert (found.scores - wanted[:, 4]).abs().max() <= 1e-5


def test_training_step(shared: Path, tmp_path: Path) -> None:
    golden = Golden(shared, "det_fcos_mini_train_s260")
    fcos = build(shared, golden, tmp_path)
    losses = fcos(golden.images(), golden.sizes(), golden.targets(5), [0, 0])
    wanted = dict(zip(golden.arrays["loss_names"].tolist(), golden.arrays["loss_values"].tolist()))
    names = {"cls": "loss_cls", "box": "loss_bbox", "centerness": "loss_centerness"}
    assert {names[name]: loss.item() for name, loss in losses.items()} == {
        name: pytest.approx(wanted[name], rel=1e-5) for name in names.values()
    }
    sum(losses.values()).backward()
    check_gradients(golden, official_gradients(fcos), 2e-2)


@pytest.mark.slow
def test_full_size(shared: Path, tmp_path: Path) -> None:
    golden = Golden(shared, "full_fcos_replknet31b_s804")
    fcos = build(shared, golden, tmp_path).eval()
    with torch.no_grad():
        check_outputs(golden, fcos, images(shared, golden.row["input_seed"], golden.row["input_shape"]))
