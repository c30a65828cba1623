"""The second stage of two-stage detectors: classes, boxes and masks of RoIs, refined in one stage or several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from widekernel.dense.detection.box_coding import decode_deltas, encode_deltas
from widekernel.dense.detection.box_heads import BoxHead, BoxOutputs
from widekernel.dense.detection.losses import wide
from widekernel.dense.detection.mask_heads import MaskHead
from widekernel.dense.detection.mask_pasting import paste_masks
from widekernel.dense.detection.processes import MeanOverProcesses, alone
from widekernel.dense.detection.roi_boxes import count_rois, move_boxes, of_class, positive_places, scale_factors
from widekernel.dense.detection.roi_features import RoiFeatures, as_rois
from widekernel.dense.detection.roi_losses import class_loss, giou_loss, mask_loss
from widekernel.dense.detection.roi_options import STRIDES, RoiOptions, RoiStage
from widekernel.dense.detection.roi_targets import Candidates, RoiSample, RoiSampling, mask_targets, sample_rois
from widekernel.dense.detection.structures import Detections, ImageSize, Targets
from widekernel.dense.detection.suppression import suppress_by_class


class RoiHead(ABC, nn.Module):
    """Box heads and mask heads in stages, each of which starts from the boxes of the one before.

    Args:
        classes: number of classes, without the background.
        channels: channels of the features.
        options: settings.
        masks: whether there are mask heads.
    """

    def __init__(self, classes: int, channels: int, options: RoiOptions, masks: bool) -> None:
        super().__init__()
        self.classes, self.channels, self.options = classes, channels, options
        self.box_features = RoiFeatures(options.box_size, STRIDES)
        self.mask_features = RoiFeatures(options.mask_size, STRIDES) if masks else None

    @property
    @abstractmethod
    def box_heads(self) -> Sequence[BoxHead]:
        """One head per stage."""

    @property
    @abstractmethod
    def mask_heads(self) -> Sequence[MaskHead]:
        """One head per stage; empty without masks."""

    @abstractmethod
    def loss_name(self, stage: int, what: str) -> str:
        """Return the name of a loss of a stage, which is counted from 0."""

    def losses(
        self,
        features: Sequence[Tensor],
        sizes: Sequence[ImageSize],
        targets: Sequence[Targets],
        proposals: Sequence[Tensor],
        seeds: Sequence[int],
        mean_over_processes: MeanOverProcesses = alone,
    ) -> dict[str, Tensor]:
        """Compute the losses of all stages, with their weights.

        Args:
            features: (N, channels, H, W) per level, fine to coarse.
            sizes: for each image.
            targets: for each image, with masks if there are mask heads.
            proposals: (n, 4) for each image, in pixels of the batch.
            seeds: for each image; the choice of RoIs depends on nothing else that is random.
            mean_over_processes: returns the mean of a tensor over all processes.
        """
        candidates = [Candidates(boxes) for boxes in proposals]
        losses: dict[str, Tensor] = {}
        for number, stage in enumerate(self.options.stages):
            sampling = RoiSampling(stage.match, self.options.sample, f"RoIs of stage {number}", self.classes)
            samples = sample_rois(candidates, targets, seeds, sampling)
            outputs = self._box_outputs(number, features, [sample.boxes for sample in samples])
            numbers = mean_over_processes(count_rois(samples), 1.0)
            found = self._box_losses(stage, outputs, samples, targets, numbers[0])
            if self.mask_heads:
                found["mask"] = self._mask_loss(number, features, samples, targets, numbers[1])
            losses.update({self.loss_name(number, what): loss * stage.weight for what, loss in found.items()})
            if number + 1 < len(self.options.stages):
                candidates = self._next_candidates(stage, outputs, samples, sizes)
        return losses

    def detect(
        self, features: Sequence[Tensor], sizes: Sequence[ImageSize], proposals: Sequence[Tensor]
    ) -> list[Detections]:
        """Find objects.

        Scores are those of the mean of all stages' logits, boxes those of the last stage, and masks the mean of all mask
        heads on the final boxes.

        Args:
            features: (N, channels, H, W) per level, fine to coarse.
            sizes: for each image.
            proposals: (n, 4) for each image, in pixels of the batch.
        """
        boxes, stages = list(proposals), self.options.stages
        logits = []
        for number, stage in enumerate(stages):
            outputs = self._box_outputs(number, features, boxes)
            logits.append(wide(outputs.logits))
            if number + 1 < len(stages):
                best = outputs.logits[:, :-1].argmax(1)
                boxes = move_boxes(boxes, of_class(outputs.deltas, best), stage, sizes)
        scores = (sum(logits[1:], logits[0]) / len(logits)).softmax(1)[:, :-1]
        counts = [len(each) for each in boxes]
        parts = zip(boxes, scores.split(counts), wide(outputs.deltas).split(counts), sizes)
        found = [self._best(box, score, deltas, size) for box, score, deltas, size in parts]
        return self._with_masks(features, found, sizes) if self.mask_heads else found

    def _box_outputs(self, number: int, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> BoxOutputs:
        return self.box_heads[number](self.box_features(features, as_rois(boxes)))  # type: ignore[no-any-return]

    def _box_losses(
        self,
        stage: RoiStage,
        outputs: BoxOutputs,
        samples: Sequence[RoiSample],
        targets: Sequence[Targets],
        number: Tensor,
    ) -> dict[str, Tensor]:
        labels = torch.cat([sample.labels for sample in samples])
        positive = positive_places(samples)
        rois = torch.cat([sample.boxes for sample in samples])[positive]
        wanted = torch.cat([target.boxes[sample.matched] for sample, target in zip(samples, targets)])
        deltas = of_class(outputs.deltas[positive], labels[positive])
        if self.options.box_loss == "giou":
            each = giou_loss(decode_deltas(rois, deltas, stage.stds), wanted)
        else:
            each = (deltas - encode_deltas(rois, wanted, stage.stds)).abs()
        box = each.sum() * self.options.box_loss_weight / number
        return {"cls": class_loss(outputs.logits, labels, number), "box": box}

    def _mask_loss(
        self,
        number: int,
        features: Sequence[Tensor],
        samples: Sequence[RoiSample],
        targets: Sequence[Targets],
        positives: Tensor,
    ) -> Tensor:
        assert self.mask_features is not None
        boxes = [sample.boxes[: len(sample.matched)] for sample in samples]
        labels = torch.cat([sample.labels[: len(sample.matched)] for sample in samples])
        logits = self.mask_heads[number](self.mask_features(features, as_rois(boxes)))
        wanted = []
        for box, sample, target in zip(boxes, samples, targets):
            assert target.masks is not None  # checked before
            wanted.append(mask_targets(target.masks, box, sample.matched, logits.shape[-1]))
        return mask_loss(logits, torch.cat(wanted), labels, positives)

    @torch.no_grad()
    def _next_candidates(
        self, stage: RoiStage, outputs: BoxOutputs, samples: Sequence[RoiSample], sizes: Sequence[ImageSize]
    ) -> list[Candidates]:
        """Correct the RoIs for the next stage: for their object's class, or for the best one where there is no object."""
        labels = torch.cat([sample.labels for sample in samples])
        labels = torch.where(labels == self.classes, outputs.logits[:, :-1].argmax(1), labels)
        moved = move_boxes([sample.boxes for sample in samples], of_class(outputs.deltas, labels), stage, sizes)
        return [Candidates(boxes, ~sample.is_truth) for boxes, sample in zip(moved, samples)]

    def _best(self, boxes: Tensor, scores: Tensor, deltas: Tensor, size: ImageSize) -> Detections:
        """Return the detections of an image, given the RoIs of the last stage and its corrections."""
        options = self.options
        area = size.height, size.width
        decoded = decode_deltas(boxes, deltas, options.stages[-1].stds, area).unflatten(1, (-1, 4))
        decoded = (decoded / scale_factors(size, boxes)).flatten(1)
        chosen = suppress_by_class(decoded, scores, options.score_threshold, options.overlap_threshold, options.most)
        return Detections(*chosen)

    def _with_masks(
        self, features: Sequence[Tensor], found: Sequence[Detections], sizes: Sequence[ImageSize]
    ) -> list[Detections]:
        assert self.mask_features is not None
        rois = as_rois([each.boxes * scale_factors(size, each.boxes) for each, size in zip(found, sizes)])
        labels = torch.cat([each.labels for each in found])
        own = torch.arange(len(labels), device=labels.device), labels
        x = self.mask_features(features, rois)
        soft = torch.stack([wide(head(x)[own]).sigmoid() for head in self.mask_heads]).mean(0)
        result = []
        for each, size, part in zip(found, sizes, soft.split([len(each.labels) for each in found])):
            masks = paste_masks(part, each.boxes, *size.original, self.options.mask_threshold)
            result.append(each._replace(masks=masks))
        return result


