"""Parameters and multiply-accumulates of the published two-stage detectors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.parity.downstream.reference import pyramid
from widekernel.dense.detection.two_stage import CascadeRCNN, MaskRCNN, TwoStageDetector, cascade_options, mask_rcnn_options

CONVNEXTS = {
    "tiny": (9, 96),
    "small": (27, 96),
    "base": (27, 128),
    "large": (27, 192),
    "xlarge": (27, 256),
}
NAMES = [
    "cascade_replknet31b",
    "cascade_replknet31l",
    "cascade_replknetxl",
    "cascade_slak_tiny",
    *(f"cascade_convnext_{size}" for size in CONVNEXTS),
    "mask_convnext_tiny",
]
BOXES, MASKS = 1000, 100


def backbone_of(name: str, shared: Path) -> dict[str, Any]:
    """Return the official settings of a detector's backbone."""
    size = name.rpartition("_")[2]
    if size in CONVNEXTS and "convnext" in name:
        depth, width = CONVNEXTS[size]
        dims = [width, 2 * width, 4 * width, 8 * width]
        return {"type": "ConvNeXt", "depths": [3, 3, depth, 3], "dims": dims, "layer_scale_init_value": 1.0}
    path = shared / "parity" / "downstream" / "manifests" / f"{name}.json"
    return json.loads(path.read_text())["config"]["backbone"]


def create_on_meta(name: str, shared: Path) -> TwoStageDetector:
    with torch.device("meta"):
        backbone = pyramid(backbone_of(name, shared))
        if name.startswith("mask"):
            return MaskRCNN(backbone, mask_rcnn_options(80)).eval()
        return CascadeRCNN(backbone, cascade_options(80)).eval()


def run(detector: TwoStageDetector, height: int, width: int) -> Iterator[Any]:
    """Run all layers on images and RoIs without data, except for RoIAlign and the choice of boxes."""
    maps = detector.neck(detector.backbone(torch.empty(1, 3, height, width, device="meta")))
    yield detector.rpn_head(maps)
    channels = detector.options.channels
    for box_head, mask_head in zip(detector.roi_head.box_heads, detector.roi_head.mask_heads):
        yield box_head(torch.empty(BOXES, channels, 7, 7, device="meta"))
        yield mask_head(torch.empty(MASKS, channels, 14, 14, device="meta"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_operations(name: str, shared: Path) -> None:
    rows = json.loads((shared / "parity" / "downstream" / "golden" / "params_flops.json").read_text())["rows"]
    row = next(row for row in rows if row["name"] == name)
    detector = create_on_meta(name, shared)
    assert sum(parameter.numel() for parameter in detector.parameters()) == row["params"]
    for part, number in row["parts"].items():
        assert sum(parameter.numel() for parameter in getattr(detector, part).parameters()) == number, part
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        for _ in run(detector, *row["input_hw"]):
            pass
    assert counter.get_total_flops() / 2e9 == pytest.approx(row["macs_G"], abs=0.01)
