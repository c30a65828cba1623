"""Object detectors and instance segmentation: FCOS, Cascade R-CNN and Mask R-CNN on any feature pyramid."""

from widekernel.dense.detection.fcos import Fcos, FcosDetectionOptions, FcosOptions
from widekernel.dense.detection.roi_options import CASCADE, MASK_RCNN, RoiOptions, RoiStage
from widekernel.dense.detection.rpn import ProposalOptions, RpnOptions
from widekernel.dense.detection.structures import Detections, ImageSize, Targets
from widekernel.dense.detection.two_stage import (
    CascadeRCNN,
    MaskRCNN,
    TwoStageDetector,
    TwoStageOptions,
    cascade_options,
    mask_rcnn_options,
)

__all__ = [
    "CASCADE",
    "MASK_RCNN",
    "CascadeRCNN",
    "Detections",
    "Fcos",
    "FcosDetectionOptions",
    "FcosOptions",
    "ImageSize",
    "MaskRCNN",
    "ProposalOptions",
    "RoiOptions",
    "RoiStage",
    "RpnOptions",
    "Targets",
    "TwoStageDetector",
    "TwoStageOptions",
    "cascade_options",
    "mask_rcnn_options",
]
