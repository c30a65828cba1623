"""Program of `test_leaks`: a long run of a tiny network, with what its process holds meanwhile.

Usage: python -m tests.faults.leaks FOLDER STEPS
Prints one line of JSON: for each hundredth of the run, the step, kilobytes of memory, and numbers of file descriptors,
threads and segments of shared memory.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from tests.engine.nonfinite_program import PLAIN
from tests.engine.tiny import array_source, make_config, make_trainer

from widekernel.engine import CheckpointConfig, EvaluationConfig, LoopConfig, ScheduleConfig, SilentReporter


def held() -> list[int]:
    """Return kilobytes of memory, and numbers of file descriptors, threads and segments of shared memory of this process."""
    status = Path("/proc/self/status").read_text()
    memory = int(status.split("VmRSS:")[1].split()[0])
    mapped = Path("/proc/self/maps").read_text().count("/dev/shm/")
    return [memory, len(os.listdir("/proc/self/fd")), threading.active_count(), mapped]  # noqa: PTH208


class Measuring(SilentReporter):
    """Reporter that measures after every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every, self.found = every, []

    def step(self, step: int, figures: Any) -> None:
        if step % self.every == 0:
            if self.every > 5:  # takes longer than a step
                gc.collect()
            self.found.append([step, *held()])


def run(folder: Path, steps: int, workers: int) -> list[list[int]]:
    """Train for `steps` steps, with a save in every 25 and an evaluation in every 100; return what was held meanwhile."""
    reporter = Measuring(max(5, steps // 100))
    config = make_config(
        folder,
        augment=PLAIN,
        loop=LoopConfig(batch_size=2, device="cpu"),
        schedule=ScheduleConfig(steps=steps, warmup_steps=2),
        evaluation=EvaluationConfig(every_steps=100),
        checkpoint=CheckpointConfig(every_steps=25, every_epochs=10**6),
    )
    make_trainer(config, workers, array_source(400), reporter).run()
    return reporter.found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), workers=2)))
