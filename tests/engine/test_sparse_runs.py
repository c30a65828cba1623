"""Sparse training by the loop: masks in training states, exact resumption, and the files of a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tests.engine.test_resume import KillAt, Killed
from tests.engine.tiny import TinyNet, make_config, make_trainer, states_equal, without_timings

from widekernel.engine import CheckpointConfig, EmaConfig, LoopConfig, RunFolder, RunFolderError, ScheduleConfig
from widekernel.engine.config import SparsityConfig
from widekernel.engine.metrics_log import read_metrics
from widekernel.engine.sparsification import restore_learned
from widekernel.errors import ArgumentError, CheckpointError, ConfigError
from widekernel.sparsity import DynamicSparsityConfig, load_masks, save_masks
from widekernel.sparsity.semi_structured import SemiStructuredConfig
from widekernel.tasks.classification.config import ModelConfig, TrainConfig


def dynamic(**settings) -> SparsityConfig:
    defaults = {"sparsity": 0.5, "init": "snip", "growth": "gradient", "update_interval": 3, "prune_schedule": "cosine"}
    return SparsityConfig("dynamic", dynamic=DynamicSparsityConfig(**{**defaults, **settings}))


def learned() -> SparsityConfig:
    settings = SemiStructuredConfig(method="learned", min_in_channels=4, min_out_channels=1)
    return SparsityConfig("semi_structured", semi_structured=settings)


def settings_of(kind: str, accumulate: int, steps: int = 30) -> dict:
    """Return settings of a run of whole epochs, of at least `steps` steps in all, under bf16 autocast."""
    batch = 4 if accumulate == 1 else 2
    per_epoch = 42 // (batch * accumulate)
    return {
        "loop": LoopConfig(batch_size=batch * accumulate, micro_batch=batch, precision="bf16", device="cpu", log_every=2),
        "schedule": ScheduleConfig(epochs=-(-steps // per_epoch), warmup_epochs=1),
        "checkpoint": CheckpointConfig(every_steps=1, keep=2),
        "sparsity": dynamic() if kind == "dynamic" else learned(),
        "ema": EmaConfig(decay=0.9 if kind == "dynamic" else None),
    }


def config_of(folder, kind: str, accumulate: int, steps: int = 30) -> TrainConfig:
    # The tests build the tiny network themselves, so the file to start from need not exist.
    return make_config(folder, model=ModelConfig(weights="given"), **settings_of(kind, accumulate, steps))


# Two epochs, in which the masks move three times.
CASES = [("dynamic", 3, 14)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in (("dynamic", 1, 30), ("dynamic", 3, 30))]
CASES += [pytest.param("semi_structured", 1, 30, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "accumulate", "steps"), CASES, ids=lambda value: str(value))
def test_resuming_after_every_step_is_exact(kind: str, accumulate: int, steps: int, tmp_path) -> None:
    """The run stops after every single step and is resumed by a new trainer."""
    whole = make_trainer(config_of(tmp_path / "whole", kind, accumulate, steps))
    whole.run()
    assert whole.progress.step >= steps
    config = config_of(tmp_path / "cut", kind, accumulate, steps)
    for step in range(1, whole.progress.step + 1):
        with pytest.raises(Killed):
            make_trainer(config, reporter=KillAt(step)).run()
        # The state is that of the step before; the last step is repeated.
        newest = make_trainer(config).store.load_latest()
        assert (newest["progress"]["step"] if newest else 0) == step - 1
        resumed = make_trainer(config, reporter=KillAt(step + 1))
        if step < whole.progress.step:
            with pytest.raises(Killed):
                resumed.run()
        else:
            resumed.run()
    last = make_trainer(config)
    last.run()
    assert states_equal(last.state(), whole.state())
    rows = [without_timings(read_metrics(trainer.context.folder.metrics)) for trainer in (last, whole)]
    assert rows[0] == rows[1]


def test_masks_hold_and_move_during_a_run(tmp_path) -> None:
    trainer = make_trainer(config_of(tmp_path, "dynamic", 3))
    trainer.run()
    controller = trainer.sparsity.controller
    assert controller.step == trainer.progress.step and controller.config.total_steps == trainer.length.steps
    assert controller.config.seed == trainer.config.seed
    assert controller.updates == 8  # every third step, up to three quarters of 35
    weights, averages = dict(trainer.model.named_parameters()), dict(trainer.average.module.named_parameters())
    for name, mask in controller.masks.items():
        assert not weights[name][~mask].any() and not averages[name][~mask].any()
    assert set(controller.masks) == {"conv.weight", "head.weight"}
    rows = without_timings(read_metrics(trainer.context.folder.metrics))
    assert rows[-1]["mask_updates"] == 8 and rows[-1]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert all("sparsity" in row for row in rows)


def test_learned_masks_leave_the_weights_and_move_the_logits(tmp_path) -> None:
    trainer = make_trainer(config_of(tmp_path, "semi_structured", 1))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run()
    after = trainer.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and all("logits" in name for name in moved)
    assert all(group["weight_decay"] == 0 for group in trainer.components.trained.optimizer.param_groups)
    plain = trainer.sparsity.finished(trainer.model)
    assert list(plain.state_dict()) == list(TinyNet().state_dict())
    assert (plain.head.weight.view(-1, 4).count_nonzero(dim=1) <= 2).all()
    assert without_timings(read_metrics(trainer.context.folder.metrics))[-1]["mask_entropy"] > 0


def test_a_run_cannot_change_its_sparsity(tmp_path) -> None:
    config = config_of(tmp_path, "dynamic", 3)
    with pytest.raises(Killed):
        make_trainer(config, reporter=KillAt(3)).run()
    with pytest.raises(RunFolderError, match=r"sparsity\.dynamic\.sparsity: 0\.5 there, 0\.6 now"):
        make_trainer(replace(config, sparsity=dynamic(sparsity=0.6)))
    with pytest.raises(RunFolderError, match=r"sparsity\.method: 'dynamic' there, 'none' now"):
        make_trainer(replace(config, sparsity=SparsityConfig()))
    trainer = make_trainer(replace(config, output=str(tmp_path / "other"), sparsity=SparsityConfig()))
    state = make_trainer(config).store.load_latest()
    with pytest.raises(CheckpointError, match=r"saved with sparsity\.method 'dynamic', but is resumed with 'none'"):
        trainer.load_state(state)


def test_runs_from_before_sparsity_resume(tmp_path) -> None:
    config = make_config(tmp_path)
    with pytest.raises(Killed):
        make_trainer(config, reporter=KillAt(3)).run()
    folder = RunFolder(tmp_path)
    text = folder.config.read_text()
    folder.config.write_text(text[: text.index("sparsity:")])
    resumed = make_trainer(config)
    state = resumed.store.load_latest()
    del state["sparsity"]
    resumed.load_state(state)


def test_the_old_name_of_semi_structured_sparsity_is_read(tmp_path) -> None:
    """In their settings and training states, semi-structured sparsity is called 2:4."""
    config = config_of(tmp_path / "old", "semi_structured", 1)
    with pytest.raises(Killed):
        make_trainer(config, reporter=KillAt(3)).run()
    file = RunFolder(tmp_path / "old").config
    text = file.read_text()
    assert text.count("method: semi_structured") == 1
    file.write_text(text.replace("method: semi_structured", "method: '2:4'"))
    resumed = make_trainer(config)
    state = resumed.store.load_latest()
    assert state["sparsity"]["kind"] == "semi_structured"
    state["sparsity"]["kind"] = "2:4"
    resumed.load_state(state)
    assert resumed.progress.step == 2
    settings = config.to_dict()
    old = {**settings, "sparsity": {**settings["sparsity"], "method": "2:4"}}
    for other in (old, settings):
        RunFolder(tmp_path / "old").check_own({"settings": old}, other)
    plain = restore_learned(TinyNet(), state["model"], state["sparsity"])
    assert list(plain.state_dict()) == list(TinyNet().state_dict())


def test_masks_from_a_file(tmp_path) -> None:
    first = make_trainer(config_of(tmp_path / "a", "dynamic", 3, 14))
    first.run()
    save_masks(first.sparsity.masks(), tmp_path / "masks.safetensors")
    sparsity = replace(dynamic(growth="none"), masks=str(tmp_path / "masks.safetensors"))
    second = make_trainer(replace(config_of(tmp_path / "b", "dynamic", 3, 14), sparsity=sparsity))
    second.run()
    saved = load_masks(tmp_path / "masks.safetensors")
    assert all(torch.equal(mask, saved[name]) for name, mask in second.sparsity.masks().items())
    missing = replace(sparsity, masks=str(tmp_path / "missing.safetensors"))
    with pytest.raises(CheckpointError, match="is not a readable mask file"):
        make_trainer(replace(config_of(tmp_path / "c", "dynamic", 3, 14), sparsity=missing))


def test_settings_that_contradict_each_other(tmp_path) -> None:
    with pytest.raises(ConfigError, match="must be one of 'none', 'dynamic', 'semi_structured'"):
        SparsityConfig("dynamics")
    with pytest.raises(ConfigError, match="use method dynamic"):
        SparsityConfig(masks="x")
    with pytest.raises(ConfigError, match="needs no training"):
        SparsityConfig("semi_structured", semi_structured=SemiStructuredConfig())
    with pytest.raises(ConfigError, match="learns masks for trained weights"):
        TrainConfig(sparsity=learned())
    with pytest.raises(ConfigError, match=r"ema\.decay is 0\.9, but weights do not change while 2:4 masks are learned"):
        TrainConfig(sparsity=learned(), ema=EmaConfig(0.9), model=ModelConfig(weights="x"))
    with pytest.raises(ArgumentError, match="matches no parameter"):
        make_trainer(replace(config_of(tmp_path, "dynamic", 1), sparsity=dynamic(layers=["nothing*"])))


def test_sparsity_settings_that_a_run_saves(tmp_path) -> None:
    dense = make_config(tmp_path).to_dict()
    assert dense["sparsity"] == {"method": "none"}
    assert set(make_config(tmp_path, sparsity=dynamic()).to_dict()["sparsity"]) == {"method", "dynamic", "masks"}
    json.dumps(make_config(tmp_path, sparsity=dynamic(block=(3, 3), layers=["*"])).to_dict())
