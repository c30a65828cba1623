"""`accelerate`: our operator and the faster implementation of pointwise layers, for any network."""

from widekernel.transforms.acceleration.report import AccelerationReport, LayerAcceleration
from widekernel.transforms.acceleration.swapping import accelerate

__all__ = ["AccelerationReport", "LayerAcceleration", "accelerate"]
