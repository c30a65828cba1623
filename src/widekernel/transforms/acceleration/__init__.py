"""`accelerate`: our operator, the faster implementation of pointwise layers, and fused blocks, for any network."""

from widekernel.transforms.acceleration.fusion import FusedBlock
from widekernel.transforms.acceleration.report import AccelerationReport, LayerAcceleration
from widekernel.transforms.acceleration.swapping import accelerate, swap_layers

__all__ = ["AccelerationReport", "FusedBlock", "LayerAcceleration", "accelerate", "swap_layers"]
