"""Values that are not finite: such steps change nothing, are counted and named, and many in a row end the run.

    python -m pytest -m "slow or not slow" -s -n 0 tests/engine/test_nonfinite.py

prints how many cases of two processes were decided in the same way, and as they should; `test_processes` runs some of them.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.faulty import Injection, Record, digest_of, digests_of
from tests.engine.nonfinite_program import PLAIN, cases, check
from tests.engine.test_resume import Killed
from tests.engine.test_sparse_runs import dynamic
from tests.engine.tiny import TinyNet, array_source, make_config, make_trainer, states_equal, without_timings
from torch import nn

from widekernel.data.batches import Batch
from widekernel.engine import CheckpointConfig, EvaluationConfig, FaultConfig, LoopConfig, Processes, ScheduleConfig, Trainer
from widekernel.engine import components as components_module
from widekernel.engine.average import Average
from widekernel.engine.error_context import TrainingError
from widekernel.engine.interrupts import Interrupted
from widekernel.engine.metrics_log import read_metrics
from widekernel.engine.nonfinite import NonFinite, first_nonfinite, first_of_all
from widekernel.engine.optimization import create_optimizer
from widekernel.engine.optimizer_step import Trained, can_be_deferred

STEPS = 12
EVERY_STEP, NEVER = LoopConfig(batch_size=6, micro_batch=2, log_every=1, device="cpu"), 1000


def trainer_of(folder: Path, record: Record | None = None, **changes: Any) -> Trainer:
    """Return a trainer of 12 steps, which evaluates only at the end, and by default saves every three steps."""
    settings = {
        "augment": PLAIN,
        "schedule": ScheduleConfig(steps=STEPS, warmup_steps=2),
        "evaluation": EvaluationConfig(every_steps=NEVER),
        "checkpoint": CheckpointConfig(every_steps=3),
        "loop": EVERY_STEP,
    }
    record = record or Record()
    record.trainer = trainer = make_trainer(
        make_config(folder, **{**settings, **changes}), source=array_source(18), reporter=record
    )
    return trainer


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.engine.nonfinite_program", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    subprocess.run(program, cwd=Path(__file__).parents[2], env=environment, timeout=200, check=True)
    reports = [json.loads((tmp_path / f"nonfinite.{rank}.json").read_text()) for rank in range(2)]
    for name in cases():
        check(name, reports)
    print(f"\n{len(cases())} of {len(cases())} cases of two processes: the same decision, and nothing changed")


# -- what is skipped, and how it is told -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2])
def test_so_many_in_a_row_and_no_more(number: int, tmp_path: Path) -> None:
    faults = FaultConfig(max_skipped=number)
    steps = tuple(range(3, 3 + number))
    trainer = Injection("gradient", steps).into(trainer_of(tmp_path / "good", faults=faults))
    trainer.run()
    assert trainer.step.counts() == [number, 0, number] and trainer.progress.skipped == number
    record = Record()
    trainer = Injection("gradient", (*steps, 3 + number)).into(trainer_of(tmp_path / "bad", record, faults=faults))
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    assert record.steps[-1] == 2 + number
    assert f"{number + 1} training step(s) in a row, up to step {3 + number}, were not finite" in str(caught.value)
    assert "the gradient of head.bias (NaN in 3 of 3 values) was not; optimizer.lr is 0.005" in str(caught.value)
    assert "faults.rollbacks" in str(caught.value)  # what to do


def test_skipped_steps_that_do_not_follow_each_other_add_up_but_do_not_end_the_run(tmp_path: Path) -> None:
    record = Record()
    trainer = Injection("loss", (3, 5, 7)).into(trainer_of(tmp_path, record, faults=FaultConfig(max_skipped=1)))
    trainer.run()
    assert trainer.step.counts() == [3, 0, 1]
    assert record.unchanged() == [3, 5, 7, STEPS]  # the last one is the evaluation
    rows = {row["step"]: row for row in read_metrics(trainer.context.folder.metrics)}
    assert "skipped_steps" not in rows[2] and rows[3]["skipped_steps"] == 1 and rows[STEPS]["skipped_steps"] == 3
    assert "train_loss" not in rows[3] and math.isfinite(rows[4]["train_loss"])  # a row without any step that was made


def test_a_skipped_step_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    """The other run makes no forward pass at all in these steps."""
    record = Record()
    trainers = [trainer_of(tmp_path / name, record, sparsity=dynamic()) for name in ("without", "skipped")][::-1]
    Injection("input", (3, 4)).into(trainers[0])
    make = trainers[1].step.make
    trainers[1].step.make = lambda *arguments: trainers[1].progress.step not in (2, 3) and make(*arguments)
    for trainer in trainers:
        trainer.run()
    assert digests_of(trainers[0]) == digests_of(trainers[1])
    assert trainers[0].sparsity.controller.step == STEPS - 2
    # The first of three micro-batches is the bad one.
    texts = [text for text in record.messages if "finite" in text]
    assert len(texts) == 2 and all("the input images (NaN in 1 of 384 values)" in text for text in texts)


def test_activations_do_not_blame_the_running_statistics_that_they_spoil(tmp_path: Path) -> None:
    record = Record()
    trainer = trainer_of(tmp_path, record)
    trainer.model.conv.register_forward_hook(lambda *_: _[2] * math.nan if trainer.progress.step == 2 else None)
    trainer.run()
    assert [text for text in record.messages if "finite" in text] == [
        "Skipped training step 3: the loss (NaN in 1 of 1 values) is not finite."
    ]
    assert all(bool(buffer.isfinite().all()) for buffer in trainer.model.buffers())


def test_the_first_of_all_tensors_is_named() -> None:
    model = TinyNet()
    images = torch.full((2, 2), math.inf)
    batches = [Batch({"pixels": [torch.ones(2), torch.ones(2)]}, 2), Batch({"pixels": [torch.ones(2), images]}, 2)]
    loss = {"a": torch.tensor(1.0), "b": torch.tensor(math.nan)}
    assert first_nonfinite({"a": torch.tensor(1.0)}, batches[:1], model) is None
    model.head.bias.grad = torch.full((3,), math.nan)
    assert first_nonfinite({}, [], model) == NonFinite(4, "the gradient of head.bias (NaN in 3 of 3 values)")
    assert first_nonfinite(loss, [], model) == NonFinite(3, "the loss 'b' (NaN in 1 of 1 values)")
    model.norm.running_var[1] = math.inf
    assert first_nonfinite(loss, [], model) == NonFinite(2, "the buffer norm.running_var (infinite in 1 of 8 values)")
    model.head.weight.data[0, 0] = math.nan
    assert first_nonfinite(loss, [], model) == NonFinite(1, "the parameter head.weight (NaN in 1 of 24 values)")
    found = first_nonfinite(loss, batches, model)
    assert found == NonFinite(0, "the input pixels.1 (infinite in 4 of 4 values)")


def test_the_earliest_of_all_processes_is_named() -> None:
    class Several(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [None, NonFinite(4, "gradient"), NonFinite(1, "weight"), value]

    assert first_of_all(NonFinite(3, "loss"), Several(3, 4)) == "weight in process 2"
    assert first_of_all(NonFinite(0, "input"), Several(3, 4)) == "input in process 3"
    assert first_of_all(NonFinite(0, "input"), Processes()) == "input"
    assert first_of_all(None, Processes()) == "the norm of the gradients"


# -- training states and rollbacks -----------------------------------------------------------------------------------


def test_no_state_is_saved_between_skipped_steps(tmp_path: Path) -> None:
    checkpoint = CheckpointConfig(every_steps=4, every_epochs=NEVER)
    trainer = Injection("loss", (4, 5)).into(trainer_of(tmp_path, checkpoint=checkpoint))
    saved = []
    save = trainer.store.save
    trainer.store.save = lambda state, step, best: (saved.append(step), save(state, step, best))
    trainer.run()
    assert saved == [1, 6, 8, 12]  # the one that was due after step 4 comes after the first good step


def rolled_back(folder: Path, record: Record | None = None) -> tuple[Trainer, list[int]]:
    """Return a trainer that returns to step 3 after step 6, and the list of steps whose batches it takes."""
    trainer = trainer_of(folder, record, faults=FaultConfig(max_skipped=2, rollbacks=1))
    Injection("input", (4, 5, 6)).into(trainer)
    taken: list[int] = []
    take = trainer._batches.take
    trainer._batches.take = lambda step: (taken.append(step + 1), take(step))[1]
    return trainer, taken


@pytest.mark.parametrize("killed", ["before the save", "after the save", "after the next step"])
def test_a_run_that_is_killed_after_a_rollback_leaves_out_the_same_batches(killed: str, tmp_path: Path) -> None:
    whole, all_taken = rolled_back(tmp_path / "whole")
    whole.run()
    assert all_taken == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert whole.progress.left_out == [[3, 6]] and whole.progress.rollbacks == 1
    # Reported are steps 1 to 5, then 7.
    record = Record(killed_at=6 if killed == "after the next step" else None)
    trainer, taken = rolled_back(tmp_path / "cut", record)
    save_now = trainer.store.save_now

    def save_and_die(*arguments: Any) -> bool:
        returned = any("returns to step 3" in text for text in record.messages)
        if returned and killed == "before the save":
            raise Killed
        done = save_now(*arguments)
        if returned and killed == "after the save":
            raise Killed
        return done

    trainer.store.save_now = save_and_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    resumed, taken = rolled_back(tmp_path / "cut")
    resumed.run()
    # A state from before the rollback meets the same values again, and decides again; the others never see them.
    assert taken == ([4, 5, 6] if killed == "before the save" else []) + [7, 8, 9, 10, 11, 12]
    assert states_equal(resumed.state(), whole.state())
    rows = [without_timings(read_metrics(each.context.folder.metrics)) for each in (resumed, whole)]
    assert rows[0] == rows[1]


def test_rollbacks_run_out(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, record := Record(), faults=FaultConfig(max_skipped=1, rollbacks=1))
    Injection("loss", (4, 5, 8, 9)).into(trainer)
    with pytest.raises(TrainingError, match=r"2 training step\(s\) in a row, up to step 9"):
        trainer.run()
    assert trainer.progress.left_out == [[3, 5]] and sum("returns to" in text for text in record.messages) == 1
    trainer = trainer_of(tmp_path / "start", faults=FaultConfig(max_skipped=0, rollbacks=1))
    with pytest.raises(TrainingError, match="There is no training state to return to"):
        Injection("loss", (1,)).into(trainer).run()


def test_steps_in_a_row_count_anew_after_a_rollback(tmp_path: Path) -> None:
    """The first state is saved after a skipped step, which is the first of the three that lead back to it."""
    trainer = trainer_of(tmp_path, faults=FaultConfig(max_skipped=2, rollbacks=1))
    Injection("loss", (1, 2, 3, 4, 5)).into(trainer).run()
    assert trainer.progress.left_out == [[1, 3]] and trainer.step.counts() == [3, 0, 2]


# -- decisions on the device -----------------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainers use fused optimizers on the CPU, as they do on CUDA devices."""
    monkeypatch.setattr(
        components_module, "create_optimizer", lambda trained, config, fused: create_optimizer(trained, config, fused=True)
    )


