"""Threads of the native library: each task runs once, in PyTorch's pool, nested, from many threads, and after a fork."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ops.cpu.compiling import NATIVE, compiled
from widekernel.ops.cpu import library
from widekernel.ops.cpu.openmp import openmp_runtime

# Tasks that write down which thread ran them, and as how many-th. Those that are to meet wait until that number of threads
# have begun one, however slowly a busy machine starts them.
PROBE = """
#include "threads.hpp"
#include <atomic>
#include <unistd.h>

struct Log { int64_t *thread, *order; int64_t run; int32_t meeting, inner; std::atomic<int64_t> clock{0}, arrived{0}; };

static int64_t myself() { static thread_local char mark; return reinterpret_cast<int64_t>(&mark); }

static std::atomic<int64_t> runs{0};
static thread_local int64_t met = 0;

static void count(void *counter, int64_t) { ++*static_cast<std::atomic<int64_t> *>(counter); }

static void task(void *context, int64_t task) {
    Log &log = *static_cast<Log *>(context);
    log.thread[task] = myself();
    log.order[task] = log.clock++;
    if (met != log.run) {
        met = log.run;
        ++log.arrived;
    }
    for (int wait = 0; log.arrived < log.meeting && wait < 300000; ++wait) usleep(100);
    if (log.inner) {
        std::atomic<int64_t> done{0};
        wk::parallel(4, log.inner, count, &done);
        if (done != log.inner) log.order[task] = -1;
    }
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void probe(int32_t threads, int64_t tasks, int64_t *thread, int64_t *order, int32_t meeting, int32_t inner) {
    Log log{thread, order, ++runs, meeting, inner};
    wk::parallel(threads, tasks, task, &log);
}

EXPORT int64_t caller() { return myself(); }
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or forks")


class Probe:
    """A build of the threads alone, bound to PyTorch's runtime unless told otherwise."""

    def __init__(self, file: Path, bound: bool = True) -> None:
        self.calls = ctypes.CDLL(str(file))
        self.calls.caller.restype = ctypes.c_int64
        numbers = np.ctypeslib.ndpointer(np.int64, flags="C")
        self.calls.probe.argtypes = [
            ctypes.c_int32,
            ctypes.c_int64,
            numbers,
            numbers,
            ctypes.c_int32,
            ctypes.c_int32,
        ]
        self.calls.probe.restype = None
        self.bound = bool(self.calls.wk_bind_openmp(os.fsencode(openmp_runtime() or ""))) if bound else False

    def run(self, threads: int, tasks: int, meeting: int = 0, inner: int = 0) -> np.ndarray:
        """Return each task's thread and number, (tasks, 2); no task ends before `meeting` threads have begun one."""
        thread, order = (np.full(tasks, -7, np.int64) for _ in range(2))
        self.calls.probe(threads, tasks, thread, order, meeting, inner)
        return np.stack([thread, order], axis=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("probe") / "probe.so", PROBE, NATIVE / "src" / "threads.cpp")


@pytest.fixture
def probe(built: Path) -> Probe:
    if openmp_runtime() is None:
        pytest.skip("PyTorch has no OpenMP runtime to share")
    return Probe(built)


@pytest.fixture
def fresh(built: Path, tmp_path: Path) -> Callable[..., Probe]:
    """Return a function that loads copies of the library, each with separate state."""
    return lambda **options: Probe(Path(shutil.copy(built, tmp_path)), **options)


def threads_of(log: np.ndarray) -> int:
    return len(set(log[:, 0]))


def check(log: np.ndarray, threads: int) -> None:
    """Check that every task ran once, and that there were not too many threads."""
    tasks = len(log)
    assert sorted(log[:, 1]) == list(range(tasks))
    assert threads_of(log) <= max(1, min(threads, tasks))


@pytest.mark.parametrize("tasks", [0, 1, 2, 3, 7, 100, 5000])
@pytest.mark.parametrize("threads", [-1, 0, 1, 2, 3, 8, 40])
def test_every_task_runs_once(probe: Probe, threads: int, tasks: int) -> None:
    check(probe.run(threads, tasks), threads)


def test_one_thread_is_the_caller(probe: Probe) -> None:
    log = probe.run(1, 5)
    assert set(log[:, 0]) == {probe.calls.caller()}
    assert set(probe.run(8, 1)[:, 0]) == {probe.calls.caller()}


def test_without_a_runtime_one_thread_works(fresh: Callable[..., Probe]) -> None:
    alone = fresh(bound=False)
    log = alone.run(4, 50)
    check(log, 1)
    assert set(log[:, 0]) == {alone.calls.caller()}


def test_files_whose_runtime_cannot_be_used(fresh: Callable[..., Probe], tmp_path: Path) -> None:
    """A file that is not loaded already is not loaded for this purpose; a file without OpenMP is of no use."""
    alone = fresh(bound=False)
    assert alone.calls.wk_bind_openmp(None) == 0
    unloaded = compiled(tmp_path / "libgomp.so", 'extern "C" void GOMP_parallel() {}\n')
    assert alone.calls.wk_bind_openmp(os.fsencode(unloaded)) == 0
    assert alone.calls.wk_bind_openmp(os.fsencode(alone.calls._name)) == 0
    assert threads_of(alone.run(4, 50)) == 1


def test_tasks_are_shared(probe: Probe) -> None:
    log = probe.run(3, 30, meeting=3)
    check(log, 3)
    assert threads_of(log) == 3


@pytest.mark.parametrize("threads", [2, 4])
def test_no_task_waits_for_a_busy_thread(probe: Probe, threads: int) -> None:
    """There are as many tasks as threads, and none ends before all have begun, so each thread runs one."""
    log = probe.run(threads, threads, meeting=threads)
    check(log, threads)
    assert threads_of(log) == threads


def test_nested_parallel_regions(probe: Probe) -> None:
    check(probe.run(3, 40, inner=25), 3)


def test_from_several_threads_at_once(probe: Probe) -> None:
    logs: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: logs.extend(probe.run(2, 60) for _ in range(20))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(logs) == 120
    for log in logs:
        check(log, 2)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def use_pytorch_threads() -> None:
    torch.ones(1 << 20).add_(1)


def thread_ids() -> set[str]:
    return {entry.name for entry in Path("/proc/self/task").iterdir()}


@linux
def test_the_pool_is_that_of_pytorch(probe: Probe, two_threads: None) -> None:
    """No threads are started besides those of PyTorch, and none of those are lost."""
    use_pytorch_threads()
    before = thread_ids()
    for tasks in (2, 3, 50):
        assert threads_of(probe.run(2, tasks, meeting=2)) == 2
        use_pytorch_threads()
    assert thread_ids() == before


@linux
def test_fewer_tasks_than_threads_keep_the_pool(probe: Probe) -> None:
    probe.run(6, 100, meeting=6)
    before = thread_ids()
    probe.run(6, 2, meeting=2)
    assert thread_ids() == before


def in_child(method: str, target: Callable, *arguments: object) -> None:
    """Run a function in another process, which must neither hang nor fail."""
    child = multiprocessing.get_context(method).Process(target=target, args=arguments)
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0


def work(probe: Probe, threads: int, times: int = 20) -> None:
    for _ in range(times):
        log = probe.run(threads, 12, meeting=threads)
        check(log, threads)
        assert threads_of(log) == threads


def load_and_work(file: Path, threads: int) -> None:
    fork = Probe(file)
    assert fork.bound
    work(fork, threads)


def fork_again(probe: Probe) -> None:
    work(probe, 2, times=2)
    in_child("fork", work, probe, 2)


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_child(probe: Probe) -> None:
    """GNU's pool exists only in the parent; using it in the child would wait forever."""
    work(probe, 3, times=2)
    in_child("fork", work, probe, 3)
    in_child("fork", fork_again, probe)
    work(probe, 3, times=2)


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loaded_in_a_forked_child(built: Path, tmp_path: Path, two_threads: None) -> None:
    """The library could not notice the fork, because it was loaded later; PyTorch had used the pool before the fork."""
    use_pytorch_threads()
    in_child("fork", load_and_work, Path(shutil.copy(built, tmp_path / "copy.so")), 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_in_a_new_process(built: Path, method: str) -> None:
    in_child(method, load_and_work, built, 2)


def peak(threads: int) -> None:
    loaded = library.load()
    assert loaded.reason is None
    assert loaded.calls.wk_fma_peak(threads, 0.01) > 0


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_installed_library_after_a_fork(two_threads: None) -> None:
    if library.load().reason is not None:
        pytest.skip(library.load().reason)
    use_pytorch_threads()
    peak(2)
    in_child("fork", peak, 2)
