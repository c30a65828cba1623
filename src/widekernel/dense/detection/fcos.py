"""FCOS: a one-stage detector of boxes without anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.dense.backbone import Pyramid
from widekernel.dense.detection.anchors import grid_points, map_sizes
from widekernel.dense.detection.box_coding import decode_distances
from widekernel.dense.detection.constants import constant
from widekernel.dense.detection.fcos_head import FcosHead, FcosOutputs
from widekernel.dense.detection.fcos_targets import FcosTargets, centerness, fcos_targets, point_ranges
from widekernel.dense.detection.fpn import FeaturePyramidNetwork
from widekernel.dense.detection.losses import focal_loss, iou_loss, wide
from widekernel.dense.detection.processes import MeanOverProcesses, alone
from widekernel.dense.detection.structures import Detections, ImageSize, Targets
from widekernel.dense.detection.suppression import best_pairs, suppress
from widekernel.dense.detection.target_checks import check_sizes, check_targets, mark_unsound
from widekernel.errors import ArgumentError

_SMALLEST_SUM = 1e-6


@dataclass(frozen=True)
class FcosDetectionOptions:
    """Which boxes are detections.

    Args:
        threshold: a class score must be higher; the centerness does not count here
        per_map: pairs of a position and a class of each map that are looked at
        overlap: of boxes of a class that overlap more, only the best stays
        number: detections of an image, at most
    """

    threshold: float = 0.05
    per_map: int = 1000
    overlap: float = 0.5
    number: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or not 0 <= self.overlap <= 1 or min(self.per_map, self.number) < 1:
            raise ArgumentError(
                f"threshold is {self.threshold}, overlap {self.overlap}, per_map {self.per_map} and number {self.number}; "
                "the first two must lie between 0 and 1, the others be at least 1."
            )


@dataclass(frozen=True)
class FcosOptions:
    """Settings of FCOS. The defaults are the published ones.

    Args:
        num_classes: number of classes
        channels: channels of the pyramid and the head, a multiple of 32
        strides: strides of the maps; the backbone provides the first ones, convolutions the others
        bounds: largest distance from a point to the sides of its box at which each map hands over to the next coarser one
        detections: which boxes are detections
    """

    num_classes: int = 80
    channels: int = 256
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    bounds: tuple[float, ...] = (64.0, 128.0, 256.0, 512.0)
    detections: FcosDetectionOptions = field(default_factory=FcosDetectionOptions)

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip((0, *self.bounds), self.bounds))
        if not self.strides or min(self.strides) < 1 or len(self.bounds) != len(self.strides) - 1 or not rising:
            raise ArgumentError(
                f"strides are {self.strides} and bounds {self.bounds}; strides must be positive, and bounds, one less, must "
                "rise from above 0."
            )


class Fcos(nn.Module):
    """Fully convolutional one-stage detector (Tian et al., ICCV 2019) in its original form.

    No centers are sampled, distances are not normalized, and the centerness stands beside the classes. Weights have the
    official names `neck.…` and `bbox_head.…`.

    Args:
        backbone: feature pyramid; of its maps, those with the first strides of the options are used. Finer maps are better
            not built (`out_indices=3`), since norms of unused maps get no gradient.
        options: settings

    Attributes:
        mean_over_processes: returns the mean of a tensor over all processes that train together; by default there is one

    Raises:
        ArgumentError: if the backbone lacks a map of the first stride, or its further strides differ from the options.
    """

    mean_over_processes: MeanOverProcesses

    def __init__(self, backbone: Pyramid, options: FcosOptions | None = None) -> None:
        super().__init__()
        self.options = options = options or FcosOptions()
        self.first = _first_map(backbone.strides, options.strides)
        self.backbone = backbone
        self.neck = FeaturePyramidNetwork(
            backbone.channels[self.first :], options.channels, len(options.strides), extra="convs"
        )
        self.bbox_head = FcosHead(options.num_classes, options.channels, len(options.strides))
        self.mean_over_processes = alone

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[ImageSize],
        targets: Sequence[Targets] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Return losses in training mode, whose sum is to be minimized, and detections in evaluation mode.

        Args:
            images: (N, C, H, W), zero in the padding to the right and below
            sizes: sizes of the images without their padding
            targets: objects of each image, in training
            seeds: seeds of the images; taken as other detectors take them, but nothing is random here

        Raises:
            ShapeError: if arguments do not fit each other.
            DataError: if boxes or labels on the CPU are malformed; on other devices the losses are then NaN.
        """
        if not self.training:
            return self.detect(images, sizes)
        if targets is None:
            raise ArgumentError("There are no targets, which training needs. Give targets, or call eval() for detections.")
        return self.losses(images, sizes, targets)

    def outputs(self, images: Tensor) -> FcosOutputs:
        """Return the outputs of the head for images (N, C, H, W)."""
        return self.bbox_head(self.neck(self.backbone(images)[self.first :]))

    def losses(self, images: Tensor, sizes: Sequence[ImageSize], targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Return the losses "cls", "box" and "centerness", in either mode."""
        sound = check_targets(images, sizes, targets, self.options.num_classes)
        outputs = self.outputs(images)
        points = grid_points(map_sizes(outputs.logits), self.options.strides, images.device)
        ranges = point_ranges(self.options.bounds, [len(part) for part in points], images.device)
        wanted = fcos_targets(torch.cat(points), ranges, targets)
        return mark_unsound(fcos_losses(outputs, wanted, self.mean_over_processes), sound)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Sequence[ImageSize]) -> list[Detections]:
        """Return the detections of each image, in either mode, without gradient."""
        check_sizes(images, sizes)
        outputs = self.outputs(images)
        points = grid_points(map_sizes(outputs.logits), self.options.strides, images.device)
        return [detections_of(number, size, outputs, points, self.options.detections) for number, size in enumerate(sizes)]


def _first_map(have: Sequence[int], wanted: Sequence[int]) -> int:
    """Return the number of the backbone's map with the first wanted stride."""
    first = have.index(wanted[0]) if wanted[0] in have else len(have)
    used = list(have[first:])
    if not used or used != list(wanted[: len(used)]):
        raise ArgumentError(
            f"The backbone's maps have the strides {list(have)}, but those of the detector are {list(wanted)}. Build the "
            f"pyramid so that its last maps have the first of these strides, starting with {wanted[0]}."
        )
    return first


def _flat(maps: Sequence[Tensor]) -> Tensor:
    """Bring maps (N, K, H_i, W_i) to (N, n, K), the order of the points, in float32 at least."""
    return wide(torch.cat([map_.flatten(2).transpose(1, 2) for map_ in maps], dim=1))


def fcos_losses(
    outputs: FcosOutputs, targets: FcosTargets, mean_over_processes: MeanOverProcesses = alone
) -> dict[str, Tensor]:
    """Return the losses of classes ("cls"), boxes ("box") and centerness ("centerness").

    Focal loss over all points, and cross entropy of the centerness over positive ones, are divided by the number of positive
    points, at least 1 over all processes; the negative logarithm of the overlap is weighed by the centerness. Without
    positive points, the last two are 0.
    """
    positive = targets.labels >= 0
    # Elsewhere, no gradient may come from an exponential that overflows.
    log_distances = torch.where(positive[..., None], _flat(outputs.log_distances), 0.0)
    distances = torch.where(positive[..., None], targets.distances.to(log_distances.dtype), 1.0)
    wanted = torch.where(positive, centerness(distances), 0.0)
    sums = torch.stack([positive.sum().to(wanted.dtype), wanted.sum()])
    points, weight = mean_over_processes(sums, constant([1.0, _SMALLEST_SUM], sums.device, sums.dtype))
    origin = distances.new_zeros(1, 2)
    boxes = decode_distances(origin, log_distances.exp().flatten(0, 1))
    overlap = iou_loss(boxes, decode_distances(origin, distances.flatten(0, 1)))
    entropy = F.binary_cross_entropy_with_logits(_flat(outputs.centerness).squeeze(2), wanted, reduction="none")
    return {
        "cls": focal_loss(_flat(outputs.logits).flatten(0, 1), targets.labels.flatten()).sum() / points,
        "box": (overlap * wanted.flatten()).sum() / weight,
        "centerness": torch.where(positive, entropy, 0.0).sum() / points,
    }


def detections_of(
    number: int, size: ImageSize, outputs: FcosOutputs, points: Sequence[Tensor], options: FcosDetectionOptions
) -> Detections:
    """Return the detections of one image of a batch.

    Args:
        number: the image
        size: its size
        outputs: outputs of the head
        points: points of each map
        options: which boxes are detections
    """
    boxes, scores, labels = [], [], []
    for logits, log_distances, center, places in zip(*outputs, points):
        found = best_pairs(_flat([logits[number, None]])[0].sigmoid(), options.threshold, options.per_map)
        distances = _flat([log_distances[number, None]])[0, found.places].exp()
        boxes.append(decode_distances(places[found.places], distances, (size.height, size.width)))
        scores.append(found.scores * _flat([center[number, None]])[0, found.places, 0].sigmoid())
        labels.append(found.labels)
    scale = boxes[0].new_tensor((size.scale_x, size.scale_y, size.scale_x, size.scale_y))
    all_boxes, all_scores, all_labels = torch.cat(boxes) / scale, torch.cat(scores), torch.cat(labels)
    kept = suppress(all_boxes, all_scores, all_labels, options.overlap, options.number)
    return Detections(all_boxes[kept], all_scores[kept], all_labels[kept])
