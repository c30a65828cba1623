"""Learning rates of the published segmentation and detection runs, at every iteration that is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from widekernel.engine.optimization_config import ScheduleConfig
from widekernel.engine.reporter import RunLength
from widekernel.engine.schedule import create_schedule

NAMES = [
    "convnext_ade",
    "replknet31b_ade",
    "replknet31b_cityscapes",
    "slak_80k",
    "tiny",
    "cascade_3x",
    "fcos_2x",
    "tiny_step",
    "slak_1x",
]


def settings_of(row: dict[str, Any]) -> tuple[ScheduleConfig, RunLength]:
    """Return our settings for an official schedule, and the length of its run."""
    warmup = {"warmup_steps": row["warmup_iters"], "warmup_kind": row["warmup"], "warmup_factor": row["warmup_ratio"]}
    if row["policy"] == "poly":
        config = ScheduleConfig(
            kind="poly", steps=row["max_iters"], power=row["power"], min_lr=row["min_lr"], warmup_epochs=0, **warmup
        )
        return config, RunLength(row["max_iters"], 1000)
    per_epoch = row["iterations_per_epoch"]
    epochs = max(row["iterations"]) // per_epoch + 1
    milestones = tuple(row["step"])
    config = ScheduleConfig(
        kind="multistep", epochs=epochs, milestones=milestones, gamma=row["gamma"], min_lr=0.0, warmup_epochs=0, **warmup
    )
    return config, RunLength(epochs * per_epoch, per_epoch)


@pytest.mark.parametrize("name", NAMES)
def test_rates_equal_the_official_ones(name: str, shared: Path) -> None:
    rows = json.loads((shared / "parity" / "downstream" / "golden" / "lr_schedules.json").read_text())
    row = next(row for row in rows if row["name"] == name)
    assert {row["name"] for row in rows} == set(NAMES)
    config, length = settings_of(row)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=row["lr"])
    schedule = create_schedule(optimizer, config, length)
    found = []
    for iteration in row["iterations"]:
        schedule.step_update(iteration)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(row["values"], rel=1e-10, abs=0)
