"""Settings of networks for dense prediction: a backbone, and the heads of a task."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from widekernel.errors import ConfigError
from widekernel.settings import require, require_finite, require_literals, require_whole

# What training starts from or how it computes, which a trained network does not depend on.
_OF_TRAINING = ("name", "args", "pretrained", "weights", "load", "grad_checkpointing")


@dataclass(frozen=True)
class BackboneConfig:
    """Settings of the backbone of a network for dense prediction.

    Args:
        name: model name registered with timm, whose stages become the backbone; `widekernel models` lists widekernel's
        args: further arguments of the backbone, for example --model.args.drop_path_rate 0.1
        norms: norm of each map that the heads take: layer (over channels, as in the runs of ConvNeXt and SLaK), none (as in
            those of RepLKNet), or auto, which chooses by the backbone
        pretrained: start from timm's pretrained weights for the backbone
        weights: checkpoint to start from: of a classifier, whose stages the backbone takes, or of the whole network
        load: what is taken from model.weights: auto (all that the file holds) or backbone, such as for other classes
        grad_checkpointing: recompute activations of the backbone in the backward pass, which saves memory and costs time
    """

    name: str = "slak_tiny"
    args: dict[str, Any] = field(default_factory=dict)
    norms: Literal["auto", "layer", "none"] = "auto"
    pretrained: bool = False
    weights: str | None = None
    load: Literal["auto", "backbone"] = "auto"
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        require_finite(self, "model")
        require_literals(self, "model")
        if self.load != "auto" and self.weights is None:
            raise ConfigError(f"model.load is {self.load!r}, but model.weights is not set: leave model.load out.")
        if self.pretrained and self.weights is not None:
            raise ConfigError("model.pretrained and model.weights are both set; choose one of them.")
        for key in ("num_classes", "pretrained", "features_only", "out_indices"):
            if key in self.args:
                raise ConfigError(f"model.args holds {key!r}, which the task sets itself: leave it out.")

    def heads(self) -> dict[str, Any]:
        """Return the settings besides name and arguments that a trained network needs to be built again."""
        return {key: value for key, value in asdict(self).items() if key not in _OF_TRAINING}


@dataclass(frozen=True)
class SegmenterConfig(BackboneConfig):
    """Settings of a network for semantic segmentation: UPerNet on a backbone.

    Args:
        channels: width of UPerNet
        pool_scales: sides of the maps to which UPerNet pools the coarsest map
        dropout: rate at which whole channels are dropped before the classifiers
        align_corners: let the centers of corner pixels coincide when maps are resized, as RepLKNet's runs on Cityscapes do
        auxiliary_channels: width of the auxiliary head, which is used in training only; null for no such head
        auxiliary_weight: weight of its loss
    """

    channels: int = 512
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    align_corners: bool = False
    auxiliary_channels: int | None = 256
    auxiliary_weight: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("model.channels", self.channels, 1)
        ok = bool(self.pool_scales) and all(isinstance(side, int) and side > 0 for side in self.pool_scales)
        require(ok, "model.pool_scales", self.pool_scales, "one or more positive whole numbers")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "from 0 to below 1")
        ok = self.auxiliary_channels is None or self.auxiliary_channels > 0
        require(ok, "model.auxiliary_channels", self.auxiliary_channels, "positive")
        require(self.auxiliary_weight >= 0, "model.auxiliary_weight", self.auxiliary_weight, "0 or more")


@dataclass(frozen=True)
class DetectorConfig(BackboneConfig):
    """Settings of a network for object detection on a backbone.

    Args:
        detector: cascade_rcnn or mask_rcnn, which predict boxes and, unless data.masks is false, masks; or fcos, which
            predicts boxes
        channels: channels of the feature pyramid and of all heads; a multiple of 32 for fcos
        fc_channels: width of the fully connected layers of the second stage (cascade_rcnn, mask_rcnn)
        anchor_scale: side of the square anchors in units of the stride of their map (cascade_rcnn, mask_rcnn)
        proposals: largest number of proposals of an image for the second stage in evaluation; null means 1000, in training
            twice as many for cascade_rcnn
        roi_samples: regions of an image that train the second stage (cascade_rcnn, mask_rcnn)
        score_threshold: smallest score of a detection
        overlap_threshold: of two boxes of a class that overlap more, the worse one is left out
        max_detections: largest number of detections in an image
    """

    detector: Literal["cascade_rcnn", "mask_rcnn", "fcos"] = "cascade_rcnn"
    channels: int = 256
    fc_channels: int = 1024
    anchor_scale: float = 8.0
    proposals: int | None = None
    roi_samples: int = 512
    score_threshold: float = 0.05
    overlap_threshold: float = 0.5
    max_detections: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("score_threshold", "overlap_threshold"):
            require(0 <= getattr(self, key) <= 1, f"model.{key}", getattr(self, key), "from 0 to 1")
        for key in ("channels", "fc_channels", "roi_samples", "max_detections"):
            require_whole(f"model.{key}", getattr(self, key), 1)
        require(self.proposals is None or self.proposals > 0, "model.proposals", self.proposals, "positive")
        require(self.anchor_scale > 0, "model.anchor_scale", self.anchor_scale, "positive")
        if self.detector == "fcos":
            require(self.channels % 32 == 0, "model.channels", self.channels, "a multiple of 32 for fcos")
