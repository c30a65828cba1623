"""widekernel."""