class CascadeRoiHead(RoiHead):
    """Several stages, each with heads of its own."""

    def __init__(self, classes: int, channels: int, options: RoiOptions, masks: bool = True) -> None:
        super().__init__(classes, channels, options, masks)
        self.bbox_head = nn.ModuleList(_box_head(self) for _ in options.stages)
        if masks:
            self.mask_head = nn.ModuleList(MaskHead(classes, channels) for _ in options.stages)

    @property
    @override
    def box_heads(self) -> Sequence[BoxHead]:
        return self.bbox_head  # type: ignore[return-value]

    @property
    @override
    def mask_heads(self) -> Sequence[MaskHead]:
        return self.mask_head if self.mask_features is not None else ()  # type: ignore[return-value]

    @override
    def loss_name(self, stage: int, what: str) -> str:
        return f"stage{stage + 1}_{what}"


class SingleRoiHead(RoiHead):
    """A single stage."""

    def __init__(self, classes: int, channels: int, options: RoiOptions, masks: bool = True) -> None:
        super().__init__(classes, channels, options, masks)
        self.bbox_head = _box_head(self)
        if masks:
            self.mask_head = MaskHead(classes, channels)

    @property
    @override
    def box_heads(self) -> Sequence[BoxHead]:
        return (self.bbox_head,)

    @property
    @override
    def mask_heads(self) -> Sequence[MaskHead]:
        return (self.mask_head,) if self.mask_features is not None else ()

    @override
    def loss_name(self, stage: int, what: str) -> str:
        return f"roi_{what}"


def _box_head(head: RoiHead) -> BoxHead:
    options = head.options
    return BoxHead(head.classes, head.channels, options.box_size, options.convs, options.fcs, options.fc_channels)
