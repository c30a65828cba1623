"""Losses of semantic segmentation."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from widekernel.dense.segmentation.resizing import resize
from widekernel.dense.segmentation.segmenter import SegmenterOptions, SegmenterOutput
from widekernel.settings import require_one_of

IGNORED = 255
"""Label of pixels that do not count."""

Average = Literal["all", "labeled"]


def segmentation_losses(
    output: SegmenterOutput, labels: Tensor, options: SegmenterOptions, average: Average = "all"
) -> dict[str, Tensor]:
    """Return the losses of the heads, whose sum is to be minimized.

    Logits are resized to the labels and compared by cross entropy, in float32 at least.

    Args:
        output: what the network returned in training.
        labels: class of each pixel (N, H, W), of any integer type; 255 for pixels that do not count.
        options: options of the network.
        average: "all" divides the sum over the labeled pixels by the number of all pixels, as the published recipes do, so
            that images with few labels weigh little; "labeled" divides it by the number of labeled pixels.

    Returns:
        "decode", and "auxiliary" if there is such a head, with its weight.
    """
    require_one_of("average", average, get_args(Average))
    losses = {"decode": _cross_entropy(output.logits, labels, options.align_corners, average)}
    if output.auxiliary is not None:
        auxiliary = _cross_entropy(output.auxiliary, labels, options.align_corners, average)
        losses["auxiliary"] = options.auxiliary_weight * auxiliary
    return losses


def pixel_accuracy(logits: Tensor, labels: Tensor, align_corners: bool = False) -> Tensor:
    """Return the fraction of the labeled pixels whose class has the largest logit, a scalar; 0 if no pixel is labeled.

    Args:
        logits: logits (N, classes, H', W').
        labels: class of each pixel (N, H, W), of any integer type; 255 for pixels that do not count.
        align_corners: how the logits are resized to the labels.
    """
    found = resize(logits.detach(), labels.shape[1:], align_corners).argmax(dim=1)
    labeled = labels != IGNORED
    return ((found == labels) & labeled).sum() / labeled.sum().clamp(min=1)


def _cross_entropy(logits: Tensor, labels: Tensor, align_corners: bool, average: Average) -> Tensor:
    exact = logits.float() if logits.dtype.itemsize < 4 else logits
    resized = resize(exact, labels.shape[1:], align_corners)
    total = F.cross_entropy(resized, labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / (labels.numel() if average == "all" else (labels != IGNORED).sum().clamp(min=1))
