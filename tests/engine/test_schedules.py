"""Rates, weight decay and the decay of averages at every step of a run against their formulas, also after it was resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tests.engine.faulty import Injection, Record
from tests.engine.nonfinite_program import PLAIN
from tests.engine.test_resume import Killed
from tests.engine.tiny import TinyNet, array_source, make_config, make_trainer
from torch import nn

from widekernel.engine import (
    CheckpointConfig,
    EmaConfig,
    EvaluationConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    Trainer,
)

STEPS, WARMUP = 20, 5
OPTIMIZER = OptimizerConfig(lr=0.03, weight_decay=0.07, layer_decay=0.6)
SCHEDULE = ScheduleConfig(steps=STEPS, warmup_steps=WARMUP, warmup_lr=1e-3, min_lr=2e-3)
DECAY = 0.8
SKIPPED = (3, 11)
TOLERANCE = 1e-12


class Observed:
    """What each step of a run used: rates and weight decay by parameter, and the decay of the average.

    Args:
        trainer: the trainer, of which this watches the steps
    """

    def __init__(self, trainer: Trainer) -> None:
        self.rates: dict[int, dict[str, tuple[float, float]]] = {}
        self.decays: dict[int, float] = {}
        make, average = trainer.step.make, trainer.average
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        get_decay = average.get_decay

        def watched_make(*arguments: object) -> bool | None:
            groups = trainer.components.trained.optimizer.param_groups
            self.rates[trainer.progress.step + 1] = {
                names[id(parameter)]: (group["lr"], group["weight_decay"])
                for group in groups
                for parameter in group["params"]
            }
            return make(*arguments)

        def watched_decay(step: int | None = None) -> float:
            self.decays[trainer.progress.step + 1] = get_decay(step)
            return self.decays[trainer.progress.step + 1]

        trainer.step.make, average.get_decay = watched_make, watched_decay


def rate(step: int) -> float:
    """Return the rate of step `step`, counted from 1, of the group without a scale."""
    done = step - 1
    if done < WARMUP:
        return SCHEDULE.warmup_lr + (OPTIMIZER.lr - SCHEDULE.warmup_lr) * done / WARMUP
    cosine = math.cos(math.pi * (done - WARMUP) / (STEPS - WARMUP))
    return SCHEDULE.min_lr + (OPTIMIZER.lr - SCHEDULE.min_lr) * (1 + cosine) / 2


def trainer_of(folder: Path, warmup: bool, killed_at: int | None = None) -> tuple[Trainer, Observed]:
    config = make_config(
        folder,
        augment=PLAIN,
        optimizer=OPTIMIZER,
        schedule=SCHEDULE,
        ema=EmaConfig(decay=DECAY, warmup=warmup),
        loop=LoopConfig(batch_size=2, log_every=7, device="cpu"),
        checkpoint=CheckpointConfig(every_steps=6),
        evaluation=EvaluationConfig(every_steps=100),
    )
    trainer = make_trainer(config, source=array_source(8), reporter=Record(killed_at), model=Layered())
    return Injection("loss", SKIPPED).into(trainer), Observed(trainer)


class Layered(TinyNet):
    """The tiny network, with the description of its layers that layer decay needs."""

    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^conv", "middle": r"^norm", "end": r"^(?:head|scale)"}


@pytest.mark.parametrize("warmup", [False, True])
def test_every_step_of_a_run_that_is_resumed_twice(warmup: bool, tmp_path: Path) -> None:
    parts = []
    for killed_at in (9, 8, None):  # after steps 9 and 16; it goes on from the states after 8 and 12
        trainer, observed = trainer_of(tmp_path, warmup, killed_at)
        parts.append(observed)
        if killed_at is None:
            trainer.run()
        else:
            with pytest.raises(Killed):
                trainer.run()
    assert [(min(part.rates), max(part.rates)) for part in parts] == [(1, 9), (9, 16), (13, STEPS)]
    scales = {"conv.weight": 0.6**2, "conv.bias": 0.6**2, "norm.weight": 0.6, "norm.bias": 0.6}
    decayed = {"conv.weight", "head.weight"}
    for part in parts:
        for step, values in part.rates.items():
            assert values.keys() == dict(trainer.model.named_parameters()).keys()
            for name, (lr, decay) in values.items():
                assert lr == pytest.approx(rate(step) * scales.get(name, 1.0), abs=TOLERANCE, rel=TOLERANCE), (step, name)
                assert decay == (OPTIMIZER.weight_decay if name in decayed else 0.0), name
        assert part.decays.keys() == part.rates.keys() - set(SKIPPED)
        for step, decay in part.decays.items():
            # timm's warm-up: the power 2/3 of the number of steps.
            expected = min(DECAY, 1 - step ** (-2 / 3)) if warmup else DECAY
            assert decay == pytest.approx(expected, abs=TOLERANCE), step


def test_the_description_of_layers_is_used() -> None:
    assert isinstance(Layered(), nn.Module) and rate(1) == SCHEDULE.warmup_lr and rate(WARMUP + 1) == OPTIMIZER.lr
