"""The cost of saving training states for training itself: runs with and without saves alternate in one process.

    OMP_WAIT_POLICY=passive python benchmarks/checkpoint_stall.py > benchmarks/results/checkpoint_stall_cpu.md

A network of 100 million parameters is trained with AdamW and an average of its weights, a state of 1.6 GB. Pairs of blocks
of steps alternate: in one of each pair, the state is saved in the background. Refuses to run if memory or disk is short,
and reports nothing if the saved state is not the one at the moment of the save.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from widekernel.engine.checkpoint import CheckpointStore

NEEDED = 9e9  # bytes of memory: model, gradients, moments, average, copy, a loaded state, and the file in the page cache
INTERVAL = 500  # steps between saves in a usual run
WIDTH, DEPTH = 2880, 12  # 12 matrices of 2880² are 100 million parameters


class Run:
    """A small training loop with a state of 4 numbers per parameter."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
        self.model = nn.Sequential(*layers)
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.images = torch.randn(64, WIDTH)

    def step(self) -> None:
        self.model(self.images).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.model.parameters()], 1e-3)

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.average}

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for mine, saved in zip(self.average, state["ema"], strict=True):
            mine.copy_(saved)


def available() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def block(run: Run, steps: int, store: CheckpointStore | None = None, number: int = 0) -> tuple[float, float, float]:
    """Return the seconds of a block of steps, those of the call to save, and those until the state was on disk."""
    start = time.perf_counter()
    stall = done = 0.0
    if store is not None:
        store.save(run.state(), number, None)
        stall = time.perf_counter() - start
    for _ in range(steps):
        run.step()
        if store is not None and not done and not store._background._thread.is_alive():
            done = time.perf_counter() - start
    seconds = time.perf_counter() - start
    if store is not None:
        assert done, "The block ended before the state was on disk: use more --steps"
        assert store.wait()
    return seconds, stall, done


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="in a block; the write ends within it")
    parser.add_argument("--folder", type=Path, help="where states are written; a temporary folder by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        if available() < NEEDED or shutil.disk_usage(folder).free < NEEDED:
            sys.exit(
                f"{NEEDED / 1e9:.0f} GB of memory and of disk are needed; {available() / 1e9:.1f} GB of memory are free."
            )
        report(Run(), CheckpointStore(folder / "checkpoints"), options.pairs, options.steps)
    finally:
        shutil.rmtree(folder)


def report(run: Run, store: CheckpointStore, pairs: int, steps: int) -> None:
    run.step()
    block(run, 2)
    block(run, steps, store, 1)  # takes the memory of the copy
    plain, saving, stalls, durations = [], [], [], []
    for pair in range(pairs):
        for with_save in (False, True) if pair % 2 else (True, False):
            seconds, stall, done = block(run, steps, store if with_save else None, pair + 2)
            if with_save:
                saving.append(seconds)
                stalls.append(stall)
                durations.append(done)
            else:
                plain.append(seconds)
    step_seconds = statistics.median(plain) / steps
    added = statistics.median(a - b for a, b in zip(saving, plain, strict=True))
    wanted = {key: value.clone() for key, value in run.model.state_dict().items()}
    block(run, steps, store, pairs + 2)
    size = max(path.stat().st_size for path in store.paths())
    load = time.perf_counter()
    fresh = CheckpointStore(store.folder)
    state = fresh.load_latest(resume=True)
    assert state is not None
    run.load(state)
    ready = time.perf_counter() - load  # the memory of the process holds the network already, as in a resumed run
    assert all(torch.equal(value, wanted[key]) for key, value in run.model.state_dict().items())
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"# Stall of training by saves, {parameters / 1e6:.0f} million parameters, state of {size / 1e9:.2f} GB\n")
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
        f"{pairs} pairs of blocks of {steps} steps, medians\n"
    )
    print("| quantity | value |\n|---|---|")
    print(f"| step without saves | {step_seconds:.3f} s |")
    print(f"| call of `save` (the copy) | {statistics.median(stalls):.2f} s, at most {max(stalls):.2f} s |")
    print(f"| until the state is on disk and verified, in the background | {statistics.median(durations):.1f} s |")
    print(f"| added to a block by a save, copy included | {added:.2f} s |")
    print(f"| share of {INTERVAL} steps: copy | {100 * statistics.median(stalls) / (INTERVAL * step_seconds):.2f} % |")
    print(f"| share of {INTERVAL} steps: all | {100 * added / (INTERVAL * step_seconds):.2f} % (target: at most 5 %) |")
    print(f"| load, verify and restore | {ready:.1f} s (target: at most 15 s) |")


if __name__ == "__main__":
    main()
