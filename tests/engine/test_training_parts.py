"""Schedule, optimizer, averaging, failures and the small files of a run."""

import json
import math

import pytest
import torch
from PIL import Image
from tests.engine.tiny import TinyNet, array_source, make_config, make_trainer
from torch import nn

from widekernel.data import AugmentConfig
from widekernel.engine import (
    EmaConfig,
    LoopConfig,
    OptimizerConfig,
    RunFolder,
    RunFolderError,
    RunLength,
    ScheduleConfig,
)
from widekernel.engine.curves import save_curves
from widekernel.engine.metrics import Metric
from widekernel.engine.metrics_log import MetricsLog, read_metrics
from widekernel.engine.optimization import create_optimizer
from widekernel.engine.schedule import create_schedule
from widekernel.errors import ConfigError, DataError, WidekernelError


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_schedule_at_every_step(layer_decay):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = create_optimizer(model, OptimizerConfig(lr=0.3, layer_decay=layer_decay))
    schedule = create_schedule(
        optimizer, ScheduleConfig(epochs=10, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01), RunLength(70, 7)
    )
    for step in range(70):
        schedule.step_update(step)
        if step < 14:
            expected = 0.1 + (0.3 - 0.1) * step / 14
        else:
            expected = 0.01 + (0.3 - 0.01) / 2 * (1 + math.cos(math.pi * (step - 14) / 56))
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group.get("lr_scale", 1.0), abs=1e-12)


