"""Fused blocks: parts of a block that one native call computes in inference, found in the block's graph."""

from widekernel.transforms.acceleration.fusion.fused import FusedBlock, fuse, unfuse, unfused

__all__ = ["FusedBlock", "fuse", "unfuse", "unfused"]
