"""A long run holds no more at its end than after its beginning: memory, file descriptors, threads, shared memory, files.

    python -m pytest -m "slow or not slow" -s -n 0 tests/faults/test_leaks.py

prints how much the memory of a run of 2,000 steps grows, with two loading processes, 80 saves and 20 evaluations.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tests.faults.leaks import run

STEPS = 2000
MOST_KB = 1024  # per 100 steps
COUNTED = ((2, "file descriptors"), (3, "threads"), (4, "segments of shared memory"))

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process holds is read from /proc")


def slope(found: list[list[int]]) -> float:
    """Return the kilobytes of memory that 100 steps add, by a straight line through the second half."""
    half = found[len(found) // 2 :]
    return 100 * statistics.linear_regression([row[0] for row in half], [row[1] for row in half]).slope


def check_counts(found: list[list[int]]) -> None:
    """Assert that the counts do not grow: the last fifth of the run holds at most what the second one does."""
    fifth = len(found) // 5
    for column, what in COUNTED:
        early, late = (max(row[column] for row in part) for part in (found[fifth : 2 * fifth], found[-fifth:]))
        assert late <= early, f"{what}: {early} early, {late} late"


@linux
def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found = run(tmp_path / "run", 100, workers=0)
    check_counts(found)
    assert slope(found) < 10 * MOST_KB
    assert not list((tmp_path / "temporary").iterdir())
    assert not [path for path in (tmp_path / "run").rglob("*") if "tmp" in path.name]


@linux
@pytest.mark.slow
def test_a_long_run(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.faults.leaks", str(tmp_path / "run"), str(STEPS)]
    temporary, shared = tmp_path / "temporary", Path("/dev/shm")
    temporary.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(program, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0
    found = json.loads(output)
    check_counts(found)
    growth = slope(found)
    counts = [f"{what} {found[20][column]} -> {found[-1][column]}" for column, what in COUNTED]
    print(f"\n{STEPS} steps: {growth:+.0f} kB of memory per 100 steps, {', '.join(counts)}")
    assert growth < MOST_KB
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]  # PyTorch's own cache
    assert not list(shared.glob(f"torch_{process.pid}_*"))
    assert not [path for path in (tmp_path / "run").rglob("*") if "tmp" in path.name]
