"""What the allocator does with freed memory, which may cost more time than a convolution.

The allocator of glibc returns freed memory to the operating system if it was large or lies at the end of the heap. The next
call that needs memory faults it in again, page by page. So the time of a call depends on what ran before it and on where the
heap happened to end. Timings are therefore made while the process keeps freed memory, as allocators for servers do.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

# Parameters of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER, _USUAL_MAPPINGS = -1, 65536
# Where glibc's own adjustment of both thresholds ends, once a tensor of this size was freed.
_MAPPED, _TRIMMED = 2**25, 2**26
# Bytes of the tensors that show what happens to freed memory, number of trials, and page faults that count as none.
_TRIAL, _TRIALS, _FEW = 2**26, 3, 8


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Keep freed memory in the process inside the block, where the allocator is that of glibc; elsewhere, do nothing.

    At the end, freed memory is returned to the operating system.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    library.mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _USUAL_MAPPINGS)
        library.mallopt(_MMAP_THRESHOLD, _MAPPED)
        library.mallopt(_TRIM_THRESHOLD, _TRIMMED)
        library.malloc_trim(0)


def return_freed_memory() -> None:
    """Return freed memory to the operating system, so that memory does not add up over cases; glibc only."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def freed_memory() -> str:
    """Return what happens to the memory of a freed tensor: "kept by the process", or "returned to the system".

    This is found by counting page faults; it is "unknown" where the operating system does not count them.
    """
    try:
        import resource
    except ImportError:
        return "unknown"
    # Of this thread where they are counted by thread: others may fault at the same time.
    counted = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)

    def faults() -> int:
        return resource.getrusage(counted).ru_minflt

    counts = []
    for _ in range(1 + _TRIALS):
        before = faults()
        pages = torch.empty(_TRIAL, dtype=torch.uint8)
        # Not `zero_`, which would divide them among threads.
        ctypes.memset(pages.data_ptr(), 0, _TRIAL)
        del pages
        counts.append(faults() - before)
    # The first tensor needs new memory in any case.
    return "kept by the process" if min(counts[1:]) < _FEW else "returned to the system"


@cache
def _glibc() -> Any:
    """Return the C library of the process if it is glibc, else None."""
    if platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") else None