def on_device(trainer: Trainer, deferred: bool) -> Trainer:
    """Let the optimizer skip steps as on a CUDA device, or not."""
    assert can_be_deferred(trainer.components.trained)
    trainer.step.deferred = trainer.step.can_defer = deferred
    return trainer


QUIET = {"loop": LoopConfig(batch_size=6, micro_batch=2, log_every=NEVER, device="cpu")}
"""Settings with which nobody asks for the counts before the end."""


def quiet_checkpoints() -> dict[str, Any]:
    return {**QUIET, "checkpoint": CheckpointConfig(every_epochs=NEVER)}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize(("kind", "steps"), [("input", (4, 5, 9)), ("averaged gradient", (1, 4))], ids=str)
def test_decisions_on_the_device_are_those_of_the_host(
    name: str, steps: tuple[int, ...], kind: str, tmp_path: Path, fused: None
) -> None:
    """SGD has momenta; with a fault in the first step they would stay unset if the device decided about it."""
    results = []
    for deferred in (True, False):
        config = replace(make_config(tmp_path).optimizer, name=name, clip_grad=0.1)
        trainer = trainer_of(tmp_path / str(deferred), **quiet_checkpoints(), optimizer=config)
        on_device(Injection(kind, steps).into(trainer), deferred)
        decisions = []
        make = trainer.step.make
        trainer.step.make = lambda *arguments, make=make, found=decisions: (found.append(make(*arguments)), found[-1])[1]
        trainer.run()
        if deferred and steps[0] != 1:
            assert decisions == [True] + [None] * (STEPS - 1)
        else:  # a skipped first step is the host's, and it goes on to decide
            assert decisions == [number + 1 not in steps for number in range(STEPS)]
        assert trainer.step.counts()[:2] == [len(steps), 0] and trainer.progress.skipped == len(steps)
        losses = [row["train_loss"] for row in read_metrics(trainer.context.folder.metrics)]
        assert len(losses) == 1 and math.isfinite(losses[0])
        results.append((digests_of(trainer), losses))
    assert results[0] == results[1]


