"""The kernels. They are imported only to be launched, because Triton is slow to import and may not be installed."""
