"""Runs whose processes die are resumed by new ones, and end like undisturbed runs, bit for bit.

    python -m pytest -m "slow or not slow" -s -n 0 tests/faults/test_exact_resume.py

prints how many of 200 cuts and of 250 kills at random times changed a run, and the time to resume a large one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.faults.resume_runs import STEPS, VARIANTS

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")


def figures(*command: str) -> dict[str, Any]:
    """Return the figures that a program prints in its last line."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{' '.join(command)}: {found}")
    return found


def test_kill_inside_a_save_of_two_processes() -> None:
    found = figures("tests.faults.resume_program", "short")
    assert (found["equal"], found["wrong"]) == (found["runs"], []) and found["in saves"] > 0


@pytest.mark.slow
def test_cuts_after_each_step() -> None:
    found = figures("tests.faults.resume_program", "cuts", str(STEPS))
    assert (found["equal"], found["wrong"]) == (found["cuts"], []) and found["cuts"] == STEPS * len(VARIANTS) == 200
    for variant in VARIANTS:  # that there was something to restore
        changes = found["changes"][variant.name]
        assert changes["model"] > STEPS // 2 and changes["optimizer"] == STEPS
        assert changes["ema"] > STEPS // 2 or variant.sparsity == "learned"
        assert changes["scaler"] > 2 or variant.precision != "fp16"
        assert changes["meters"] > STEPS // 3 or variant.log_every == 1
        assert (changes["mask_updates"] > 2 and changes["moved"]) == (variant.sparsity not in ("dense", "learned"))


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "world_size"), [(150, 1), (100, 2)])
def test_kills_at_random_times(kills: int, world_size: int) -> None:
    found = figures("tests.faults.resume_program", "kills", str(kills), str(world_size))
    assert (found["equal"], found["wrong"]) == (found["runs"], [])
    assert found["kills"] >= kills and found["in saves"] >= kills // 5
    assert world_size == 1 or min(found["rank 0 of 2"], found["rank 1 of 2"]) >= 30


@pytest.mark.slow
def test_a_large_run_resumes_soon() -> None:
    found = figures("tests.faults.resume_time")
    assert found["state in GB"] > 1.59
    assert found["seconds from the call of run"] <= 15
