"""Two-stage detectors: Cascade R-CNN and Mask R-CNN on any pyramid of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.dense.backbone import Pyramid
from widekernel.dense.detection.fpn import FeaturePyramidNetwork
from widekernel.dense.detection.processes import MeanOverProcesses, alone
from widekernel.dense.detection.roi_head import CascadeRoiHead, RoiHead, SingleRoiHead
from widekernel.dense.detection.roi_options import CASCADE, MASK_RCNN, STRIDES, RoiOptions
from widekernel.dense.detection.rpn import ProposalOptions, RpnHead, RpnOptions
from widekernel.dense.detection.rpn_targets import RpnTrainingOptions
from widekernel.dense.detection.structures import Detections, ImageSize, Targets
from widekernel.dense.detection.target_checks import check_sizes, check_targets, mark_unsound
from widekernel.errors import ArgumentError, ShapeError


@dataclass(frozen=True)
class TwoStageOptions:
    """Settings of a two-stage detector.

    `cascade_options` and `mask_rcnn_options` return those of the published detectors.

    Args:
        num_classes: number of classes, without the background.
        rpn: settings of the region proposal network.
        roi: settings of the second stage.
        masks: whether the detector draws masks.
        channels: channels of the feature pyramid and of all heads.
    """

    num_classes: int
    rpn: RpnOptions
    roi: RoiOptions
    masks: bool = True
    channels: int = 256


def cascade_options(num_classes: int, masks: bool = True) -> TwoStageOptions:
    """Return the settings of Cascade Mask R-CNN in the ConvNeXt, RepLKNet and SLaK papers.

    Args:
        num_classes: number of classes, without the background.
        masks: whether the detector draws masks.
    """
    return TwoStageOptions(num_classes, RpnOptions(), CASCADE, masks)


def mask_rcnn_options(num_classes: int, masks: bool = True) -> TwoStageOptions:
    """Return the settings of Mask R-CNN in the ConvNeXt paper.

    Args:
        num_classes: number of classes, without the background.
        masks: whether the detector draws masks; without them it is Faster R-CNN.
    """
    rpn = RpnOptions(
        training=RpnTrainingOptions(allowed_border=None), smoothing=0, training_proposals=ProposalOptions(2000, 1000)
    )
    return TwoStageOptions(num_classes, rpn, MASK_RCNN, masks)


class TwoStageDetector(nn.Module):
    """Feature pyramid network, region proposal network and a second stage, under the official names.

    Args:
        backbone: pyramid of four maps with strides 4, 8, 16 and 32.
        options: settings.
        roi_head: the second stage.

    Attributes:
        mean_over_processes: averages a tensor over the processes that train together, so that several processes
            compute the losses of one; by default the identity.

    Raises:
        ArgumentError: the pyramid has other strides.
    """

    mean_over_processes: MeanOverProcesses

    def __init__(self, backbone: Pyramid, options: TwoStageOptions, roi_head: RoiHead) -> None:
        super().__init__()
        if tuple(backbone.strides) != STRIDES:
            raise ArgumentError(
                f"The pyramid has the strides {list(backbone.strides)}, but a two-stage detector needs {list(STRIDES)}: "
                "choose the outputs of four stages, or another backbone."
            )
        self.options = options
        self.backbone = backbone
        self.neck = FeaturePyramidNetwork(backbone.channels, options.channels)
        self.rpn_head = RpnHead(options.channels, options.rpn)
        self.roi_head = roi_head
        self.mean_over_processes = alone

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[ImageSize],
        targets: Sequence[Targets] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Compute the losses in training mode, and the detections in evaluation mode.

        Args:
            images: (N, 3, H, W), normalized, then padded with 0 on the right and below.
            sizes: for each image.
            targets: the objects of each image; training mode only. With masks, if the detector draws them.
            seeds: a seed for each image, which determines the choice of anchors and RoIs; training mode only.

        Returns:
            In training mode, the losses by name, means over the batch; their sum is to be minimized. In evaluation mode,
            the detections of each image, in pixels of the original images.

        Raises:
            ArgumentError: targets or seeds are missing in training mode.
            ShapeError: arguments do not fit each other.
            DataError: masks are missing, or boxes or labels on the CPU are malformed; on other devices the losses are then
                NaN.
        """
        if not self.training:
            return self.detect(images, sizes)
        if targets is None or seeds is None:
            missing = "targets" if targets is None else "seeds"
            raise ArgumentError(
                f"There are no {missing}, which training needs. Give {missing}, or call eval() for detections."
            )
        return self.losses(images, sizes, targets, seeds)

    def losses(
        self, images: Tensor, sizes: Sequence[ImageSize], targets: Sequence[Targets], seeds: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return the losses by name; see `forward`."""
        options = self.options
        sound = check_targets(images, sizes, targets, options.num_classes, options.masks)
        if len(seeds) != len(images):
            raise ShapeError(f"There are {len(images)} images, but {len(seeds)} seeds. Give a seed for each image.")
        maps = self.neck(self.backbone(images))
        outputs = self.rpn_head(maps)
        proposals = [each.boxes for each in self.rpn_head.propose(outputs, sizes)]
        losses = self.rpn_head.losses(outputs, sizes, targets, seeds, self.mean_over_processes)
        losses |= self.roi_head.losses(maps, sizes, targets, proposals, seeds, self.mean_over_processes)
        return mark_unsound(losses, sound)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Sequence[ImageSize]) -> list[Detections]:
        """Return the detections of each image, without gradient; see `forward`."""
        check_sizes(images, sizes)
        maps = self.neck(self.backbone(images))
        proposals = [each.boxes for each in self.rpn_head.propose(self.rpn_head(maps), sizes)]
        return self.roi_head.detect(maps, sizes, proposals)


class CascadeRCNN(TwoStageDetector):
    """Cascade R-CNN, with or without masks (Cai and Vasconcelos, CVPR 2018; TPAMI 2019).

    Args:
        backbone: pyramid of four maps with strides 4, 8, 16 and 32.
        options: settings, such as `cascade_options(80)`.
    """

    def __init__(self, backbone: Pyramid, options: TwoStageOptions) -> None:
        super().__init__(
            backbone, options, CascadeRoiHead(options.num_classes, options.channels, options.roi, options.masks)
        )


class MaskRCNN(TwoStageDetector):
    """Mask R-CNN (He et al., ICCV 2017); without masks, Faster R-CNN.

    Args:
        backbone: pyramid of four maps with strides 4, 8, 16 and 32.
        options: settings, such as `mask_rcnn_options(80)`.

    Raises:
        ArgumentError: the second stage has several stages.
    """

    def __init__(self, backbone: Pyramid, options: TwoStageOptions) -> None:
        if len(options.roi.stages) != 1:
            raise ArgumentError(
                f"Mask R-CNN has a single stage, but the settings have {len(options.roi.stages)}: use CascadeRCNN for more."
            )
        super().__init__(backbone, options, SingleRoiHead(options.num_classes, options.channels, options.roi, options.masks))
