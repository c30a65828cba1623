"""Fused blocks: parts of a block that one native call computes in inference, found in the block's graph."""

from widekernel.transforms.acceleration.fusion.chains import FusedChain, chain, unchain, unfused
from widekernel.transforms.acceleration.fusion.fused import FusedBlock, fuse, unfuse

__all__ = ["FusedBlock", "FusedChain", "chain", "fuse", "unchain", "unfuse", "unfused"]