def test_skipped_steps_are_told_when_a_row_is_written(tmp_path: Path, fused: None) -> None:
    record = Record()
    loop = LoopConfig(batch_size=6, micro_batch=2, log_every=5, device="cpu")
    settings = {**quiet_checkpoints(), "loop": loop}
    trainer = on_device(Injection("loss", (3, 4, 8)).into(trainer_of(tmp_path, record, **settings)), True)
    trainer.run()
    assert [text for text in record.messages if "finite" in text] == [
        "Skipped 2 training step(s) up to step 5: a loss or a gradient is not finite.",
        "Skipped training step 8: the loss (NaN in 1 of 1 values) is not finite.",  # the host decides from then on
    ]


def test_too_many_on_the_device_end_the_run_although_a_good_step_came_after_them(tmp_path: Path, fused: None) -> None:
    trainer = trainer_of(tmp_path, **quiet_checkpoints(), faults=FaultConfig(max_skipped=2))
    with pytest.raises(TrainingError, match=r"3 training step\(s\) in a row, up to step 12"):
        on_device(Injection("loss", (5, 6, 7)).into(trainer), True).run()


def test_the_host_decides_after_a_rollback(tmp_path: Path, fused: None) -> None:
    record = Record()
    trainer = trainer_of(tmp_path, record, **QUIET, faults=FaultConfig(max_skipped=1, rollbacks=1))
    on_device(Injection("loss", (4, 5, 8)).into(trainer), True).run()
    assert trainer.progress.left_out == [[3, 6]] and not trainer.step.deferred
    assert record.messages[-1] == "Skipped training step 8: the loss (NaN in 1 of 1 values) is not finite."


