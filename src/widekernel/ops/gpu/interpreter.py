"""Whether Triton interprets kernels instead of compiling them."""

from __future__ import annotations

import os

INTERPRETER = "TRITON_INTERPRET"
"""Environment variable of Triton. If it is 1, Triton interprets kernels; the tests run them on a CPU that way."""


def is_interpreted() -> bool:
    """Return whether Triton interprets kernels instead of compiling them."""
    return os.environ.get(INTERPRETER) == "1"
