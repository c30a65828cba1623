"""Campaigns: runs that are killed, and resumed by a new process; do they end like an undisturbed one, bit for bit?

    python -m tests.faults.resume_program cuts 20       # cut every run after each of so many steps
    python -m tests.faults.resume_program kills 150 1   # kill one process at so many random times, a fifth inside saves
    python -m tests.faults.resume_program kills 100 2   # kill a random one of two processes
    python -m tests.faults.resume_program short         # one kill inside a save

It is a program of its own, which has computed nothing when it forks: OpenMP's threads do not survive a fork. The last line
is a JSON object with the figures.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tests.engine.forked import Group, free_ports, start
from tests.faults.resume_runs import SHORT, SLOW_S, STEPS, VARIANTS, Marks, Start, Variant, found_path

import widekernel.engine.distributed  # noqa: F401 - once, before the processes are forked

LIMIT_S = 120.0
INTERVAL = 3
"""Steps between saves in the campaign of kills."""


class Campaign:
    """Forks runs, and compares what they found with the undisturbed run of the same variant.

    Args:
        folder: folder for all files
        interval: optimizer steps between saves
        slow: whether saves take longer
    """

    def __init__(self, folder: Path, interval: int, slow: bool) -> None:
        self.folder, self.interval, self.slow = folder, interval, slow
        self.marks, self.ports = Marks(), free_ports()
        self.references: dict[Variant, list[dict[str, Any]]] = {}
        self.seconds: dict[Variant, float] = {}
        self.wrong: list[str] = []

    def start(self, variant: Variant, name: str, **options: Any) -> Group:
        """Start a run in the folder `name`, or resume it."""
        self.marks.clear()
        scenario = Start(variant, self.folder / name, self.marks, self.interval, slow=self.slow, **options)
        port = next(self.ports) if variant.world_size > 1 else 1
        return start(name, scenario, variant.world_size, self.folder, port)

    def check(self, right: bool, name: str, text: object) -> bool:
        """Note and print what is wrong in the run `name` unless `right`."""
        if not right:
            self.wrong.append(f"{name}: {text}")
            print(self.wrong[-1], flush=True)
        return right

    def finished(self, variant: Variant, group: Group) -> list[dict[str, Any]] | None:
        """Wait until a run has finished; return what each of its processes found, or `None` if it failed."""
        late = group.wait(LIMIT_S)
        if any(group.codes.values()) or late:
            logs = [(self.folder / f"{group.name}.{rank}").read_text()[-1500:] for rank in range(variant.world_size)]
            self.check(False, group.name, f"exit codes {group.codes}, late {late}: {logs}")
            return None
        return [json.loads(found_path(self.folder / group.name, r).read_text()) for r in range(variant.world_size)]

    def reference(self, variant: Variant) -> list[dict[str, Any]]:
        """Return what each process of the undisturbed run found."""
        if variant not in self.references:
            group = self.start(variant, f"{variant.name}-undisturbed", noting=not self.slow)
            begun = self.until_first_step(group)
            while not group.reap() and not self.marks.get("finished"):
                time.sleep(0.001)
            self.seconds[variant] = time.monotonic() - begun  # without the time that processes take to end
            found = self.finished(variant, group)
            assert found is not None, self.wrong
            self.references[variant] = found
        return self.references[variant]

    def until_first_step(self, group: Group) -> float:
        """Wait until a run has made its first step since this start, or has ended; return the time."""
        marks = self.marks
        while not group.reap() and (marks.get("first") < 0 or marks.get("step") <= marks.get("first")):
            time.sleep(0.001)
        return time.monotonic()

    def equal(self, variant: Variant, name: str, found: Sequence[dict[str, Any]]) -> bool:
        """Return whether a resumed run equals the undisturbed one, in all processes, and say where not."""
        differing = []
        for rank, (mine, other) in enumerate(zip(found, self.reference(variant), strict=True)):
            for step, digests in [*mine["steps"].items(), ("end", mine["end"])]:
                wanted = other["end"] if step == "end" else other["steps"][step]
                differing += [f"{key} at {step} of rank {rank}" for key in wanted if wanted[key] != digests.get(key)]
                differing += [f"unknown {key}" for key in digests.keys() - wanted.keys()]
            if mine["rows"] != other["rows"]:
                differing.append(f"metrics.jsonl of rank {rank}: {mine['rows']}, not {other['rows']}")
        return self.check(not differing, name, differing[:4])

    def clear(self, name: str) -> None:
        """Remove the files of a run."""
        shutil.rmtree(self.folder / name)


# -- cuts ------------------------------------------------------------------------------------------------------------


def cuts(campaign: Campaign, variants: Sequence[Variant], steps: Sequence[int]) -> dict[str, Any]:
    """Cut each run when the state after each of `steps` is the newest on disk; resume it in new processes."""
    counts: Counter[str] = Counter()
    changes = {}
    for variant in variants:
        reference = campaign.reference(variant)
        changes[variant.name] = changes_in(reference)
        for step in steps:
            counts["cuts"] += 1
            counts["equal"] += cut(campaign, variant, step)
    return {**counts, "changes": changes, "wrong": campaign.wrong}


def cut(campaign: Campaign, variant: Variant, step: int) -> bool:
    """Cut a run in the step after `step`, resume it, and return whether all is equal."""
    name = f"{variant.name}-{step}"
    group = campaign.start(variant, name, dies_at=step + 1)
    group.wait(LIMIT_S)
    died = {-signal.SIGKILL if step % 2 == 0 else 9}
    log = (campaign.folder / f"{name}.0").read_text()[-1500:]
    if not campaign.check(set(group.codes.values()) == died, name, f"exit codes {group.codes}: {log}"):
        return False
    # No state is saved while steps are skipped, but with the next good step.
    saved = campaign.marks.get("saved")
    skips = variant.precision == "fp16"
    found = campaign.finished(variant, campaign.start(variant, name, noting=True))
    if found is None:
        return False
    first = [one["first"] for one in found]
    right = campaign.check(
        set(first) == {saved} and (saved == step or (skips and saved < step)),
        name, f"cut after step {step} with the state of {saved} on disk, but resumed from {first}",
    )  # fmt: skip
    right &= campaign.equal(variant, name, found)
    campaign.clear(name)
    return right


def changes_in(found: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return how many states of each component occurred in a run, and its largest figures of moving masks."""
    states = list(found[0]["steps"].values())
    counts = {key: len({digests[key] for digests in states}) for key in ("model", "ema", "optimizer", "scaler", "meters")}
    rows = [json.loads(row) for row in found[0]["rows"]]
    updates = max(row.get("mask_updates", 0) for row in rows)
    return {**counts, "mask_updates": updates, "moved": any(row.get("churn", 0) > 0 for row in rows)}