def test_a_state_that_is_saved_meanwhile_swallows_no_skipped_step(tmp_path: Path, fused: None) -> None:
    """A signal saves a state after skipped steps that nobody has asked for yet."""
    record = Record()
    trainer = on_device(Injection("loss", (3, 4)).into(trainer_of(tmp_path, record, **quiet_checkpoints())), True)
    step = record.step
    record.step = lambda number, row: (step(number, row), number == 6 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        trainer.run()
    assert trainer.step.counts() == [2, 0, 2] and not any("finite" in text for text in record.messages)
    resumed = on_device(trainer_of(tmp_path, record := Record(), **quiet_checkpoints()), True)
    resumed.run()
    assert "Skipped 2 training step(s) up to step 12: a loss or a gradient is not finite." in record.messages
    assert resumed.progress.skipped == 2 and not resumed.step.deferred


def test_a_resumed_run_lets_the_device_decide_unless_steps_were_skipped(tmp_path: Path, fused: None) -> None:
    trainer = on_device(trainer_of(tmp_path, **QUIET), True)
    for skipped, rollbacks, deferred in ((0, 0, True), (1, 0, False), (0, 1, False)):
        trainer.progress.skipped, trainer.progress.rollbacks = skipped, rollbacks
        trainer.step.set_counts([5, 2, 3])
        state = trainer.components.state(Processes())
        assert trainer.step.counts() == [5, 2, 3]
        trainer.step.set_counts([0, 0, 0])
        trainer.step.deferred = not deferred
        trainer.components.load_state(state, Processes())
        assert trainer.step.deferred is deferred and trainer.step.counts() == [5, 2, 3]
        assert trainer.step.skipped() == (5, 2, 3) and trainer.step.counts() == [5, 2, 2]
    trainer.step.can_defer = False
    trainer.components.load_state(state, Processes())
    assert not trainer.step.deferred


def test_what_the_device_can_decide() -> None:
    def trained(**changes: Any) -> Trained:
        model = changes.pop("model", None) or nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), fused=changes.pop("fused", True))
        scaler = torch.amp.GradScaler("cpu", enabled=changes.pop("scaled", False))
        average = Average(model, 0.9, False) if changes.pop("averaged", True) else None
        sparsity = type("Sparsity", (), {"kind": changes.pop("kind", "none")})()
        return Trained(model, model, optimizer, scaler, sparsity, average)

    assert can_be_deferred(trained())
    assert not can_be_deferred(trained(fused=False))
    assert not can_be_deferred(trained(scaled=True))
    assert not can_be_deferred(trained(kind="dynamic"))
    half = nn.Linear(2, 2).bfloat16()
    assert not can_be_deferred(trained(model=half))  # the average of such weights is rounded at random
    assert can_be_deferred(trained(model=half, averaged=False))


