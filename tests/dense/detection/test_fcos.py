"""FCOS: training, detections, targets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from tests.dense.detection.helpers import check_two_processes
from tests.dense.detection.shapes import CLASSES, batch
from widekernel.dense.backbone import build_pyramid
from widekernel.dense.detection.fcos import Fcos, FcosDetectionOptions, FcosOptions, fcos_losses
from widekernel.dense.detection.fcos_head import FcosHead, FcosOutputs
from widekernel.dense.detection.fcos_targets import BACKGROUND, FcosTargets, centerness, fcos_targets, point_ranges
from widekernel.dense.detection.structures import ImageSize, Targets
from widekernel.errors import ArgumentError, DataError, ShapeError

OPTIONS = FcosOptions(CLASSES, 32, (8, 16, 32), (16.0, 32.0))
NOTHING = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def build(options: FcosOptions = OPTIONS, out_indices: tuple[int, ...] = (1, 2)) -> Fcos:
    """Build a detector on a small network whose norms do not join the images of a batch."""
    return Fcos(build_pyramid("test_convnext", {}, out_indices), options)


def test_initial_weights() -> None:
    head = FcosHead(7, 64)
    for name in ("cls_convs.3", "reg_convs.0"):
        assert f"{name}.conv.weight" in head.state_dict()
        assert f"{name}.conv.bias" not in head.state_dict()
        assert f"{name}.gn.weight" in head.state_dict()
    assert head.conv_cls.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert torch.allclose(head.conv_cls.bias, torch.tensor(-math.log(99)))
    assert not head.conv_reg.bias.any()
    assert [scale.scale.item() for scale in head.scales] == [1.0] * 5


def test_a_few_steps_lower_every_loss() -> None:
    fcos = build().train()
    optimizer = torch.optim.AdamW(fcos.parameters(), 2e-3)
    history = []
    arguments = batch()
    for _ in range(15):
        losses = fcos(*arguments)
        assert list(losses) == ["cls", "box", "centerness"]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[-1]["cls"] < 0.7 * history[0]["cls"]
    assert history[-1]["box"] < 0.5 * history[0]["box"]
    assert history[-1]["centerness"] < history[0]["centerness"]


@pytest.mark.slow
def test_it_finds_what_it_has_learned() -> None:
    fcos = build().train()
    optimizer = torch.optim.AdamW(fcos.parameters(), 2e-3)
    images, sizes, targets, seeds = batch(count=4)
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / 200)
        optimizer.zero_grad()
        sum(fcos(images, sizes, targets, seeds).values()).backward()
        optimizer.step()
    for found, wanted in zip(fcos.eval()(images, sizes), targets):
        best = found.boxes[: len(wanted.boxes)]
        overlaps = box_iou(wanted.boxes, best)
        assert (overlaps.amax(dim=1) > 0.7).all()
        assert torch.equal(found.labels[overlaps.argmax(dim=1)], wanted.labels)


def test_two_processes_train_like_one() -> None:
    fcos = build(out_indices=(1, 2)).train()
    images, sizes, targets, seeds = batch(count=4)
    targets[0] = NOTHING

    def losses(part: slice, mean) -> dict[str, Tensor]:
        fcos.mean_over_processes = mean
        return fcos(images[part], sizes[part], targets[part], seeds[part])

    check_two_processes(fcos, losses)


def test_no_objects_at_all() -> None:
    fcos = build().train()
    images, sizes, _, seeds = batch()
    losses = fcos(images, sizes, [NOTHING, NOTHING], seeds)
    assert losses["box"] == losses["centerness"] == 0
    assert losses["cls"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fcos.parameters())


@pytest.mark.parametrize("name", ["replknet_nano", "slak_nano"])
def test_sizes_that_strides_do_not_divide(name: str) -> None:
    """RepLKNet rounds the size of a map up, the other networks down."""
    fcos = Fcos(build_pyramid(name, {}, (1, 2)), OPTIONS).train()
    _, _, targets, seeds = batch()
    losses = fcos(torch.randn(2, 3, 75, 101), [ImageSize(75, 101)] * 2, targets, seeds)
    assert all(loss.isfinite() for loss in losses.values())
    assert len(fcos.eval()(torch.randn(1, 3, 75, 101), [ImageSize(70, 100)])) == 1


def test_nothing_is_random() -> None:
    fcos = build().train()
    images, sizes, targets, _ = batch()
    first, second = fcos(images, sizes, targets, [0, 1]), fcos(images, sizes, targets, [5, 6])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_detections_are_in_original_pixels() -> None:
    options = FcosOptions(CLASSES, 32, (8, 16, 32), (16.0, 32.0), FcosDetectionOptions(0.0, 50, 0.5, 20))
    fcos = build(options).eval()
    torch.nn.init.constant_(fcos.bbox_head.conv_reg.bias, 2.5)
    images = batch()[0]
    whole = fcos(images, [ImageSize(50, 160), ImageSize(96, 40)])
    half = fcos(images, [ImageSize(50, 160, 2.0, 2.0), ImageSize(96, 40, 2.0, 4.0)])
    for ours, scaled, size, factor in zip(whole, half, ((50, 160), (96, 40)), ([2.0, 2.0], [2.0, 4.0])):
        assert len(ours.boxes) == 20
        assert ours.masks is None
        assert not ours.boxes.requires_grad
        assert (ours.boxes >= 0).all()
        assert (ours.boxes <= torch.tensor([size[1], size[0]] * 2)).all()
        assert (ours.scores.diff() <= 0).all()
        torch.testing.assert_close(scaled.boxes * torch.tensor(factor * 2), ours.boxes)


def test_nothing_is_found_above_a_high_threshold() -> None:
    fcos = build(FcosOptions(CLASSES, 32, (8, 16, 32), (16.0, 32.0), FcosDetectionOptions(0.99))).eval()
    for found in fcos(*batch()[:2]):
        assert found.boxes.shape == (0, 4)
        assert len(found.scores) == len(found.labels) == 0


def test_low_precision() -> None:
    fcos = build().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = fcos(*batch())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize("labels", [[0, 0, BACKGROUND], [0, BACKGROUND, BACKGROUND]])
def test_losses_by_hand(labels: list[int]) -> None:
    """The first box overlaps by 0.4 and has a centerness of 0.5, the second by 0.25 with a centerness of 1."""
    outputs = FcosOutputs([torch.zeros(1, 1, 1, 3)], [torch.zeros(1, 4, 1, 3)], [torch.zeros(1, 1, 1, 3)])
    distances = torch.tensor([[[1.0, 1.0, 4.0, 1.0], [2.0, 2.0, 2.0, 2.0], [-1.0, 2.0, 3.0, 4.0]]])
    losses = fcos_losses(outputs, FcosTargets(torch.tensor([labels]), distances))
    positive = labels.count(0)
    both = -(0.5 * math.log(0.4) + math.log(0.25)) / 1.5
    assert losses["box"].item() == pytest.approx(both if positive == 2 else -math.log(0.4))
    assert losses["centerness"].item() == pytest.approx(math.log(2))  # of a guess of one half
    focal = (0.25 * positive + 0.75 * (3 - positive)) * 0.25 * math.log(2)
    assert losses["cls"].item() == pytest.approx(focal / positive)


def test_an_overflowing_distance_of_background_does_no_harm() -> None:
    reg = torch.full((1, 4, 1, 2), 200.0)
    reg[..., 0] = 1.0
    reg.requires_grad_()
    outputs = FcosOutputs([torch.zeros(1, 1, 1, 2)], [reg], [torch.zeros(1, 1, 1, 2)])
    targets = FcosTargets(torch.tensor([[0, BACKGROUND]]), torch.full((1, 2, 4), 2.0))
    fcos_losses(outputs, targets)["box"].backward()
    assert reg.grad.isfinite().all()
    assert reg.grad[..., 0].all()


def test_the_smallest_box_that_suits_the_map_gets_a_point() -> None:
    points = torch.tensor([[10.0, 10.0], [10.0, 10.0], [0.0, 5.0], [16.0, 5.0]])
    ranges = torch.tensor([[-1.0, 10.0], [10.0, torch.inf], [-1.0, 30.0], [-1.0, 30.0]])
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [0.0, 0.0, 19.0, 19.0], [0.0, 0.0, 100.0, 100.0]])
    targets = fcos_targets(points, ranges, [Targets(boxes, torch.tensor([0, 1, 2]))])
    # Distances up to and from 10 belong to both maps; a point on a side is outside.
    assert targets.labels.tolist() == [[1, 1, BACKGROUND, 1]]
    assert targets.distances[0, 0].tolist() == [10.0, 10.0, 9.0, 9.0]


def test_ranges_and_centerness() -> None:
    assert point_ranges((16.0,), (1, 2)).tolist() == [[-1.0, 16.0], [16.0, math.inf], [16.0, math.inf]]
    values = centerness(torch.tensor([[2.0, 3.0, 2.0, 3.0], [1.0, 1.0, 4.0, 1.0], [1.0, 2.0, 4.0, 8.0]]))
    assert values.tolist() == pytest.approx([1.0, 0.5, 0.25])


def test_malformed_calls() -> None:
    fcos = build().train()
    images, sizes, targets, seeds = batch()
    with pytest.raises(ArgumentError, match="There are no targets, which training needs"):
        fcos(images, sizes)
    with pytest.raises(DataError, match=r"A label of image 1 .* is 4, but the detector has the classes 0 to 3"):
        fcos(images, sizes, [targets[0], Targets(targets[1].boxes, torch.full_like(targets[1].labels, 4))], seeds)
    with pytest.raises(DataError, match="A box of image 0"):
        fcos(images, sizes, [Targets(targets[0].boxes * torch.nan, targets[0].labels), targets[1]], seeds)
    with pytest.raises(ShapeError, match="There are 2 images, but 1 sizes"):
        fcos.eval()(images, sizes[:1])


def test_strides_of_the_backbone() -> None:
    assert build(out_indices=(0, 1, 2)).first == 1
    with pytest.raises(ArgumentError, match=r"strides \[16, 32\], but those of the detector are \[8, 16, 32\]"):
        build(out_indices=(2, 3))
    with pytest.raises(ArgumentError, match=r"strides \[8, 32\]"):
        build(out_indices=(1, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FcosOptions(3, 32, (8, 16), (64.0, 128.0)),
        lambda: FcosOptions(3, 32, (8, 16, 32), (128.0, 64.0)),
        lambda: FcosOptions(3, 32, (8, 16, 32), (64.0, 64.0)),
        lambda: FcosOptions(3, 32, (), ()),
        lambda: FcosOptions(3, 32, (8, -16), (64.0,)),
        lambda: FcosHead(0),
        lambda: FcosHead(3, 48),
        lambda: FcosHead(3, 32, 2)([torch.zeros(1, 32, 4, 4)]),
        lambda: FcosDetectionOptions(threshold=1.5),
        lambda: FcosDetectionOptions(number=0),
    ],
)
def test_settings_are_checked(wrong) -> None:
    with pytest.raises(ArgumentError):
        wrong()
