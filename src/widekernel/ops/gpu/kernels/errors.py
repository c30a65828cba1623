"""Triton's error for kernels that do not fit on the GPU."""

from triton.runtime.errors import OutOfResources

__all__ = ["OutOfResources"]
