"""Transformations of networks that act on layers by their type."""

from widekernel.transforms.acceleration import AccelerationReport, LayerAcceleration, accelerate

__all__ = ["AccelerationReport", "LayerAcceleration", "accelerate"]
