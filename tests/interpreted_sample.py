"""Smallest kernel with a loop bound that is an argument, which an interpreter must be able to run."""

import triton
import triton.language as tl


@triton.jit
def counted(out, count):
    """Store the number of passes through a loop of ``count`` passes."""
    passes = 0
    for _ in range(count):
        passes += 1
    tl.store(out, passes)
