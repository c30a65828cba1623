"""Our own kernels for NVIDIA GPUs, written in Triton."""
