"""Runs that are interrupted by signals at random times and resumed, each in a process forked from this one.

Usage: python -m tests.faults.signal_program FOLDER RUNS SEED
Prints one line of JSON. It is a program of its own, which has computed nothing when it forks: OpenMP's threads do not
survive a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tests.engine.tiny import make_config, make_trainer, states_equal, without_timings

from widekernel.engine import CheckpointConfig, SilentReporter
from widekernel.engine.interrupts import Interrupted
from widekernel.engine.metrics_log import read_metrics
from widekernel.launch.restarts import newest_step

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class Listener(SilentReporter):
    """Reporter that keeps messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def forked(work: Callable[[], int]) -> int:
    """Run `work` in a forked process, which exits with its result; return the process."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        code = work()
    finally:
        os._exit(code)


def slow_saves() -> None:
    """Let a save take long enough that signals arrive within it."""
    sync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.01), sync(descriptor))[1]


def train(folder: Path) -> int:
    slow_saves()
    reporter = Listener()
    try:
        make_trainer(make_config(folder, checkpoint=CheckpointConfig(every_steps=2)), reporter=reporter).run()
        return 0
    except Interrupted as stop:
        return 128 + stop.signal_number
    except KeyboardInterrupt:  # a second SIGINT
        return 128 + signal.SIGINT
    finally:
        (folder / "damaged").write_text(skipped(reporter))


def skipped(reporter: Listener) -> str:
    """Return the messages about states that could not be used."""
    return "\n".join(text for text in reporter.messages if text.startswith("Skipped"))


def interrupt(process: int, folder: Path, draw: random.Random, length_s: float) -> list[int]:
    """Signal a run up to three times after it has begun; return the signals that were sent."""
    before = newest_step(folder)
    while (
        newest_step(folder) <= max(before, 0) and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, length_s))
    sent = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        number = draw.choice(SIGNALS)
        os.kill(process, number)  # the process has not been waited for, so it exists at least as a zombie
        sent.append(int(number))
        time.sleep(draw.uniform(0, 0.01))
    return sent


def campaign(folder: Path, runs: int, seed: int) -> dict[str, object]:
    """Interrupt `runs` starts of training runs; return what was found."""
    draw, found = random.Random(seed), Counter()
    start = time.monotonic()
    assert os.waitpid(forked(lambda: train(made(folder / "reference"))), 0)[1] == 0
    length_s = (time.monotonic() - start) * 0.6
    number = 0
    wrong: list[str] = []
    while found["interrupted"] < runs and number < 4 * runs:
        run = made(folder / f"run-{number}")
        number += 1
        for _ in range(20):  # each start of the same run is interrupted, until one ends before its signal
            process = forked(lambda run=run: train(run))
            sent = interrupt(process, run, draw, length_s)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if code == 0:
                break
            found["interrupted"] += 1
            # A signal that arrives before the run catches them, or after it has saved, ends the process.
            if code not in {0, *(128 + each for each in sent), *(-each for each in sent)}:
                wrong.append(f"run {number}: exit code {code} after {sent}")
            found["killed outright"] += code < 0
            if (run / "damaged").exists() and (run / "damaged").read_text():
                found["damaged"] += 1
            process = forked(lambda run=run: readable(run))
            found["damaged"] += os.waitpid(process, 0)[1] != 0
        else:
            process = forked(lambda run=run: train(run))
            os.waitpid(process, 0)
        process = forked(lambda run=run: equal(run, folder / "reference"))
        found["differing"] += os.waitpid(process, 0)[1] != 0
        found["runs"] += 1
    return {name: found[name] for name in ("interrupted", "killed outright", "damaged", "differing", "runs")} | {
        "wrong": wrong
    }


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def readable(run: Path) -> int:
    """Return 0 if the newest state is undamaged."""
    reporter = Listener()
    trainer = make_trainer(make_config(run, checkpoint=CheckpointConfig(every_steps=2)), reporter=reporter)
    state = trainer.store.load_latest()
    return int(skipped(reporter) != "" or state is None or state["progress"]["step"] != newest_step(run))


def equal(run: Path, reference: Path) -> int:
    """Return 0 if two finished runs have equal states and metrics."""
    trainers = [make_trainer(make_config(folder, checkpoint=CheckpointConfig(every_steps=2))) for folder in (run, reference)]
    for trainer in trainers:
        trainer.run()  # finished: loads the last state
    states = [trainer.state() for trainer in trainers]
    rows = [without_timings(read_metrics(folder / "metrics.jsonl")) for folder in (run, reference)]
    return int(not (states_equal(*states) and rows[0] == rows[1]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["SLURM_JOB_ID"] = "1"  # so that SIGUSR2 counts
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    print(json.dumps(campaign(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
