"""Losses of segmentation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from widekernel.dense.segmentation import SegmenterOptions, SegmenterOutput, pixel_accuracy, segmentation_losses
from widekernel.errors import ConfigError

OPTIONS = SegmenterOptions(5)


def case(ignored: int) -> tuple[SegmenterOutput, torch.Tensor]:
    labels = torch.randint(0, 5, (2, 16, 16))
    labels.view(-1)[:ignored] = 255
    return SegmenterOutput(torch.randn(2, 5, 16, 16), torch.randn(2, 5, 16, 16)), labels


@pytest.mark.parametrize("ignored", [0, 100])
def test_averages(ignored: int) -> None:
    output, labels = case(ignored)
    mean = F.cross_entropy(output.logits, labels, ignore_index=255)
    every, labeled = (segmentation_losses(output, labels, OPTIONS, average) for average in ("all", "labeled"))
    torch.testing.assert_close(labeled["decode"], mean)
    torch.testing.assert_close(every["decode"], mean * (512 - ignored) / 512)


def test_no_labels() -> None:
    output, labels = case(512)
    for average in ("all", "labeled"):
        assert all(loss == 0 for loss in segmentation_losses(output, labels, OPTIONS, average).values())
    assert pixel_accuracy(output.logits, labels) == 0


def test_weight_of_the_auxiliary_loss() -> None:
    output, labels = case(10)
    same = SegmenterOutput(output.logits, output.logits)
    losses = segmentation_losses(same, labels, SegmenterOptions(5, auxiliary_weight=0.25))
    torch.testing.assert_close(losses["auxiliary"], 0.25 * losses["decode"])


@pytest.mark.parametrize("align", [False, True])
def test_logits_are_resized(align: bool) -> None:
    logits, labels = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 16, 16))
    losses = segmentation_losses(SegmenterOutput(logits, None), labels, SegmenterOptions(5, align_corners=align))
    large = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=align)
    torch.testing.assert_close(losses["decode"], F.cross_entropy(large, labels))
    torch.testing.assert_close(pixel_accuracy(logits, labels, align), (large.argmax(1) == labels).float().mean())


def test_labels_of_any_integer_type() -> None:
    output, labels = case(10)
    expected = segmentation_losses(output, labels, OPTIONS)
    assert segmentation_losses(output, labels.byte(), OPTIONS) == expected
    assert pixel_accuracy(output.logits, labels.byte()) == pixel_accuracy(output.logits, labels)


def test_accuracy_leaves_out_ignored_pixels() -> None:
    labels = torch.tensor([[[0, 1, 255, 255]]])
    logits = F.one_hot(torch.tensor([[[0, 0, 0, 1]]]), 3).permute(0, 3, 1, 2).float()
    assert pixel_accuracy(logits, labels) == 0.5


def test_unknown_average() -> None:
    with pytest.raises(ConfigError, match=r"average 'labelled' is unknown.*Did you mean 'labeled'"):
        segmentation_losses(*case(0), OPTIONS, "labelled")  # type: ignore[arg-type]
