"""Whole runs of the command line, of which one process is killed, stopped or signaled: `fire_program` strikes them.

python -m pytest -m "slow or not slow" -s -n 0 tests/faults/test_fire.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONG = (("kill", 50), ("stop", 20), ("signal", 100))
CASES = [("kill", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)]


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found in /proc")
@pytest.mark.parametrize(("kind", "count"), CASES)
def test_a_run_under_fire_ends_and_goes_on(kind: str, count: int) -> None:
    program = [sys.executable, "-m", "tests.faults.fire_program", kind, str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{kind}: {found}")
    assert found["wrong"] == [] and found["strikes"] == count and done.returncode == 0
