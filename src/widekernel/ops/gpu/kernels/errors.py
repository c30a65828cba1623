"""The error that Triton raises if a kernel does not fit on the GPU."""

from triton.runtime.errors import OutOfResources

__all__ = ["OutOfResources"]
