"""Program of `test_nonfinite`: two processes, one of which meets values that are not finite.

Usage: python -m tests.engine.nonfinite_program FOLDER
Each process writes nonfinite.RANK.json. `test_processes` runs some of the cases.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from tests.engine.faulty import NAMES, Injection, Record
from tests.engine.forked import free_ports, start
from tests.engine.test_sparse_runs import dynamic
from tests.engine.tiny import make_config, make_trainer

import widekernel.engine.distributed  # noqa: F401 - once, before the processes are forked
from widekernel.data import AugmentConfig
from widekernel.engine import CheckpointConfig, EvaluationConfig, FaultConfig, LoopConfig, ScheduleConfig, Trainer
from widekernel.engine.config import SparsityConfig
from widekernel.engine.error_context import TrainingError
from widekernel.engine.joining import joined_processes
from widekernel.engine.processes import Processes

STEPS = 7
FAULT = 3
"""The step of most faults, which is also the one in which masks would move."""
MANY = (4, 5, 6)
"""Steps of faults in a row; the last state before them is saved after step 3."""
PLAIN = AugmentConfig(auto_augment=None, erase_prob=0.0, mixup=0.0, cutmix=0.0)
LOOP = LoopConfig(batch_size=12, micro_batch=3, log_every=2, device="cpu")


@dataclass(frozen=True)
class Case:
    """A run of two processes.

    Args:
        injection: what happens
        settings: settings of the run that differ from those of `trainer_of`
        names: the process that the message names
    """

    injection: Injection
    settings: dict
    names: int


def cases() -> dict[str, Case]:
    """Return the cases by name; every kind and value occurs in both processes."""
    found = {}
    for number, (kind, value, rank) in enumerate(itertools.product(NAMES, (math.nan, math.inf), range(2))):
        # Without synchronized norms, the network of the other process never sees the value.
        loop = LOOP if number % 4 in (0, 3) else replace(LOOP, sync_batch_norm=False)
        # If all processes have the spoiled gradient, the first one reports it.
        names = 0 if kind == "gradient" else rank
        found[f"{kind} {value} in {rank}"] = Case(Injection(kind, (FAULT,), value, rank), {"loop": loop}, names)
    found["sparse"] = Case(Injection("loss", (FAULT,), math.nan, 1), {"sparsity": dynamic()}, 1)
    found["rollback"] = Case(Injection("input", MANY, math.inf, 1), {"faults": FaultConfig(max_skipped=2, rollbacks=1)}, 1)
    found["stop"] = Case(Injection("loss", MANY, math.nan, 1), {"faults": FaultConfig(max_skipped=2)}, 1)
    return found


def short_cases() -> dict[str, Case]:
    """Return some of the cases: each kind in process 1, with NaN or infinity in turn."""
    values = itertools.cycle((math.nan, math.inf))
    names = [*(f"{kind} {next(values)} in 1" for kind in NAMES), "sparse", "rollback", "stop"]
    return {name: cases()[name] for name in names}


def trainer_of(folder: Path, settings: dict, processes: Processes, record: Record) -> Trainer:
    common = {
        "augment": PLAIN,
        "schedule": ScheduleConfig(steps=STEPS, warmup_steps=2),
        "evaluation": EvaluationConfig(every_steps=100),
        "checkpoint": CheckpointConfig(every_steps=3),
        "loop": LOOP,
        "sparsity": SparsityConfig(),
    }
    config = make_config(folder, **{**common, **settings})
    record.trainer = trainer = make_trainer(config, reporter=record, processes=processes)
    return trainer


def run(cases: dict[str, Case]) -> None:
    """Run the cases in this process and the other one, and write what happened."""
    report = {}
    # Curves take longer than training.
    with joined_processes("cpu", 60) as processes, mock.patch("widekernel.engine.loop.save_curves"):
        for name, case in cases.items():
            record = Record()
            folder = Path(f"run {name}")
            trainer = case.injection.into(trainer_of(folder, case.settings, processes, record))
            error = ""
            try:
                trainer.run()
            except TrainingError as stop:
                error = str(stop)
            report[name] = {
                "steps": record.steps,
                "unchanged": record.unchanged(),
                "touched": record.touched(),
                "messages": [text for text in record.messages if "finite" in text],
                "counts": trainer.step.counts(),
                "left out": trainer.progress.left_out,
                "digests": record.digests,
                "error": error,
            }
    Path(f"nonfinite.{os.environ['RANK']}.json").write_text(json.dumps(report))


def check(name: str, reports: list[dict]) -> None:
    """Assert that both processes decided what they should in a case; `reports` are those of the processes, by rank."""
    case, found = cases()[name], [report[name] for report in reports]
    where = f"{NAMES[case.injection.kind]} ({'NaN' if math.isnan(case.injection.value) else 'infinite'} in "
    synced = case.settings.get("loop", LOOP).sync_batch_norm
    for key in ("steps", "messages", "counts", "left out", "error"):
        assert found[0][key] == found[1][key], key
    for one, other in zip(found[0]["digests"], found[1]["digests"], strict=True):
        # Buffers of norms that are not synchronized belong to their process.
        equal = {key for key in one if one[key] == other[key]}
        assert equal >= ({"parameters", "optimizer", "sparsity"} if not synced else set(one))
    for each in found:
        messages, texts = each["messages"], [text for text in each["messages"] if text.startswith("Skipped")]
        assert all(where in text and text.endswith(f"in process {case.names} is not finite.") for text in texts)
        if name == "stop":
            assert each["steps"] == [1, 2, 3, 4, 5] and each["unchanged"] == [4, 5] and each["touched"] == [2, 3]
            assert each["counts"] == [3, 3, 3] and len(texts) == len(messages) == 3
            assert each["error"].startswith("3 training step(s) in a row, up to step 6, were not finite")
            assert where in each["error"] and f"in process {case.names} was not" in each["error"]
        elif name == "rollback":
            assert each["steps"] == [1, 2, 3, 4, 5, 7, 7] and each["unchanged"][:2] == [4, 5]
            assert each["left out"] == [[3, 6]] and each["error"] == ""
            assert len(texts) == 3 and "returns to step 3 and leaves out the batches up to step 6" in messages[3]
        else:
            made = [step for step in range(2, STEPS + 1) if step != FAULT]
            # The evaluation after the last step copies the buffers of process 0.
            assert each["unchanged"][:1] == [FAULT] and each["touched"][: len(made)] == made
            assert each["counts"] == [1, 0, 1] and len(texts) == len(messages) == 1
            assert texts[0].startswith(f"Skipped training step {FAULT}: ") and each["error"] == ""


def main() -> None:
    """Run all cases in two processes in the current folder; exit with 1 if one of them fails."""
    group = start("log", lambda: run(cases()), 2, Path(), next(free_ports()))
    late = group.wait(90)
    sys.exit(1 if late or any(group.codes.values()) else 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    main()
