"""The region proposal network: targets, losses, proposals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.dense.detection.helpers import check_two_processes
from tests.dense.detection.shapes import batch
from widekernel.dense.detection.anchors import AnchorOptions, grid_anchors
from widekernel.dense.detection.rpn import ProposalOptions, RpnHead, RpnOptions, RpnOutputs, propose, rpn_losses
from widekernel.dense.detection.rpn_targets import RpnTargets, RpnTrainingOptions, rpn_targets
from widekernel.dense.detection.sampling import SampleOptions
from widekernel.dense.detection.structures import ImageSize, Targets
from widekernel.errors import ArgumentError

ANCHORS = AnchorOptions(strides=(8, 16), scale=2.0)
OPTIONS = RpnOptions(ANCHORS, RpnTrainingOptions(sample=SampleOptions(32, 0.5), allowed_border=None))


def maps(count: int) -> list[Tensor]:
    """Return maps of images of 96 x 160 pixels."""
    return [torch.randn(count, 8, 96 // stride, 160 // stride) for stride in ANCHORS.strides]


def test_initial_weights() -> None:
    head = RpnHead(64)
    assert list(head.state_dict()) == [
        f"rpn_{part}.{kind}" for part in ("conv", "cls", "reg") for kind in ("weight", "bias")
    ]
    assert head.rpn_reg.weight.shape == (12, 64, 1, 1)
    for conv in (head.rpn_conv, head.rpn_cls, head.rpn_reg):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert not conv.bias.any()


def grids(flags: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    parts = flags.split([rows * columns * 3 for rows, columns in sizes])
    return [part.view(*size, 3) for part, size in zip(parts, sizes)]


def test_the_sample_of_an_image_does_not_depend_on_the_others() -> None:
    """In a batch with a larger image, the same anchors train, at the same places."""
    size, target = ImageSize(50, 60), Targets(torch.tensor([[5.0, 5.0, 30.0, 30.0]]), torch.tensor([0]))
    large = ImageSize(128, 96)
    small_maps, large_maps = [(8, 8), (4, 4)], [(16, 12), (8, 6)]
    options = OPTIONS.training
    alone = rpn_targets(small_maps, [size], [target], [7], ANCHORS, options)
    among = rpn_targets(large_maps, [large, size], [target, target], [1, 7], ANCHORS, options)
    other = rpn_targets(small_maps, [size], [target], [8], ANCHORS, options)
    assert alone.positive.sum() + alone.negative.sum() == 32
    for ours, both in ((alone.positive[0], among.positive[1]), (alone.negative[0], among.negative[1])):
        for small, big in zip(grids(ours, small_maps), grids(both, large_maps)):
            rows, columns, _ = small.shape
            assert torch.equal(big[:rows, :columns], small)
            assert big.sum() == small.sum()
    assert not torch.equal(alone.negative, other.negative)


def test_anchors_beyond_the_border_do_not_train() -> None:
    _, _, targets, seeds = batch()
    options = RpnTrainingOptions(sample=SampleOptions(1000, 0.5), allowed_border=0)
    sizes = [ImageSize(40, 50)] * 2
    wanted = rpn_targets([(8, 8), (4, 4)], sizes, targets, seeds, ANCHORS, options)
    anchors = torch.cat(grid_anchors([(8, 8), (4, 4)], ANCHORS))
    sampled = wanted.positive | wanted.negative
    assert sampled.any()
    for chosen in sampled:
        kept = anchors[chosen]
        assert (kept[:, :2] >= 0).all()
        assert (kept[:, 2:] < torch.tensor([50.0, 40.0])).all()


def test_images_without_objects_and_without_anchors() -> None:
    """The first has no objects; the second one is so small that no anchor lies inside."""
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    one = Targets(torch.tensor([[1.0, 1.0, 9.0, 9.0]]), torch.tensor([0]))
    options = RpnTrainingOptions(sample=SampleOptions(32, 0.5))
    wanted = rpn_targets([(12, 20), (6, 10)], [ImageSize(64, 64), ImageSize(10, 10)], [none, one], [0, 1], ANCHORS, options)
    assert wanted.positive.sum() == 0
    assert wanted.negative.sum(dim=1).tolist() == [32, 0]
    head = RpnHead(8, RpnOptions(ANCHORS))
    losses = rpn_losses(head(maps(2)), wanted, 0.0)
    assert losses["rpn_box"] == 0
    assert losses["rpn_cls"] > 0
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_two_processes_train_like_one() -> None:
    _, sizes, targets, seeds = batch(count=4)
    targets[0] = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    head, whole = RpnHead(8, OPTIONS), maps(4)

    def losses(part: slice, mean) -> dict[str, Tensor]:
        outputs = head([map_[part] for map_ in whole])
        return head.losses(outputs, sizes[part], targets[part], seeds[part], mean)

    check_two_processes(head, losses)


def test_an_anchor_that_is_wrong_everywhere_costs_its_entropy() -> None:
    outputs = RpnOutputs([torch.tensor([-20.0, 20.0, 0.0]).view(1, 3, 1, 1)], [torch.ones(1, 12, 1, 1)])
    targets = RpnTargets(torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]]), torch.zeros(1, 3, 4))
    losses = rpn_losses(outputs, targets, 0.0)
    assert losses["rpn_cls"].item() == pytest.approx(20.0)
    assert losses["rpn_box"].item() == pytest.approx(4 / 2)


def test_an_image_without_positive_anchors_counts_as_one_more_sample() -> None:
    outputs = RpnOutputs([torch.zeros(2, 3, 1, 1)], [torch.zeros(2, 12, 1, 1)])
    positive = torch.tensor([[True, False, False], [False, False, False]])
    losses = rpn_losses(outputs, RpnTargets(positive, ~positive, torch.zeros(2, 3, 4)), 0.0)
    assert losses["rpn_cls"].item() == pytest.approx(6 * math.log(2) / 7)


def test_proposals_lie_in_the_image_by_falling_score() -> None:
    head = RpnHead(8, RpnOptions(ANCHORS, proposals=ProposalOptions(50, 20), training_proposals=ProposalOptions(50, 25)))
    torch.nn.init.normal_(head.rpn_reg.weight, std=0.3)
    sizes = [ImageSize(50, 160), ImageSize(96, 70)]
    outputs = head(maps(2))
    assert [len(each.boxes) for each in head.propose(outputs, sizes)] == [25, 25]
    proposals = head.eval().propose(outputs, sizes)
    assert [len(each.boxes) for each in proposals] == [20, 20]
    for (boxes, scores), size in zip(proposals, sizes):
        assert not boxes.requires_grad
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([size.width, size.height] * 2)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (scores.diff() <= 0).all()


def test_no_proposals_where_all_boxes_lie_in_the_padding() -> None:
    outputs = RpnOutputs([torch.zeros(1, 3, 1, 1)] * 2, [torch.full((1, 12, 1, 1), 100.0)] * 2)
    (proposals,) = propose(outputs, [ImageSize(8, 8)], ANCHORS, ProposalOptions())
    assert proposals.boxes.shape == (0, 4)


def test_low_precision_outputs() -> None:
    _, sizes, targets, seeds = batch()
    head = RpnHead(8, OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(maps(2))
        assert outputs.logits[0].dtype == torch.bfloat16
        losses = head.losses(outputs, sizes, targets, seeds)
        proposals = head.propose(outputs, sizes)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert proposals[0].boxes.dtype == torch.float32


@pytest.mark.parametrize("wrong", [{"per_map": 0}, {"number": 0}, {"overlap": 1.5}])
def test_numbers_of_proposals_are_checked(wrong: dict) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))}"):
        ProposalOptions(**wrong)


def test_padding_is_checked() -> None:
    with pytest.raises(ArgumentError, match="padding_multiple is 0"):
        RpnTrainingOptions(padding_multiple=0)
