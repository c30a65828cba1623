"""Campaign: whole runs of `widekernel train --processes 2`, of which one process is killed, stopped or signaled.

    python -m tests.faults.fire_program kill 50
    python -m tests.faults.fire_program stop 20
    python -m tests.faults.fire_program signal 100

Each run is struck several times, at random places, and repeated after each; then it must end with the weights and
metrics of an undisturbed one. Prints one line of JSON. It is a program of its own, which has computed nothing when it
forks: OpenMP's threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
from tests.engine.tiny import without_timings
from tests.faults.fire import ONLY_MAIN, PLACES, Outcome, Strike, adopting_orphans, run_command
from tests.tasks.images import make_images

from widekernel.engine import distributed
from widekernel.engine.checkpoint import CheckpointStore
from widekernel.engine.metrics_log import read_metrics

TIMEOUT_S = {"kill": 10.0, "stop": 3.0, "signal": 10.0}
"""The setting loop.timeout. Everything must end 5 s later; after signals, which ask for a save, within that time."""

SIGNALS = (
    (signal.SIGTERM,), (signal.SIGUSR1,), (signal.SIGINT,), (signal.SIGHUP,), (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM),
)  # fmt: skip
STRIKES = 5
"""Strikes on one run."""

VARIANTS = (
    "--data.workers 0 --ema.decay 0.8",
    "--data.workers 0 --sparsity.method dynamic --sparsity.dynamic.sparsity 0.4 --sparsity.dynamic.update_interval 3",
    "--data.workers 1 --loop.micro_batch 1 --augment.mixup 0 --augment.cutmix 0 --model.args.drop_path_rate 0.1",
)
COMMON = (
    "--processes 2 --model.name slak_nano --model.args.depths [1,1,1,1] --model.args.dims [8,8,16,16] --data.input_size 32 "
    "--loop.batch_size 4 --schedule.epochs 2 --schedule.warmup_epochs 0 --loop.device cpu --loop.log_every 1 "
    "--checkpoint.every_steps 2"
)


class Campaign:
    """Strikes on runs, and what was wrong after them.

    Args:
        kind: kill, stop or signal
        folder: an empty folder
        seed: seed of the random choices
    """

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self.kind, self.folder, self.draw = kind, folder, random.Random(seed)
        self.images = make_images(folder / "images")
        self.limit_s = TIMEOUT_S[kind] + (0 if kind == "signal" else 5)
        self.wrong: list[str] = []
        self.strikes, self.runs, self.commands = 0, 0, 0
        self.longest_s = 0.0

    def execute(self, count: int) -> dict[str, object]:
        """Strike `count` times, and return the figures."""
        while self.strikes < count:
            variant = self.runs % len(VARIANTS)
            run, reference = self.folder / f"run-{self.runs}", self.folder / f"reference-{variant}"
            if not reference.exists():
                self._command(variant, reference, None)
            for _ in range(min(STRIKES, count - self.strikes)):
                self._strike(variant, run)
            done = self._command(variant, run, None)
            self._expect(done.code == 0 and _result(run) == _result(reference), f"{run.name} ended differently: {done}")
            self.runs += 1
        return self.figures()

    def execute_one(self) -> dict[str, object]:
        """Kill a process of a run, which is then repeated, and return the figures."""
        run = self.folder / "run"
        self._judge(Strike(1, (int(signal.SIGKILL),), "saving", 0.05), 0, run, joined=True)
        done = self._command(0, run, None)
        resumed = "after step " in done.text and "Resuming" in done.text
        self._expect(
            done.code == 0 and resumed and (run / "model_ema.safetensors").exists(), f"the run did not go on: {done}"
        )
        return self.figures()

    def figures(self) -> dict[str, object]:
        """Return what has been found so far."""
        return {
            "strikes": self.strikes, "runs": self.runs, "longest_s": round(self.longest_s, 2), "limit_s": self.limit_s,
            "wrong": self.wrong,
        }  # fmt: skip

    def _command(self, variant: int, run: Path, strike: Strike | None) -> Outcome:
        self.commands += 1
        settings = f"{COMMON} {VARIANTS[variant]} --data.root {self.images} --output {run}"
        timeout_s = TIMEOUT_S[self.kind] if strike else 60.0  # a busy machine may be slow
        arguments = [*settings.split(), "--loop.timeout", str(timeout_s)]
        outcome = run_command(arguments, self.folder / f"notes-{self.commands}", strike, 60 if strike is None else 45)
        self._expect(not outcome.left, f"processes are left: {outcome}")
        self._expect(not outcome.traces, f"shared memory is left: {outcome}")
        return outcome

    def _strike(self, variant: int, run: Path) -> None:
        place = self.draw.choice(PLACES)
        victims = (0,) if place.name in ONLY_MAIN else (0, 1)
        # A launcher that is stopped disturbs nothing.
        victim = self.draw.choice(victims if self.kind == "stop" else (*victims, -1))
        signals = {"kill": (signal.SIGKILL,), "stop": (signal.SIGSTOP,), "signal": self.draw.choice(SIGNALS)}[self.kind]
        in_worker = variant == 2 and victim == 1 and place.name == "step"
        strike = Strike(victim, tuple(map(int, signals)), place.name, self.draw.uniform(0, 0.2), in_worker)
        self._judge(strike, variant, run, place.joined)

    def _judge(self, strike: Strike, variant: int, run: Path, joined: bool) -> None:
        """Strike a command, and look at what is left."""
        outcome = self._command(variant, run, strike)
        finished = (run / "summary.json").exists()
        if not outcome.struck or (outcome.code == 0 and finished):
            return  # the place is not on the way of this command, or it ended before
        self.strikes += 1
        self.longest_s = max(self.longest_s, outcome.seconds)
        what = f"{strike}, {outcome}"
        self._expect(outcome.seconds < self.limit_s, f"too late: {what}")
        self._expect(self._code_is_right(strike, outcome, joined), f"exit code: {what}")
        self._expect(_newest_state_is_intact(run), f"damaged state: {what}")
        if self.kind != "signal" and strike.victim >= 0:
            self._expect(_names(strike, outcome, joined), f"message: {what}")

    def _code_is_right(self, strike: Strike, outcome: Outcome, joined: bool) -> bool:
        if strike.worker:
            return outcome.code in ((2,) if self.kind != "signal" else (0, 2, 143))
        if self.kind == "kill":
            return outcome.code in ((-signal.SIGKILL,) if strike.victim < 0 else (128 + signal.SIGKILL, 75))
        if self.kind == "stop":
            return outcome.code == 75 if joined else outcome.code in (2, 75)
        ours = {code for number in strike.signals for code in (128 + number, -number)}
        return outcome.code in ours or (outcome.code == 75 and strike.victim >= 0)

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)
            print(what, file=sys.stderr, flush=True)


def _names(strike: Strike, outcome: Outcome, joined: bool) -> bool:
    """Return whether the output names the process that was struck and, if the others knew it, what it was doing."""
    if strike.worker:
        return "Loading process 0 (number" in outcome.text and "which was loading" in outcome.text
    name = f"rank {strike.victim}, "
    if not joined:
        return (
            name in outcome.text
            or f"with the ranks {strike.victim}" in outcome.text
            or any(word in outcome.text for word in ("cannot reach", "does not answer"))
        )
    if strike.place == "end":  # perhaps after the others had ended: then the launcher alone can tell
        return name in outcome.text
    pid = outcome.pids[strike.victim]
    lines = [line for line in outcome.text.splitlines() if name in line and f"pid {pid})" in line]
    return any("last seen at step" in line and "is alive" not in line for line in lines)


def _newest_state_is_intact(run: Path) -> bool:
    messages: list[str] = []
    store = CheckpointStore(run / "checkpoints", report=messages.append)
    newest = store.choose(resume=True)
    return not messages and (newest is None or newest.name == store.paths()[-1].name)


def _result(run: Path) -> tuple[object, ...]:
    """Return what two equal runs have in common: weights, masks, metrics."""
    names = ("model.safetensors", "model_ema.safetensors", "masks.safetensors")
    files = [(run / name).read_bytes() if (run / name).exists() else b"" for name in names]
    return (*files, without_timings(read_metrics(run / "metrics.jsonl")))


def main() -> int:
    """Run the campaign that the arguments name; return 1 if anything was wrong."""
    torch.set_num_threads(1)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    kind, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    # "kill 1" is the short form.
    distributed.JOIN_S = TIMEOUT_S[kind]
    folder = Path(tempfile.mkdtemp())  # no context manager: the forked processes would delete the folder
    with adopting_orphans():
        campaign = Campaign(kind, folder, seed)
        found = campaign.execute_one() if (kind, count) == ("kill", 1) else campaign.execute(count)
    shutil.rmtree(folder)
    print(json.dumps(found))
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
