"""Choice of the best boxes."""

from __future__ import annotations

import torch

from widekernel.dense.detection.suppression import best_pairs, suppress, suppress_by_class

BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]])


def test_only_boxes_of_a_group_suppress_each_other() -> None:
    scores = torch.tensor([0.5, 0.9, 0.7])
    assert suppress(BOXES, scores, torch.tensor([0, 0, 0]), 0.5).tolist() == [1, 2]
    assert suppress(BOXES, scores, torch.tensor([0, 1, 0]), 0.5).tolist() == [1, 2, 0]
    assert suppress(BOXES, scores, torch.tensor([0, 1, 0]), 0.5, 2).tolist() == [1, 2]
    assert suppress(BOXES[:0], scores[:0], torch.zeros(0, dtype=torch.int64), 0.5).shape == (0,)


def test_best_pairs_in_the_order_of_places_where_scores_are_equal() -> None:
    scores = torch.tensor([[0.5, 0.05], [0.9, 0.5], [0.0, 0.5]])
    pairs = best_pairs(scores, 0.05, 3)
    assert pairs.scores.tolist() == scores.flatten()[[2, 0, 3]].tolist()
    assert pairs.places.tolist() == [1, 0, 1]
    assert pairs.labels.tolist() == [0, 0, 1]


def test_boxes_of_each_class_and_boxes_that_classes_share() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.0], [0.0, 0.7]])
    boxes, best, labels = suppress_by_class(BOXES, scores, 0.05, 0.5)
    assert labels.tolist() == [0, 1, 1]
    assert torch.equal(boxes, BOXES[[0, 2, 0]])
    assert torch.equal(best, torch.tensor([0.9, 0.7, 0.1]))
    own = torch.stack([BOXES, BOXES + 100], dim=1).flatten(1)
    boxes, _, labels = suppress_by_class(own, scores, 0.05, 0.5, 2)
    assert labels.tolist() == [0, 1]
    assert torch.equal(boxes, torch.stack([BOXES[0], BOXES[2] + 100]))


def test_no_score_above_the_threshold() -> None:
    boxes, scores, labels = suppress_by_class(BOXES, torch.zeros(3, 2), 0.05, 0.5, 10)
    assert boxes.shape == (0, 4)
    assert len(scores) == len(labels) == 0
    nothing = suppress_by_class(torch.zeros(0, 8), torch.zeros(0, 2), 0.05, 0.5)
    assert [len(part) for part in nothing] == [0, 0, 0]