@pytest.mark.parametrize("warmup", [False, True])
def test_an_average_on_the_device_is_the_same_bit_for_bit(warmup: bool) -> None:
    plain, made, skipped = (Average(model := TinyNet(), 0.9, warmup) for _ in range(3))
    for average in (made, skipped):
        average.module.load_state_dict(plain.module.state_dict())
    before = digest_of(dict(skipped.module.named_parameters()))
    for step in range(1, 6):
        for value in model.state_dict().values():
            value.copy_(torch.randn_like(value.float()) * 10.0 ** torch.randint(-6, 6, ()))
        plain.update(model, step)
        made.update(model, step, torch.tensor(1.0))
        skipped.update(model, step, torch.tensor(0.0))
    assert digest_of(plain.module.state_dict()) == digest_of(made.module.state_dict())
    assert digest_of(dict(skipped.module.named_parameters())) == before


# -- fp16 ------------------------------------------------------------------------------------------------------------


def half_trainer(folder: Path, record: Record, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Return a sparse trainer in fp16 on the CPU, whose scale is so large that the first gradients overflow."""
    monkeypatch.setattr(components_module, "make_autocast", lambda *_: lambda: torch.autocast("cpu", torch.float16))
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**24, growth_interval=4, enabled=enabled)
    )
    loop = LoopConfig(batch_size=6, micro_batch=2, log_every=1, precision="fp16", device="cpu")
    trainer = trainer_of(folder, record, loop=loop, sparsity=dynamic(), schedule=ScheduleConfig(steps=18, warmup_steps=2))
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    return trainer


def test_overflow_in_fp16_skips_the_step_and_lowers_the_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record()
    trainer = half_trainer(tmp_path, record, monkeypatch)
    scaler, controller = trainer.components.trained.scaler, trainer.sparsity.controller
    seen: list[tuple[float, int, float, int]] = []
    make = trainer.step.make

    def watched(*arguments: Any) -> bool | None:
        before = scaler.get_scale(), controller.step
        made = make(*arguments)
        seen.append((*before, scaler.get_scale(), controller.step))
        assert made is (controller.step == before[1] + 1)
        return made

    trainer.step.make = watched
    trainer.run()
    skipped = [number for number, (_, before, _, after) in enumerate(seen, start=1) if before == after]
    assert len(skipped) >= 4 and skipped[:3] == [1, 2, 3] and len(skipped) < 12
    assert set(record.unchanged()) - {18} == set(skipped) - {1}
    for number, (scale, _, later, _) in enumerate(seen, start=1):
        assert later == scale / 2 if number in skipped else later in (scale, 2 * scale)
    assert any(later == 2 * scale for scale, _, later, _ in seen)  # it grows again after four good steps
    texts = [text for text in record.messages if "finite" in text]
    assert len(texts) == len(skipped) and all("gradient of" in text for text in texts)
    assert controller.step == 18 - len(skipped) == len(seen) - trainer.step.counts()[0]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_fp16_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = half_trainer(tmp_path / "whole", Record(), monkeypatch)
    whole.run()
    with pytest.raises(Killed):
        half_trainer(tmp_path / "cut", Record(killed_at=11), monkeypatch).run()
    resumed = half_trainer(tmp_path / "cut", Record(), monkeypatch)
    resumed.run()
    assert resumed.state()["scaler"]["scale"] != 2.0**24
    assert states_equal(resumed.state(), whole.state())
