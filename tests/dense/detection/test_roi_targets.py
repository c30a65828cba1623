"""The choice of RoIs for training, and their masks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from widekernel.dense.detection.matching import MatchOptions
from widekernel.dense.detection.roi_targets import Candidates, RoiSample, RoiSampling, mask_targets, sample_rois
from widekernel.dense.detection.sampling import SampleOptions
from widekernel.dense.detection.structures import Targets

SAMPLING = RoiSampling(MatchOptions(0.5, 0.5, 0.5), SampleOptions(40, 0.25), "test", background=9)
OBJECTS = Targets(torch.tensor([[0.0, 0, 20, 20], [40, 40, 60, 60]]), torch.tensor([3, 5]))


def candidates(positive: int = 30, negative: int = 100) -> Tensor:
    """Return boxes close to the second object, then boxes far away."""
    near = OBJECTS.boxes[1] + torch.arange(positive).unsqueeze(1) * 0.1
    far = torch.tensor([100.0, 100, 110, 110]) + torch.arange(negative).unsqueeze(1)
    return torch.cat([near, far])


def one(boxes: Tensor, seed: int = 0, usable: Tensor | None = None, targets: Targets = OBJECTS) -> RoiSample:
    return sample_rois([Candidates(boxes, usable)], [targets], [seed], SAMPLING)[0]


def test_positive_rois_come_first() -> None:
    sample = one(candidates())
    assert len(sample.boxes) == 40
    assert len(sample.matched) == 10
    assert torch.equal(sample.labels[:10], OBJECTS.labels[sample.matched])
    assert (sample.labels[10:] == 9).all()
    assert (sample.boxes[10:] >= 100).all()
    assert not sample.is_truth[10:].any()


def test_few_candidates_are_all_taken_after_the_objects() -> None:
    boxes = candidates(positive=3, negative=4)
    sample = one(boxes)
    assert torch.equal(sample.boxes, torch.cat([OBJECTS.boxes, boxes]))
    assert sample.matched.tolist() == [0, 1, 1, 1, 1]
    assert sample.is_truth.tolist() == [True, True, *[False] * 7]


def test_negative_rois_fill_what_positive_ones_leave() -> None:
    sample = one(candidates(positive=1))
    assert (len(sample.boxes), len(sample.matched)) == (40, 3)


def test_choice_is_a_function_of_the_seed() -> None:
    assert torch.equal(one(candidates(), 7).boxes, one(candidates(), 7).boxes)
    assert not torch.equal(one(candidates(), 7).boxes, one(candidates(), 8).boxes)
    other = sample_rois([Candidates(candidates())], [OBJECTS], [7], replace(SAMPLING, purpose="other"))[0]
    assert not torch.equal(one(candidates(), 7).boxes, other.boxes)


def test_images_of_a_batch_are_independent() -> None:
    many = [Candidates(candidates()), Candidates(candidates(2, 3)), Candidates(candidates())]
    found = sample_rois(many, [OBJECTS] * 3, [7, 8, 9], SAMPLING)
    assert torch.equal(found[2].boxes, one(candidates(), 9).boxes)
    assert torch.equal(found[1].boxes, one(candidates(2, 3), 8).boxes)


def test_unusable_candidates_are_never_chosen() -> None:
    boxes = candidates(positive=3, negative=4)
    usable = torch.tensor([True, False, True, True, False, True, True])
    assert torch.equal(one(boxes, usable=usable).boxes, torch.cat([OBJECTS.boxes, boxes[usable]]))


def test_objects_do_not_take_low_quality_matches_from_candidates() -> None:
    """The best candidate of an object stands for it although its own box overlaps more."""
    low = replace(SAMPLING, match=MatchOptions(0.9, 0.9, 0.5, low_quality=True))
    boxes = torch.tensor([[0.0, 0, 20, 15], [0, 0, 20, 14]])
    sample = sample_rois([Candidates(boxes)], [OBJECTS], [0], low)[0]
    assert sample.matched.tolist() == [0, 1, 0]
    assert torch.equal(sample.boxes[2], boxes[0])


def test_image_without_objects() -> None:
    nothing = Targets(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    sample = one(candidates(), targets=nothing)
    assert (len(sample.boxes), len(sample.matched)) == (40, 0)
    assert (sample.labels == 9).all()
    assert not sample.is_truth.any()
    assert one(torch.empty(0, 4), targets=nothing).boxes.shape == (0, 4)


def test_labels_out_of_range_do_not_become_an_index() -> None:
    sample = one(candidates(), targets=OBJECTS._replace(labels=torch.tensor([-7, 90])))
    assert set(sample.labels[:10].tolist()) <= {0, 8}


def test_mask_targets_follow_the_roi() -> None:
    masks = torch.zeros(2, 16, 16, dtype=torch.uint8)
    masks[1, 4:12, 4:12] = 1
    boxes = torch.tensor([[4.0, 4, 12, 12], [0, 0, 8, 8], [4, 4, 12, 12]])
    targets = mask_targets(masks, boxes, torch.tensor([1, 1, 0]), 4)
    assert targets[0].all()
    assert targets[1].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert not targets[2].any()
    assert mask_targets(masks[:0], boxes[:0], torch.empty(0, dtype=torch.int64), 4).shape == (0, 4, 4)
