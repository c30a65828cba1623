"""Semantic segmentation: UPerNet on any feature pyramid, its losses, and inference on whole images and in windows."""

from widekernel.dense.segmentation.heads import FCNHead, UPerHead
from widekernel.dense.segmentation.inference import (
    InferenceOptions,
    View,
    multi_view,
    probabilities,
    slide_inference,
    whole_inference,
)
from widekernel.dense.segmentation.losses import pixel_accuracy, segmentation_losses
from widekernel.dense.segmentation.segmenter import Segmenter, SegmenterOptions, SegmenterOutput

__all__ = [
    "FCNHead",
    "InferenceOptions",
    "Segmenter",
    "SegmenterOptions",
    "SegmenterOutput",
    "UPerHead",
    "View",
    "multi_view",
    "pixel_accuracy",
    "probabilities",
    "segmentation_losses",
    "slide_inference",
    "whole_inference",
]
