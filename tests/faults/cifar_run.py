"""A sparse run on CIFAR-10 in two processes, killed five times at random: does it end like an undisturbed one, bit for bit?

    python -m tests.faults.cifar_run DATA [--folder OUT] [--kills 5] [--seed 0] [--steps 400]

DATA contains cifar10_train.tar and cifar10_test.tar. Each kill is a SIGKILL of the launcher or of one process, at a random
time after the first step since the last start; the rest must end by itself, and then the same command starts again.
Prints the result, and writes it to OUT/result.md.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.engine.tiny import without_timings

from widekernel.engine.metrics_log import read_metrics

OPTIONS = """
--model.name slak_nano --model.args.layer_scale 1.0 --model.args.drop_path_rate 0.1
--data.train_split cifar10_train --data.val_split cifar10_test --data.input_size 32 --data.crop_pct 1.0
--augment.auto_augment null --augment.color_jitter 0.0 --augment.erase_prob 0.0 --augment.crop_scale [0.6,1.0]
--augment.mixup 0.2 --augment.cutmix 0.0 --optimizer.lr 0.003 --ema.decay 0.98 --ema.warmup true
--sparsity.method dynamic --sparsity.dynamic.growth gradient --sparsity.dynamic.prune_schedule cosine
--sparsity.dynamic.update_interval 20 --checkpoint.every_steps 20
--loop.batch_size 32 --loop.device cpu --loop.log_every 1
"""
SAVE_EVERY = 20
ENDS_WITHIN_S = 90.0
"""Seconds in which the rest of a run must end after one process was killed; a process counts as lost after 60 s."""
MARK = "CIFAR_RUN_MARK"
COMPARED = ("model", "ema", "optimizer", "scaler", "sparsity", "skipped", "meters", "progress")
FILES = ("model.safetensors", "model_ema.safetensors", "masks.safetensors")


@dataclass
class Kill:
    """One kill.

    Args:
        victim: launcher, process 0 or process 1
        after_s: seconds since the first step
        reached: last step in the metrics
        ended_s: seconds until the last process of the run had ended
        resumed: step after which the next start resumed the run
    """

    victim: str
    after_s: float
    reached: int
    ended_s: float
    resumed: int = 0


class Run:
    """A run folder, and the command that begins and continues it."""

    def __init__(self, folder: Path, data: str, options: list[str]) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        program = [sys.executable, "-m", "widekernel"]
        self.arguments = ["train", "--output", str(folder), "--data.root", data, *options]
        self.command = program + self.arguments
        self.mark = f"{folder.name}-{os.getpid()}"
        self.started = 0.0
        self.launcher: subprocess.Popen

    def start(self) -> None:
        """Start the command, which begins or continues the run."""
        with self.log.open("a") as log:
            log.write(f"$ widekernel {shlex.join(self.arguments)}\n" if not log.tell() else "$ (the same command)\n")
            log.flush()
            self.started = time.time()
            environment = {**os.environ, MARK: self.mark}
            self.launcher = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def processes(self) -> dict[str, int]:
        """Return the numbers of all processes of the run that are alive, by role."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it has ended, or belongs to another user
                continue
            if f"{MARK}={self.mark}" not in environment or status[0] == "Z":
                continue
            ranks = [item.removeprefix("RANK=") for item in environment if item.startswith("RANK=")]
            own = ranks and int(status[1]) == self.launcher.pid
            found[f"process {ranks[0]}" if own else f"pid {entry.name}"] = int(entry.name)
        found = {role: pid for role, pid in found.items() if pid != self.launcher.pid}
        return found if self.launcher.poll() is not None else {"launcher": self.launcher.pid, **found}

    def step(self) -> int:
        """Return the last step in the metrics."""
        path = self.folder / "metrics.jsonl"
        steps = re.findall(r'"step": (\d+)', path.read_text()) if path.exists() else []
        return int(steps[-1]) if steps else 0

    def resumed(self) -> int:
        """Return the step after which the latest start resumed the run."""
        found = re.search(r"Resuming .* after step (\d+) of", self.log.read_text().rsplit("\n$ ", 1)[-1])
        return int(found[1]) if found else 0

    def wait_for_first_step(self) -> bool:
        """Wait until the latest start has made a step; return whether it has not ended before."""
        path = self.folder / "metrics.jsonl"
        while self.launcher.poll() is None:
            # A start first removes the rows after the state that it resumes from.
            if path.exists() and path.stat().st_mtime > self.started and self.step() > self.resumed():
                return True
            time.sleep(0.02)
        return False

    def wait(self) -> float:
        """Wait until all processes have ended; return the seconds. End them and raise an error if they do not."""
        began = time.monotonic()
        while left := self.processes():
            if time.monotonic() - began > ENDS_WITHIN_S:
                for pid in left.values():
                    os.kill(pid, signal.SIGKILL)
                raise SystemExit(f"FAILED: {left} had not ended {ENDS_WITHIN_S:.0f} s after a kill.")
            time.sleep(0.05)
        return time.monotonic() - began


def undisturbed(run: Run) -> float:
    """Run the command once, and return the seconds from its first step to its end."""
    run.start()
    run.wait_for_first_step()
    began = time.monotonic()
    if run.launcher.wait():
        raise SystemExit(f"FAILED: the undisturbed run ended with an error; see {run.log}.")
    return time.monotonic() - began


