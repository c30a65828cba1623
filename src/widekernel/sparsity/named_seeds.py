"""Seeds that are a function of (seed, step, name): the same in every process, and after a restart."""

from __future__ import annotations

import hashlib


def named_seed(seed: int, step: int, name: str) -> bytes:
    """Return eight bytes that depend on every argument and on nothing else."""
    return hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