# -- kills -----------------------------------------------------------------------------------------------------------


class Death(NamedTuple):
    """What a run did when it died.

    Args:
        step: steps that its first process had done
        last_step: steps that any process had done
        saved: step of the last complete state
        saving: step of the state that was being written, or 0
    """

    step: int
    last_step: int
    saved: int
    saving: int


class Kills:
    """Campaign of kills at random times.

    Args:
        campaign: forks and compares
        in_saves: share of the kills that wait for a save
        seed: seed of the times
    """

    def __init__(self, campaign: Campaign, in_saves: float = 0.3, seed: int = 0) -> None:
        self.campaign, self.marks, self.in_saves = campaign, campaign.marks, in_saves
        self.draw = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.largest_loss = 0
        self.longest_end_s = 0.0

    def run(self, variants: Sequence[Variant], kills: int, in_saves: int) -> dict[str, Any]:
        """Kill runs until there were enough kills, and return the figures."""
        while self.counts["kills"] < kills or self.counts["in saves"] < in_saves:
            self._case(variants[self.counts["runs"] % len(variants)])
        names = ("kills", "in saves", "one process", "rank 0 of 2", "rank 1 of 2", "runs", "equal")
        return {
            **{name: self.counts[name] for name in names},
            "largest loss in steps": self.largest_loss,
            "longest end of a survivor in s": round(self.longest_end_s, 2),
            "wrong": self.campaign.wrong,
        }

    def _case(self, variant: Variant) -> None:
        """Kill a run one to three times, resuming it each time, and compare its end."""
        campaign, name = self.campaign, f"run-{self.counts['runs']}-{variant.name}"
        campaign.reference(variant)
        self.counts["runs"] += 1
        former: Death | None = None
        found: list[dict[str, Any]] | None = None
        for kills_left in range(self.draw.randint(1, 3), -1, -1):
            group = campaign.start(variant, name)
            death = self._kill(variant, group) if kills_left else None
            if death is None:
                found = campaign.finished(variant, group)
            if former is not None:
                self._check_loss(variant, name, former)
            former = death
            if death is None:
                break
        self.counts["equal"] += found is not None and campaign.equal(variant, name, found)
        campaign.clear(name)
        if self.counts["runs"] % 10 == 0:
            print(dict(self.counts), f"largest loss {self.largest_loss}", flush=True)

    def _kill(self, variant: Variant, group: Group) -> Death | None:
        """Kill one process of a run at a random time after its first step; return `None` if it has finished before."""
        victim = self.draw.randrange(variant.world_size)
        self._await_time(variant, group)
        if group.reap() or victim in group.codes:
            return None
        struck = time.time()
        os.kill(group.pids[victim], signal.SIGKILL)
        saving = self.marks.get("saving") != 0
        late = group.wait(LIMIT_S)
        if group.codes[victim] == 0:
            return None
        if not self.marks.get("finished", victim):
            self._check_survivors(group, victim, struck, late)
            self.counts["kills"] += 1
            self.counts["in saves"] += saving
            self.counts["one process" if variant.world_size == 1 else f"rank {victim} of 2"] += 1
        steps = [self.marks.get("step", rank) for rank in range(variant.world_size)]
        return Death(steps[0], max(steps), self.marks.get("saved"), self.marks.get("saving"))

    def _await_time(self, variant: Variant, group: Group) -> None:
        """Wait until a random time in the rest of the run, or in one of the saves in it."""
        draw, marks = self.draw, self.marks
        in_save, part, delay = draw.random() < self.in_saves, draw.random(), draw.uniform(0, 4 * SLOW_S)
        self.campaign.until_first_step(group)
        left = 1 - max(0, marks.get("first")) / variant.steps
        if not in_save:
            time.sleep(part * left * self.campaign.seconds[variant])
            return
        number = marks.get("saves") + 1 + int(part * left * variant.steps / self.campaign.interval)
        while not (marks.get("saves") >= number and marks.get("saving")) and not group.reap():
            time.sleep(0.0002)
        time.sleep(delay)

    def _check_survivors(self, group: Group, victim: int, struck: float, late: list[int]) -> None:
        """Check that the other process has ended by itself with an error."""
        for rank in set(group.codes) - {victim}:
            self.longest_end_s = max(self.longest_end_s, group.ended[rank] - struck)
            self.campaign.check(rank not in late, group.name, f"rank {rank} hangs after rank {victim} was killed")
            self.campaign.check(group.codes[rank] > 0, group.name, f"rank {rank} exited with {group.codes[rank]}")

    def _check_loss(self, variant: Variant, name: str, death: Death) -> None:
        """Check from which state the run went on: the last complete one, or the one whose save was under way."""
        firsts = {self.marks.get("first", rank) for rank in range(variant.world_size)}
        first = min(firsts)
        self.largest_loss = max(self.largest_loss, death.last_step - first)
        # A save waits for the one before, so of those that began before the last step, only the last may be incomplete.
        before = [0, *(step for step in self.campaign.reference(variant)[0]["saves"] if step < death.step)]
        complete = before[-2] if len(before) > 2 else before[-1]  # the save after the first step is awaited
        right = len(firsts) == 1 and first in {death.saved, death.saving or death.saved} and first >= complete
        self.campaign.check(right, name, f"died with {death}, and resumed from {firsts}; {complete} must be complete")


def main(campaign: str, amount: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Run a campaign in a new folder, and return its figures."""
    folder = Path(tempfile.mkdtemp())  # no context manager: the forked processes would delete the folder
    began = time.monotonic()
    gc.freeze()  # otherwise each process copies all memory when it collects garbage
    if campaign == "cuts":
        figures = cuts(Campaign(folder, interval=1, slow=False), VARIANTS, range(0, STEPS, STEPS // amount))
    elif campaign == "kills":
        # Lighter runs, because there are many: cuts cover loading processes, and accumulation on two processes.
        lighter = [replace(each, workers=0, accumulate=each.accumulate if world_size == 1 else 1) for each in VARIANTS]
        variants = [each for each in lighter if each.world_size == world_size]
        figures = Kills(Campaign(folder, INTERVAL, slow=True)).run(variants, amount, amount // 5)
    else:
        figures = Kills(Campaign(folder, INTERVAL, slow=True), in_saves=1.0).run([SHORT], 1, 1)
    shutil.rmtree(folder)
    return {**figures, "seconds": round(time.monotonic() - began)}


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
