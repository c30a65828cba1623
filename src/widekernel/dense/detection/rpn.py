"""The region proposal network: one convolution on every map, from which boxes that may contain an object are proposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.dense.detection.anchors import AnchorOptions, grid_anchors, map_sizes
from widekernel.dense.detection.box_coding import decode_deltas
from widekernel.dense.detection.losses import wide
from widekernel.dense.detection.processes import MeanOverProcesses, alone
from widekernel.dense.detection.rpn_targets import RpnTargets, RpnTrainingOptions, rpn_targets
from widekernel.dense.detection.structures import ImageSize, Targets
from widekernel.dense.detection.suppression import suppress
from widekernel.errors import ArgumentError


@dataclass(frozen=True)
class ProposalOptions:
    """How many boxes are proposed.

    Args:
        per_map: boxes of each map that are looked at, those with the highest scores
        number: boxes of an image, at most
        overlap: of boxes of a map that overlap more, only the best stays
    """

    per_map: int = 1000
    number: int = 1000
    overlap: float = 0.7

    def __post_init__(self) -> None:
        if self.per_map < 1 or self.number < 1 or not 0 <= self.overlap <= 1:
            raise ArgumentError(
                f"per_map is {self.per_map}, number {self.number} and overlap {self.overlap}; the numbers must be at least "
                "1 and the overlap between 0 and 1."
            )


@dataclass(frozen=True)
class RpnOptions:
    """Settings of a region proposal network. The defaults are those of the published Cascade Mask R-CNNs.

    Args:
        anchors: the anchors
        training: which anchors train
        smoothing: difference of a delta up to which its loss is quadratic; 0 for the absolute difference, as in Mask R-CNN
        proposals: proposals in evaluation
        training_proposals: proposals in training; Mask R-CNN takes 1000 per image
    """

    anchors: AnchorOptions = field(default_factory=AnchorOptions)
    training: RpnTrainingOptions = field(default_factory=RpnTrainingOptions)
    smoothing: float = 1 / 9
    proposals: ProposalOptions = field(default_factory=ProposalOptions)
    training_proposals: ProposalOptions = field(default_factory=lambda: ProposalOptions(2000, 2000))


class RpnOutputs(NamedTuple):
    """Outputs for each map, fine to coarse; A anchors per position.

    Attributes:
        logits: (N, A, H, W)
        deltas: (N, A * 4, H, W), the four of an anchor next to each other
    """

    logits: list[Tensor]
    deltas: list[Tensor]


class Proposals(NamedTuple):
    """Proposed boxes of an image, by falling score.

    Attributes:
        boxes: (n, 4) float32, in pixels of the batch
        scores: (n,) float32, from 0 to 1
    """

    boxes: Tensor
    scores: Tensor


class RpnHead(nn.Module):
    """Region proposal network (Ren et al., NeurIPS 2015) with the official key names.

    Args:
        channels: channels of the maps, and of the hidden layer
        options: settings
    """

    def __init__(self, channels: int = 256, options: RpnOptions | None = None) -> None:
        super().__init__()
        self.options = options or RpnOptions()
        anchors = len(self.options.anchors.ratios)
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, anchors, 1)
        self.rpn_reg = nn.Conv2d(channels, anchors * 4, 1)
        for conv in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(conv.weight, std=0.01)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> RpnOutputs:
        """Maps (N, C, H_i, W_i) -> outputs."""
        hidden = [self.rpn_conv(map_).relu() for map_ in maps]
        return RpnOutputs([self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden])

    def propose(self, outputs: RpnOutputs, sizes: Sequence[ImageSize]) -> list[Proposals]:
        """Return the proposals of each image, with the numbers for training in training mode; without gradient."""
        options = self.options.training_proposals if self.training else self.options.proposals
        return propose(outputs, sizes, self.options.anchors, options)

    def losses(
        self,
        outputs: RpnOutputs,
        sizes: Sequence[ImageSize],
        targets: Sequence[Targets],
        seeds: Sequence[int],
        mean_over_processes: MeanOverProcesses = alone,
    ) -> dict[str, Tensor]:
        """Return the losses "rpn_cls" and "rpn_box".

        Args:
            outputs: what `forward` returned
            sizes: sizes of the images
            targets: their objects
            seeds: their seeds, which determine the sample of anchors
            mean_over_processes: returns the mean of a tensor over all processes
        """
        options = self.options
        wanted = rpn_targets(map_sizes(outputs.logits), sizes, targets, seeds, options.anchors, options.training)
        return rpn_losses(outputs, wanted, options.smoothing, mean_over_processes)


def _flat(maps: Sequence[Tensor], numbers: int) -> list[Tensor]:
    """Bring maps (N, A * numbers, H, W) to (N, H * W * A, numbers), the order of the anchors, in float32 at least."""
    return [wide(map_.permute(0, 2, 3, 1).reshape(len(map_), -1, numbers)) for map_ in maps]


def rpn_losses(
    outputs: RpnOutputs, targets: RpnTargets, smoothing: float, mean_over_processes: MeanOverProcesses = alone
) -> dict[str, Tensor]:
    """Return cross entropy ("rpn_cls") and smooth L1 on the deltas ("rpn_box").

    Both are sums over the sampled anchors, divided by the number of samples in the batch, where an image without positive or
    without negative ones counts as one of them.
    """
    logits = torch.cat(_flat(outputs.logits, 1), dim=1).squeeze(2)
    deltas = torch.cat(_flat(outputs.deltas, 4), dim=1)
    samples = sum(part.sum(dim=1).clamp(min=1).sum() for part in (targets.positive, targets.negative))
    samples = mean_over_processes(torch.as_tensor(samples, dtype=torch.float32, device=logits.device))
    entropy = F.binary_cross_entropy_with_logits(logits, targets.positive.to(logits.dtype), reduction="none")
    differences = F.smooth_l1_loss(deltas, targets.deltas, reduction="none", beta=smoothing)
    sampled = targets.positive | targets.negative
    return {
        "rpn_cls": torch.where(sampled, entropy, 0.0).sum() / samples,
        "rpn_box": torch.where(targets.positive[..., None], differences, 0.0).sum() / samples,
    }


@torch.no_grad()
def propose(
    outputs: RpnOutputs, sizes: Sequence[ImageSize], anchors: AnchorOptions, options: ProposalOptions
) -> list[Proposals]:
    """Return the best boxes of each image: decoded, clipped to the image, suppressed within each map.

    Args:
        outputs: outputs of the head
        sizes: sizes of the images
        anchors: settings of the anchors
        options: how many
    """
    scores, deltas, places, maps = [], [], [], []
    grids = grid_anchors(map_sizes(outputs.logits), anchors, outputs.logits[0].device)
    for number, (logits, offsets, grid) in enumerate(zip(_flat(outputs.logits, 1), _flat(outputs.deltas, 4), grids)):
        ranked, order = logits.squeeze(2).sigmoid().sort(dim=1, descending=True, stable=True)
        order = order[:, : options.per_map]
        scores.append(ranked[:, : options.per_map])
        deltas.append(offsets.gather(1, order[..., None].expand(-1, -1, 4)))
        places.append(grid[order])
        maps.append(torch.full_like(order, number))
    best = _Candidates(*(torch.cat(parts, dim=1) for parts in (scores, deltas, places, maps)))
    return [_of_an_image(size, _Candidates(*(part[number] for part in best)), options) for number, size in enumerate(sizes)]


class _Candidates(NamedTuple):
    """The best anchors of all maps: (N, n, …) in a batch, (n, …) in an image."""

    scores: Tensor
    deltas: Tensor
    anchors: Tensor
    maps: Tensor


def _of_an_image(size: ImageSize, best: _Candidates, options: ProposalOptions) -> Proposals:
    boxes = decode_deltas(best.anchors, best.deltas, area=(size.height, size.width))
    filled = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores = boxes[filled], best.scores[filled]
    kept = suppress(boxes, scores, best.maps[filled], options.overlap, options.number)
    return Proposals(boxes[kept], scores[kept])
