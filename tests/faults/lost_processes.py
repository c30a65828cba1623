"""Campaign: processes that are killed or stopped at random times; does the run end, and is the right one named?

    python -m tests.faults.lost_processes kill 50
    python -m tests.faults.lost_processes stop 20

Each case starts 2 or 4 processes, which exchange gradients, sums and votes; prints one figure at the end.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tests.engine.forked import free_ports, start
from torch import nn

import widekernel.engine.distributed  # noqa: F401 - once, before the processes are forked
from widekernel.engine.joining import joined_processes

TIMEOUT_S = {"kill": 10.0, "stop": 3.0}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def train(timeout_s: float) -> None:
    """Train until something happens, with the exchanges of a real step."""
    torch.manual_seed(0)
    with joined_processes("cpu", timeout_s) as processes:
        wrapped = processes.wrap(nn.Linear(300, 300))
        vote = None
        for step in range(10**6):
            processes.note(step, f"training step {step + 1}")
            wrapped(torch.randn(8, 300)).square().mean().backward()
            following = processes.vote(False)
            if vote is not None:
                vote()
            vote = following
            if step == 2:
                Path(f"ready.{processes.rank}").touch()
            if step % 50 == 49:
                processes.sum(torch.ones(2))


def case(kind: str, number: int, port: int, rng: random.Random) -> tuple[list[str], float]:
    """Run one case; return what went wrong, and the seconds until the last of the others had ended."""
    size, timeout_s = (2, 4)[number % 2], TIMEOUT_S[kind]
    for old in Path().glob("ready.*"):
        old.unlink()
    group = start(f"case{number}", lambda: train(timeout_s), size, Path(), port)
    while len(list(Path().glob("ready.*"))) < size:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
    victim = rng.randrange(size)
    struck = time.time()
    os.kill(group.pids[victim], SIGNALS[kind])
    others = [rank for rank in range(size) if rank != victim]
    while not all(rank in group.codes for rank in others) and time.time() < struck + timeout_s + 30:
        group.reap()
        time.sleep(0.01)
    wrong = [f"rank {rank} hangs" for rank in others if rank not in group.codes]
    took = max((group.ended[rank] - struck for rank in others if rank in group.ended), default=0.0)
    group.wait(0)
    wrong += [f"rank {rank} exited with {group.codes[rank]}" for rank in others if group.codes[rank] <= 0]
    if took > timeout_s + 5:
        wrong.append(f"ended after {took:.1f} s")
    for rank in others:
        text = Path(f"case{number}.{rank}").read_text()
        if f"Process {victim} (rank {victim}," not in text or f"pid {group.pids[victim]})" not in text:
            wrong.append(f"rank {rank} does not name rank {victim}: {text[-400:]}")
    return wrong, took


def campaign(kind: str, cases: int, seed: int = 0) -> str:
    """Run `cases` cases in the current folder, and return the figure, which begins with the number of failures."""
    rng, ports, times, failures = random.Random(seed), free_ports(), [], 0
    for number in range(cases):
        wrong, took = case(kind, number, next(ports), rng)
        times.append(took)
        failures += bool(wrong)
        for text in wrong:
            print(f"case {number}: {text}", flush=True)
    limit = TIMEOUT_S[kind] + 5
    return (
        f"{failures} of {cases} failures ({kind} a random one of 2 or 4 processes): all others must end within "
        f"{limit:.0f} s with an error that names it; median {sorted(times)[cases // 2]:.2f} s, longest {max(times):.2f} s"
    )


def main() -> int:
    """Run the campaign that the arguments name; return 1 if a case failed."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    folder = tempfile.mkdtemp()  # no context manager: the forked processes would delete the folder
    os.chdir(folder)
    figure = campaign(sys.argv[1], int(sys.argv[2]))
    shutil.rmtree(folder)
    print(figure)
    return int(not figure.startswith("0 "))


if __name__ == "__main__":
    sys.exit(main())
