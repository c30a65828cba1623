"""The smallest kernel that has a loop over a number of the call: what an interpreter must be able to run."""

import triton
import triton.language as tl


@triton.jit
def counted(out, count):
    """Store the number of passes through a loop of ``count`` passes."""
    passes = 0
    for _ in range(count):
        passes += 1
    tl.store(out, passes)
