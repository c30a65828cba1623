"""Whether Triton interprets kernels instead of compiling them."""

from __future__ import annotations

import os

INTERPRETER = "TRITON_INTERPRET"
"""Environment variable of Triton. With 1 it interprets kernels, which is how tests run them on a CPU."""


def is_interpreted() -> bool:
    """Return whether Triton interprets kernels instead of compiling them."""
    return os.environ.get(INTERPRETER) == "1"
