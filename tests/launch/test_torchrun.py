"""The processes of the real torchrun join, and end with a named loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.dist]

PROGRAM = """
import os, sys, torch
from widekernel.engine.joining import joined_processes
with joined_processes("cpu", 10) as processes:
    processes.note(1, "training step 2")
    total = processes.sum(torch.ones(1)).item()
    print(f"{total:.0f} processes", flush=True)
    if processes.rank == 1 and sys.argv[1] == "die":
        os.kill(os.getpid(), 9)
    processes.barrier("the end")
"""


def torchrun(folder: Path, mode: str) -> subprocess.CompletedProcess:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program), mode]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_processes_join_and_leave(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "live")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 processes"] * 2


def test_a_loss_ends_the_run(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "die")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr  # torchrun names the process that was killed
