"""Signals at random times: in steps, in saves, in evaluations, several in a row.

    python -m pytest -m "slow or not slow" -s -n 0 tests/faults/test_signals.py

prints how many of 100 interrupted starts left a damaged state or ended differently.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
@pytest.mark.parametrize("count", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_no_signal_damages_a_run(count: int, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.faults.signal_program", str(tmp_path), str(count), "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\ninterrupted starts: {found}")
    assert found["interrupted"] >= count and found["interrupted"] > found["killed outright"]
    assert (found["damaged"], found["differing"], found["wrong"]) == (0, 0, [])
