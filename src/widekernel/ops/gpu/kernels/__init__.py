"""The kernels. They are imported only at launch, because Triton is slow to import and may not be installed."""
