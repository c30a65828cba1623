"""Deterministic algorithms within a block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Let PyTorch use deterministic algorithms only within the block, and raise where an operation has none.

    cuBLAS is deterministic only with a workspace that an environment variable sets; if it is not set, the block sets it.
    All switches are as before afterwards.

    Args:
        enabled: if false, nothing changes.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, variable = torch.backends.cudnn.benchmark, os.environ.get(_CUBLAS)
    if variable is None:
        os.environ[_CUBLAS] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it may choose another algorithm in each run
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        if variable is None:
            del os.environ[_CUBLAS]
