"""What Triton raises when a kernel is launched."""

from triton.runtime.errors import OutOfResources

__all__ = ["OutOfResources"]
