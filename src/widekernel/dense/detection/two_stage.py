"""Two-stage detectors: Cascade R-CNN and Mask R-CNN on any pyramid of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from widekernel.dense.backbone import Pyramid
from widekernel.dense.detection.fpn import FeaturePyramidNetwork
from widekernel.dense.detection.roi_head import CascadeRoiHead, RoiHead, SingleRoiHead
from widekernel.dense.detection.roi_options import CASCADE, MASK_RCNN, STRIDES, RoiOptions
from widekernel.dense.detection.roi_targets import check_targets
from widekernel.dense.detection.rpn import ProposalOptions, RpnHead, RpnOptions, alone
from widekernel.dense.detection.rpn_targets import RpnTrainingOptions
from widekernel.dense.detection.structures import Detections, ImageSize, Targets
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

    mean_over_processes: Callable[[Tensor], Tensor]

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
            ShapeError: the sizes do not fit the images.
            ArgumentError: targets or seeds are missing in training mode, or do not fit the images.
        """
        _check_sizes(images, sizes)
        if self.training:
            targets, seeds = _needed(targets, "targets"), _needed(seeds, "seeds")
            check_targets(targets, len(images), seeds, self.options.masks)
        maps = self.neck(self.backbone(images))
        outputs = self.rpn_head(maps)
        proposals = [each.boxes for each in self.rpn_head.propose(outputs, sizes)]
        if not self.training:
            return self.roi_head.detect(maps, sizes, proposals)
        assert targets is not None and seeds is not None  # noqa: PT018
        losses = self.rpn_head.losses(outputs, sizes, targets, seeds, self.mean_over_processes)
        return losses | self.roi_head.losses(maps, sizes, targets, proposals, seeds, self.mean_over_processes)


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


def _needed(value: Sequence | None, name: str) -> Sequence:
    if value is None:
        raise ArgumentError(f"{name} is None, but training needs it: give {name}, or call eval() for detections.")
    return value


def _check_sizes(images: Tensor, sizes: Sequence[ImageSize]) -> None:
    if images.dim() != 4 or len(sizes) != len(images):
        raise ShapeError(f"Images are (N, 3, H, W) with N sizes, but got {tuple(images.shape)} and {len(sizes)} sizes.")
    for number, size in enumerate(sizes):
        if not 0 < size.height <= images.shape[2] or not 0 < size.width <= images.shape[3]:
            raise ShapeError(
                f"Image {number} has {size.height} x {size.width} pixels, but the batch {tuple(images.shape[2:])}: the size "
                "of an image is that before padding."
            )
