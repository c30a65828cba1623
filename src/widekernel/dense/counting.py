"""Forms of networks for dense prediction whose layers can be counted on images without data."""

from __future__ import annotations

from torch import Tensor, nn

from widekernel.dense.detection.fcos import Fcos
from widekernel.dense.detection.two_stage import TwoStageDetector


def countable(network: nn.Module) -> nn.Module:
    """Return a module that runs all layers of a network on images (N, 3, H, W), whatever the pixels are.

    Detectors choose boxes by their scores. The module runs the layers of a two-stage detector on a fixed number of boxes
    instead, as published counts do. Any other network is returned as it is.
    """
    if isinstance(network, TwoStageDetector):
        return FixedBoxes(network)
    return OutputsOnly(network) if isinstance(network, Fcos) else network


class FixedBoxes(nn.Module):
    """All layers of a two-stage detector, with zeros for the features of a fixed number of boxes.

    Args:
        detector: the detector.
        boxes: number of boxes in each stage of box heads.
        masks: number of boxes in each stage of mask heads.
    """

    def __init__(self, detector: TwoStageDetector, boxes: int = 1000, masks: int = 100) -> None:
        super().__init__()
        self.detector, self.boxes, self.masks = detector, boxes, masks

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> outputs of the box heads, then of the mask heads."""
        maps = self.detector.neck(self.detector.backbone(images))
        self.detector.rpn_head(maps)
        head = self.detector.roi_head
        parts: list[tuple[nn.Module, int, int]] = [(part, self.boxes, head.options.box_size) for part in head.box_heads]
        parts += [(part, self.masks, head.options.mask_size) for part in head.mask_heads]
        outputs: list[Tensor] = []
        for part, count, side in parts:
            found = part(maps[0].new_zeros(count, head.channels, side, side))
            outputs += [found] if isinstance(found, Tensor) else list(found)
        return outputs


class OutputsOnly(nn.Module):
    """All layers of FCOS, without the choice of boxes.

    Args:
        detector: the detector.
    """

    def __init__(self, detector: Fcos) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> logits, distances and centerness of every level."""
        return [part for parts in self.detector.outputs(images) for part in parts]