def test_weight_decay_excludes_vectors_biases_and_names_of_the_model():
    model = TinyNet()
    optimizer = create_optimizer(model, OptimizerConfig(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, value in decay.items() if value == 0.1} == {"conv.weight", "head.weight"}
    assert decay.keys() == dict(model.named_parameters()).keys()


def test_layer_decay_scales_from_the_head():
    import timm

    model = timm.create_model("test_convnext", num_classes=3)
    optimizer = create_optimizer(model, OptimizerConfig(lr=1.0, layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(model.head.fc.weight)] == 1.0
    assert scale[id(model.stem[0].weight)] == min(scale.values()) < 0.1


def test_optimizer_settings_reach_the_optimizer():
    optimizer = create_optimizer(TinyNet(), OptimizerConfig(betas=(0.8, 0.7), eps=1e-5))
    assert optimizer.defaults["betas"] == (0.8, 0.7)
    assert optimizer.defaults["eps"] == 1e-5
    with pytest.raises(ConfigError, match="Did you mean 'adamw'"):
        create_optimizer(TinyNet(), OptimizerConfig(name="adamww"))


def plain(tmp_path, **changes):
    """Return settings without randomness except the order of the images."""
    augment = AugmentConfig((1.0, 1.0), (1.0, 1.0), 0.0, 0.0, None, "bilinear", 0.0, mixup=0.0, cutmix=0.0)
    return make_config(tmp_path, augment=augment, ema=EmaConfig(), optimizer=OptimizerConfig(lr=0.01), **changes)


def test_accumulation_equals_one_large_batch(tmp_path):
    class WithoutBatchStatistics(TinyNet):
        def forward(self, x):
            return self.head(self.conv(x).relu().mean((2, 3)))

    states = []
    for name, micro_batch in (("whole", None), ("parts", 4)):
        loop = LoopConfig(batch_size=12, micro_batch=micro_batch, device="cpu")
        torch.manual_seed(3)
        model = WithoutBatchStatistics()
        trainer = make_trainer(plain(tmp_path / name, loop=loop), model=model)
        trainer.run()
        assert trainer.progress.step == 9  # 42 images: the last 6 of each epoch fill no group
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-5), name


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_follows_its_formula(tmp_path, warmup):
    config = plain(tmp_path)
    object.__setattr__(config, "ema", EmaConfig(decay=0.7, warmup=warmup))
    trainer = make_trainer(config)
    expected = trainer.model.head.weight.detach().clone()
    seen = []
    update = trainer.average.update

    def watched(model, step, made):
        seen.append(model.head.weight.detach().clone())
        update(model, step, made)

    trainer.average.update = watched
    trainer.run()
    for number, weight in enumerate(seen):
        decay = min(1 - (1 + number) ** (-2 / 3), 0.7) if warmup else 0.7
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(trainer.average.module.head.weight, expected, atol=1e-6)


def test_clipping_bounds_the_gradient(tmp_path):
    config = plain(tmp_path)
    object.__setattr__(config, "optimizer", OptimizerConfig(name="sgd", lr=0.1, clip_grad=0.01, weight_decay=0.0))
    trainer = make_trainer(config)
    norms = []
    scaler = trainer.components.trained.scaler
    step = scaler.step

    def watched(optimizer):
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(optimizer)

    scaler.step = watched
    trainer.run()
    assert len(norms) == 9
    assert max(norms) <= 0.0101


def test_training_learns(tmp_path):
    trainer = make_trainer(plain(tmp_path, schedule=ScheduleConfig(epochs=12, warmup_epochs=1)))
    trainer.run()
    assert read_metrics(trainer.context.folder.metrics)[-1]["val_top1"] > 90


def test_bf16_trains(tmp_path):
    loop = LoopConfig(batch_size=12, micro_batch=4, device="cpu", precision="bf16")
    trainer = make_trainer(plain(tmp_path, loop=loop, schedule=ScheduleConfig(epochs=1, warmup_epochs=0)))
    trainer.run()
    assert all(value.dtype == torch.float32 for value in trainer.model.parameters())


def test_fp16_on_the_cpu_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fp16.*Use bf16 or fp32"):
        make_trainer(plain(tmp_path, loop=LoopConfig(batch_size=4, device="cpu", precision="fp16")))


def test_too_few_images(tmp_path):
    with pytest.raises(DataError, match="11 images, but one optimizer step takes 12"):
        make_trainer(plain(tmp_path), source=array_source(11))


def test_metrics_can_be_cut_back_and_never_repeat(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate(0)
    for step in range(4):
        log.append({"step": step})
    with log.path.open("ab") as file:
        file.write(b'{"step": 4, "tr')  # torn by a crash
    assert [row["step"] for row in read_metrics(log.path)] == [0, 1, 2, 3]
    again = MetricsLog(log.path)
    again.truncate(3)
    again.append({"step": "new"})
    assert [row["step"] for row in read_metrics(log.path)] == [0, 1, 2, "new"]
    with pytest.raises(WidekernelError, match="has 4 rows, but the training state was saved after 9"):
        MetricsLog(log.path).truncate(9)


def test_every_row_has_epoch_step_and_loss(tmp_path):
    trainer = make_trainer(plain(tmp_path))
    losses = []
    add = trainer.step.meter.add
    trainer.step.meter.add = lambda parts: (losses.append(sum(map(float, parts.values()))), add(parts))
    trainer.run()
    rows = read_metrics(trainer.context.folder.metrics)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (1, 3), (2, 4), (2, 6), (3, 8), (3, 9)]
    assert [row["step"] for row in rows if "val_top1" in row] == [3, 6, 9]
    spans = [(0, 2), (2, 3), (3, 4), (4, 6), (6, 8), (8, 9)]
    means = [sum(losses[first:last]) / (last - first) for first, last in spans]
    assert [row["train_loss"] for row in rows] == pytest.approx(means)


@pytest.mark.parametrize("write", [lambda path: MetricsLog(path).append({}), lambda path: save_curves([], (), path)])
def test_files_that_cannot_be_written_are_explained(tmp_path, write):
    (tmp_path / "blocked").mkdir()
    with pytest.raises(WidekernelError, match=r"blocked cannot be written: Is a directory\. Free some space"):
        write(tmp_path / "blocked")


def test_run_folder_names_the_differing_keys(tmp_path):
    folder = RunFolder(tmp_path)
    folder.prepare({"a": {"b": 1, "c": [1, 2]}, "output": "x", "data": {"workers": 1}})
    folder.begin()
    MetricsLog(folder.metrics).append({"step": 1})
    folder.prepare({"a": {"b": 1, "c": (1, 2)}, "output": "y", "data": {"workers": 4}})
    with pytest.raises(RunFolderError) as caught:
        folder.prepare({"a": {"b": 2, "c": [1, 2]}, "data": {"workers": 1}, "d": None})
    assert "a.b: 1 there, 2 now" in str(caught.value)
    assert "a.c" not in str(caught.value)


def test_settings_that_alter_no_result_may_change(tmp_path):
    folder = RunFolder(tmp_path)
    config = make_config(tmp_path).to_dict()
    folder.prepare(config)
    folder.begin()
    MetricsLog(folder.metrics).append({"step": 1})
    data = {**config["data"], "max_unreadable": 7, "download": True, "root": "elsewhere"}
    folder.prepare({**config, "data": data, "checkpoint": {"every_epochs": 3, "every_steps": 5, "keep": 9}})


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\x00"])
def test_damaged_config(tmp_path, content):
    folder = RunFolder(tmp_path)
    folder.config.write_text(content)
    with pytest.raises(RunFolderError, match=r"config\.yaml"):
        folder.prepare({"a": 1})


def test_summary_round_trip(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_summary() is None
    folder.write_summary({"val_top1": 50.0})
    assert folder.read_summary() == json.loads(folder.summary.read_text()) == {"val_top1": 50.0}
    assert folder.read_summary(["val_top1"]) is not None
    for content, reason in (("{", "line 1"), ("{}", "it lacks val_top1"), ("[]", "it lacks a mapping"), ("3", "mapping")):
        folder.summary.write_text(content)
        with pytest.raises(RunFolderError, match=f"damaged.*{reason}"):
            folder.read_summary(["val_top1"])
    folder.summary.unlink()
    folder.summary.mkdir()
    with pytest.raises(WidekernelError, match=r"summary\.json cannot be written: Is a directory"):
        folder.write_summary({})


@pytest.mark.parametrize("rows", [[], [{"step": 1, "train_loss": 2.0, "lr": 0.1}]])
def test_curves_of_short_runs(tmp_path, rows):
    save_curves(rows, (), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("value", "best", "expected"),
    [(1.0, None, True), (2.0, 1.0, True), (1.0, 1.0, False), (1.0, math.nan, True), (math.nan, 1.0, False),
     (math.nan, None, False), (math.nan, math.nan, False)],
)  # fmt: skip
def test_nan_is_worse_than_anything(value, best, expected):
    assert Metric("m", "m").is_better(value, best) is expected
    assert Metric("m", "m", larger_is_better=False).is_better(-value, None if best is None else -best) is expected
