"""Cascade R-CNN and Mask R-CNN as wholes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from tests.dense.detection.shapes import CLASSES, KINDS, batch, nothing, small_detector, small_options
from widekernel import fold
from widekernel.dense.backbone import build_pyramid
from widekernel.dense.detection.processes import alone
from widekernel.dense.detection.rpn import Proposals
from widekernel.dense.detection.structures import Detections, ImageSize, Targets
from widekernel.dense.detection.two_stage import CascadeRCNN, MaskRCNN, TwoStageDetector, cascade_options
from widekernel.errors import ArgumentError, DataError, ShapeError


def step_gradients(detector: TwoStageDetector) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in detector.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_have_names_and_reach_every_parameter(kind: str) -> None:
    detector = small_detector(kind).train()
    losses = detector(*batch())
    stages = ["stage1", "stage2", "stage3"] if kind == "cascade" else ["roi"]
    assert set(losses) == {"rpn_cls", "rpn_box"} | {f"{stage}_{what}" for stage in stages for what in ("cls", "box", "mask")}
    sum(losses.values()).backward()
    assert len(step_gradients(detector)) == len(list(detector.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_detector_without_masks(kind: str) -> None:
    detector = small_detector(kind, masks=False).train()
    images, sizes, targets, seeds = batch()
    losses = detector(images, sizes, [Targets(boxes, labels) for boxes, labels, _ in targets], seeds)
    assert not any("mask" in name for name in (*losses, *detector.state_dict()))
    (found, _) = detector.eval()(images, sizes)
    assert found.masks is None


@pytest.mark.parametrize("kind", KINDS)
def test_batch_without_objects(kind: str) -> None:
    """Every parameter still gets a gradient, as data-parallel training needs it."""
    detector = small_detector(kind).train()
    images, sizes, targets, seeds = batch()
    losses = detector(images, sizes, [nothing(each) for each in targets], seeds)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(loss == 0 for name, loss in losses.items() if not name.endswith("cls"))
    sum(losses.values()).backward()
    gradients = step_gradients(detector)
    assert len(gradients) == len(list(detector.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_images_without_proposals(kind: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = small_detector(kind).train(training)
    propose = detector.rpn_head.propose

    def none(*args: Any) -> list[Proposals]:
        return [each._replace(boxes=each.boxes[:0]) for each in propose(*args)]

    monkeypatch.setattr(detector.rpn_head, "propose", none)
    images, sizes, targets, seeds = batch()
    if training:
        losses = detector(images, sizes, [nothing(each) for each in targets], seeds)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        losses = detector(images, sizes, [nothing(targets[0]), targets[1]], seeds)
        assert all(loss > 0 for name, loss in losses.items() if name.endswith("mask"))
    else:
        check_empty(detector(images, sizes), sizes)


def check_empty(found: list[Detections], sizes: list[ImageSize]) -> None:
    for each, size in zip(found, sizes):
        assert each.boxes.shape == (0, 4)
        assert each.scores.shape == each.labels.shape == (0,)
        assert each.masks is not None
        assert each.masks.shape == (0, *size.original)
        assert each.masks.dtype == torch.bool


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_detections(kind: str) -> None:
    detector = small_detector(kind).eval()
    for head in detector.roi_head.box_heads:
        nn.init.constant_(head.fc_cls.bias[-1:], 20.0)
    images, sizes, *_ = batch()
    sizes = [size._replace(scale_x=2.0, scale_y=2.0) for size in sizes]
    found = detector(images, sizes)
    check_empty(found, sizes)
    assert found[0].masks.shape[1:] == (48, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_lie_in_the_original_images(kind: str) -> None:
    detector = small_detector(kind).eval()
    images, sizes, *_ = batch()
    sizes = [size._replace(scale_x=2.0, scale_y=3.0) for size in sizes]
    for each, size in zip(detector(images, sizes), sizes):
        height, width = size.original
        assert 0 < len(each.boxes) <= detector.options.roi.most
        assert each.boxes.min() >= 0
        assert each.boxes[:, 2].max() <= width and each.boxes[:, 3].max() <= height
        assert (each.scores.diff() <= 0).all()
        assert each.masks.shape == (len(each.boxes), height, width)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_depend_on_seeds_alone(kind: str) -> None:
    """Batch norms of box heads see the whole batch, so Mask R-CNN, which has none, shows that images are independent."""
    detector = small_detector(kind).train()
    images, sizes, targets, seeds = batch()
    torch.manual_seed(1)
    first = detector(images, sizes, targets, seeds)
    torch.manual_seed(2)
    assert all(torch.equal(loss, first[name]) for name, loss in detector(images, sizes, targets, seeds).items())
    others = detector(images, sizes, targets, [5, 6])
    assert any(not torch.equal(loss, first[name]) for name, loss in others.items())
    if kind == "mask":
        parts = [detector(images[i : i + 1], sizes[i : i + 1], targets[i : i + 1], seeds[i : i + 1]) for i in (0, 1)]
        # As many RoIs in both images, so that the mean over the batch is that of the images' means.
        mean = (parts[0]["roi_cls"] + parts[1]["roi_cls"]) / 2
        torch.testing.assert_close(mean, first["roi_cls"], rtol=1e-5, atol=1e-6)


def test_numbers_are_averaged_over_processes() -> None:
    """Losses of parts of a batch, divided by the mean of their numbers, average to those of the batch."""
    detector = small_detector("mask").train()
    images, sizes, targets, seeds = batch()
    targets = [targets[0], nothing(targets[1])]
    whole = detector(images, sizes, targets, seeds)
    parts = [(images[i : i + 1], sizes[i : i + 1], targets[i : i + 1], seeds[i : i + 1]) for i in (0, 1)]
    numbers: list[list[Tensor]] = [[], []]
    for part, kept in zip(parts, numbers):
        detector.mean_over_processes = lambda value, least=0, kept=kept: kept.append(value) or alone(value, least)
        detector(*part)
    means = [(first + second) / 2 for first, second in zip(*numbers)]
    losses = []
    for part in parts:
        each = iter(means)
        detector.mean_over_processes = lambda value, least=0, each=each: next(each)
        losses.append(detector(*part))
    for name, loss in whole.items():
        torch.testing.assert_close((losses[0][name] + losses[1][name]) / 2, loss, rtol=1e-5, atol=1e-6, msg=name)


def test_folded_detector_finds_the_same() -> None:
    detector = small_detector("cascade").eval()
    for norm in detector.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    folded = fold(detector)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images, sizes, *_ = batch()
    for one, other in zip(detector(images, sizes), folded(images, sizes)):
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str) -> None:
    detector = small_detector(kind).train()
    images, sizes, targets, seeds = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, sizes, targets, seeds)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    with torch.autocast("cpu", torch.bfloat16):
        (found, _) = detector.eval()(images, sizes)
    assert found.boxes.dtype == found.scores.dtype == torch.float32


def train(detector: TwoStageDetector, steps: int, images: int) -> list[float]:
    """Train on a batch of scenes and return the loss of each step."""
    optimizer = torch.optim.AdamW(detector.train().parameters(), 4e-3)
    pixels, sizes, targets, seeds = batch(count=images)
    totals = []
    for step in range(steps):
        loss = sum(detector(pixels, sizes, targets, [seed + 10 * step for seed in seeds]).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
        totals.append(loss.item())
    return totals


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_in_a_few_steps(kind: str) -> None:
    totals = train(small_detector(kind), steps=8, images=1)
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("cascade", 110), ("mask", 60)])
def test_objects_of_scenes_are_found(kind: str, steps: int) -> None:
    """Most objects in the scenes of the training are found, with masks that fit."""
    detector = small_detector(kind)
    train(detector, steps, images=4)
    images, sizes, targets, _ = batch(count=4)
    hits = [
        has_found(box, label, mask, each)
        for each, target in zip(detector.eval()(images, sizes), targets)
        for box, label, mask in zip(*target)
    ]
    assert len(hits) == 15
    assert sum(hits) >= 10


def has_found(box: Tensor, label: Tensor, mask: Tensor, found: Detections) -> bool:
    """Return whether an object is found with an overlap of at least 0.5 of the boxes and 0.7 of the masks."""
    same = (found.labels == label) & (found.scores > 0.3)
    assert found.masks is not None
    masks = found.masks[same]
    truth = mask[: masks.shape[1], : masks.shape[2]].bool()
    overlap = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))
    return bool(((box_iou(box[None], found.boxes[same])[0] > 0.5) & (overlap > 0.7)).any())


def test_errors() -> None:
    detector = small_detector("cascade").train()
    images, sizes, targets, seeds = batch()
    with pytest.raises(ArgumentError, match="There are no targets"):
        detector(images, sizes)
    with pytest.raises(ArgumentError, match="There are no seeds"):
        detector(images, sizes, targets)
    with pytest.raises(ShapeError, match="2 images, but 1 seeds"):
        detector(images, sizes, targets, seeds[:1])
    with pytest.raises(DataError, match="has no masks"):
        detector(images, sizes, [each._replace(masks=None) for each in targets], seeds)
    with pytest.raises(ShapeError, match="does not fit the batch"):
        detector.eval()(images, [ImageSize(97, 128)] * 2)
    with pytest.raises(ArgumentError, match=r"strides \[8, 16, 32\]"):
        CascadeRCNN(build_pyramid("slak_nano", out_indices=(1, 2, 3)), small_options("cascade"))
    with pytest.raises(ArgumentError, match="a single stage"):
        MaskRCNN(build_pyramid("slak_nano"), cascade_options(CLASSES))
    with pytest.raises(ArgumentError, match="stages is empty"):
        replace(cascade_options(3).roi, stages=())
    with pytest.raises(ArgumentError, match="most is 0"):
        replace(cascade_options(3).roi, most=0)
    with pytest.raises(ArgumentError, match="mask_threshold is 0, but must be above 0"):
        replace(cascade_options(3).roi, mask_threshold=0)
    # From an overlap of 1, nothing is suppressed: the settings of FCOS allow it, too.
    assert replace(cascade_options(3).roi, overlap_threshold=1.0, score_threshold=1.0).overlap_threshold == 1
