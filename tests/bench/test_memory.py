"""Freed memory stays in the process while benchmarks run."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from widekernel.bench import memory
from widekernel.bench.memory import freed_memory, keeping_memory, return_freed_memory

pytest.importorskip("resource")
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not that of glibc")
# Run in a process of its own: after an allocation that failed, glibc serves a thread from heaps that keep no large tensors.
PROGRAM = """
import resource, torch
from widekernel.bench.memory import freed_memory, keeping_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**26, dtype=torch.uint8).zero_()  # 2^14 pages of 4 KiB, or 32 of 2 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert freed_memory() == "returned to the system"
with keeping_memory():
    faults()
    assert min(faults() for _ in range(3)) < 8
    assert freed_memory() == "kept by the process"
    return_freed_memory()
    assert faults() > 8
"""
FAULTING = """
import mmap, threading
from widekernel.bench.memory import freed_memory, keeping_memory

ended, faulted = threading.Event(), threading.Event()

def fault():
    while not ended.is_set():
        with mmap.mmap(-1, 2**20) as pages:
            for place in range(0, len(pages), mmap.PAGESIZE):
                pages[place] = 1
        faulted.set()

other = threading.Thread(target=fault)
other.start()
try:
    assert faulted.wait(60)
    with keeping_memory():
        assert [freed_memory() for _ in range(3)] == ["kept by the process"] * 3
finally:
    ended.set()
    other.join()
"""


class Recorder:
    """A C library that records what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def mallopt(self, parameter: int, value: int) -> None:
        self.asked.append((parameter, value))

    def malloc_trim(self, padding: int) -> None:
        self.asked.append((padding,))


@pytest.mark.slow
@needs_glibc
def test_memory_is_kept_until_it_is_returned() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)


def test_the_end_of_the_block_undoes_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorder()
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    with keeping_memory():
        begun = dict(library.asked)
        library.asked.clear()
    *ended, last = library.asked
    assert begun and begun.keys() <= dict(ended).keys()
    assert all(dict(ended)[parameter] > value for parameter, value in begun.items()) and last == (0,)


def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with keeping_memory():
        return_freed_memory()
    assert freed_memory() in ("kept by the process", "returned to the system", "unknown")


@pytest.mark.slow
@needs_glibc
def test_faults_of_other_threads_do_not_count() -> None:
    """A sweep is continued only if freed memory is kept as before, so other threads must not change the answer."""
    subprocess.run([sys.executable, "-c", FAULTING], check=True, timeout=120)
