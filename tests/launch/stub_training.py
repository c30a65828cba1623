"""Stand-in for a training command, which starts at once: saves one state per step, and resumes from the newest.

Usage: stub_training.py RUN_FOLDER STEPS [crash=STEP] [fail=CODE] [idle]
Only process 0 writes. It appends one line per start to `starts`: the step from which it goes on, and torchrun's variables.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

received: list[int] = []


def main(folder: Path, steps: int, *options: str) -> int:
    given = dict(option.partition("=")[::2] for option in options)
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"):
        signal.signal(getattr(signal, name), lambda number, _: received.append(number))
    states = folder / "checkpoints"
    states.mkdir(parents=True, exist_ok=True)
    step = max((int(path.name[5:13]) for path in states.glob("step-*.pt")), default=0)
    rank = int(os.environ.get("RANK", "0"))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WIDEKERNEL_SLURM_TASK")
    with (folder / f"starts-{rank}").open("a") as file:
        file.write(
            json.dumps({"step": step, "cwd": str(Path.cwd()), **{name: os.environ.get(name) for name in names}}) + "\n"
        )
    while step < steps:
        time.sleep(0.02)
        step += 1
        if str(step) == given.get("crash") or (rank == 1 and str(step) == given.get("crash1")):
            os.kill(os.getpid(), signal.SIGKILL)
        if "fail" in given:
            return int(given["fail"])
        if received:
            if rank == 0:
                time.sleep(0.3)  # the others are long done when the state is complete
                (states / f"step-{step:08d}.pt").touch()
                (folder / "saved").write_text(str(step))
            return 128 + received[0]
        if rank == 0 and "idle" not in given:
            (states / f"step-{step:08d}.pt").touch()
    (folder / f"finished-{rank}").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
