"""The time that a run of 100 million parameters takes to resume: from the start of a new process to its first step.

    python -m tests.faults.resume_time

A run with AdamW and an average of its weights, a state of 1.6 GB, is killed after a save, and resumed by another process.
The state is first removed from the page cache, so it is read from the disk. The last line is a JSON object with the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from tests.engine.tiny import make_config, make_trainer
from torch import nn

from widekernel.data import AugmentConfig
from widekernel.engine import CheckpointConfig, EmaConfig, LoopConfig, ScheduleConfig, SilentReporter, Trainer

WIDTH, DEPTH, SAVED = 2880, 12, 2


class Reporter(SilentReporter):
    """Reporter that ends this process without any cleanup after the step after the one whose state is saved."""

    def __init__(self) -> None:
        self.first = -1
        self.began = self.began_cpu = 0.0
        self.trainer: Trainer | None = None

    def start_training(self, length: object, first_step: int) -> None:
        self.first = first_step

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        assert self.trainer is not None
        if step <= SAVED:
            return
        if self.first == 0:
            self.trainer.store.wait()
        cpu = time.process_time() - self.began_cpu
        print(json.dumps({"first": self.first, "began": self.began, "ended": now, "cpu": cpu}), flush=True)
        os._exit(0)


def train(folder: Path, width: int) -> None:
    """Train until the step after `SAVED`, and print when `run` was called and when that step had ended."""
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(width, width), nn.GELU())]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, width), nn.GELU(), *layers, nn.Linear(width, 3))
    config = make_config(
        folder,
        augment=AugmentConfig(auto_augment=None),
        schedule=ScheduleConfig(steps=10, warmup_steps=1),
        ema=EmaConfig(decay=0.9),
        loop=LoopConfig(batch_size=4, device="cpu"),
        checkpoint=CheckpointConfig(every_steps=SAVED),
    )
    reporter = Reporter()
    trainer = reporter.trainer = make_trainer(config, model=model, reporter=reporter)
    reporter.began, reporter.began_cpu = time.monotonic(), time.process_time()  # the first is common to all processes
    trainer.run()


def measure(width: int) -> dict[str, float]:
    """Train, die and resume, each in a process of its own; return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.faults.resume_time", "--width", str(width), "--train", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (state,) = (Path(folder) / "checkpoints").glob(f"step-*{SAVED}.pt")
        leave_page_cache(state)
        started = time.monotonic()
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        assert found["first"] == SAVED, found
        return {
            "state in GB": round(state.stat().st_size / 1e9, 3),
            "seconds from the call of run": round(found["ended"] - found["began"], 2),
            "of these, seconds of CPU time": round(found["cpu"], 2),
            "seconds from the start of the process": round(found["ended"] - started, 2),
        }


def leave_page_cache(path: Path) -> None:
    """Let the system forget what it holds of a file in memory, where it knows how to."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Print the figures, or be one of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
    if options.train:
        train(options.train, options.width)
    else:
        print(json.dumps(measure(options.width)))


if __name__ == "__main__":
    main()