def disturbed(run: Run, victims: list[str], longest_s: float, rng: random.Random) -> list[Kill]:
    """Run the command until it succeeds, and kill each victim in turn, at most `longest_s` after the first step."""
    kills: list[Kill] = []
    for victim in victims:
        run.start()
        if not run.wait_for_first_step():
            raise SystemExit(f"FAILED: the run ended before kill {len(kills) + 1}; see {run.log}.")
        after_s = rng.uniform(0, longest_s)
        time.sleep(after_s)
        pids = run.processes()
        if victim not in pids:
            raise SystemExit(f"FAILED: no {victim} among {pids} at kill {len(kills) + 1}; see {run.log}.")
        _note_start(run, kills)
        os.kill(pids[victim], signal.SIGKILL)
        ended_s = run.wait()
        kills.append(Kill(victim, after_s, run.step(), ended_s))
        with run.log.open("a") as log:
            log.write(f"(kill -9 of {victim}; all had ended {ended_s:.1f} s later)\n")
        print(f"killed {victim} at step {kills[-1].reached}; all had ended {ended_s:.1f} s later", flush=True)
    run.start()
    if run.launcher.wait():
        raise SystemExit(f"FAILED: the last start ended with an error; see {run.log}.")
    _note_start(run, kills)
    return kills


def _note_start(run: Run, kills: list[Kill]) -> None:
    """Note where the latest start resumed the run, after the kill before it."""
    if kills:
        kills[-1].resumed = run.resumed()


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """Return the tensors and plain values of nested containers, by place."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {place: value}
    return {name: leaf for key, item in items for name, leaf in leaves(item, f"{place}/{key}").items()}


def same_bits(one: Any, other: Any) -> bool:
    """Return whether two leaves are equal, tensors bit for bit."""
    if not isinstance(one, torch.Tensor):
        return type(one) is type(other) and one == other
    if not isinstance(other, torch.Tensor) or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()


def compare(one: Path, other: Path, steps: int) -> tuple[list[str], list[str]]:
    """Compare the ends of two runs; return what is equal, and what differs."""
    name = f"checkpoints/step-{steps:08d}.pt"
    states = [torch.load(folder / name, weights_only=True) for folder in (one, other)]
    equal, different = [], []
    for part in COMPARED:
        first, second = (leaves(state[part], part) for state in states)
        wrong = [] if first.keys() == second.keys() else ["the set of values"]
        wrong += [key for key in first if key in second and not same_bits(first[key], second[key])]
        tensors = [leaf for leaf in first.values() if isinstance(leaf, torch.Tensor)]
        numbers = sum(tensor.numel() for tensor in tensors)
        different += [f"{key} ({part})" for key in wrong]
        equal += [] if wrong else [f"{part} ({len(tensors)} tensors with {numbers:,} values)" if tensors else part]
    rows = [without_timings(read_metrics(folder / "metrics.jsonl")) for folder in (one, other)]
    same = {name: (one / name).read_bytes() == (other / name).read_bytes() for name in FILES}
    same[f"the {len(rows[0])} rows of metrics.jsonl, but for the timings"] = rows[0] == rows[1]
    return equal + [what for what in same if same[what]], different + [what for what in same if not same[what]]


def report(kills: list[Kill], equal: list[str], different: list[str], seed: int) -> str:
    """Return the result as Markdown."""
    lines = [
        "| killed | last step in the metrics | resumed after step | steps lost | the rest had ended after |",
        "|---|---|---|---|---|",
    ]
    for kill in kills:
        lost = kill.reached - kill.resumed
        lines.append(f"| {kill.victim} | {kill.reached} | {kill.resumed} | {lost} | {kill.ended_s:.1f} s |")
    verdict = f"{len(different)} differences" + (f", the first of them {', '.join(different[:3])}" if different else "")
    return "\n".join(
        [*lines, "", f"Seed {seed}, {len(kills)} kills: {verdict}.", f"Equal, bit for bit: {', '.join(equal)}.", ""]
    )


def main() -> int:
    """Run both, compare them, and return 1 if they differ or a kill cost more than two intervals between states."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with cifar10_train.tar and cifar10_test.tar")
    parser.add_argument("--folder", type=Path, help="where the two runs are stored, with their logs (default: a new one)")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    options = [*OPTIONS.split(), "--data.workers", str(arguments.workers), "--schedule.steps", str(arguments.steps)]
    options += ["--schedule.warmup_steps", str(arguments.steps // 10)]
    options += ["--evaluation.every_steps", str(max(1, arguments.steps // 4)), "--processes", "2"]
    rng = random.Random(arguments.seed)
    roles = ["launcher", "process 0", "process 1"]
    victims = [role for _ in range(arguments.kills // 3 + 1) for role in rng.sample(roles, 3)][: arguments.kills]
    runs = [Run(folder / name, arguments.data, options) for name in ("undisturbed", "disturbed")]
    print(f"seed {arguments.seed}, {folder}", flush=True)
    duration_s = undisturbed(runs[0])
    print(f"undisturbed: {duration_s:.0f} s from the first step to the end", flush=True)
    kills = disturbed(runs[1], victims, duration_s / max(2, arguments.kills - 1), rng)
    text = report(kills, *(found := compare(runs[0].folder, runs[1].folder, arguments.steps)), arguments.seed)
    (folder / "result.md").write_text(text)
    print(text)
    return int(bool(found[1]) or any(kill.reached - kill.resumed > 2 * SAVE_EVERY for kill in kills))


if __name__ == "__main__":
    sys.exit(main())
