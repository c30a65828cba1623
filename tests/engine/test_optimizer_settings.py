"""Groups of parameters and their weight decay, settings of optimizers, and the course of the learning rate."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from widekernel.engine.optimization import create_optimizer
from widekernel.engine.optimization_config import OptimizerConfig, ScheduleConfig
from widekernel.engine.reporter import RunLength
from widekernel.engine.schedule import create_schedule
from widekernel.errors import ConfigError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 2)


def decays(model: nn.Module, **settings: object) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer(model, OptimizerConfig(weight_decay=0.1, **settings))
    found = {names[id(each)]: group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert found.keys() == set(names.values())
    return found


def test_weight_decay_of_norms_and_biases() -> None:
    weights = {"conv.weight": 0.1, "head.weight": 0.1}
    vectors = {"scale": 0.0, "conv.bias": 0.0, "head.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0}
    assert decays(Small()) == {**weights, **vectors}
    of_norms = {"norm.weight": 0.02, "norm.bias": 0.02}
    assert decays(Small(), norm_weight_decay=0.02) == {**weights, **vectors, **of_norms}
    of_biases = {"conv.bias": 0.03, "head.bias": 0.03, "norm.bias": 0.03}
    assert decays(Small(), bias_weight_decay=0.03) == {**weights, **vectors, **of_biases}
    both = decays(Small(), norm_weight_decay=0.02, bias_weight_decay=0.03)
    assert both == {**weights, **vectors, **of_norms, **of_biases}


def test_weight_decay_takes_effect() -> None:
    model = Small()
    optimizer = create_optimizer(model, OptimizerConfig(name="momentum", lr=0.5, weight_decay=0.0, norm_weight_decay=0.2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.9 if name.startswith("norm") else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


@pytest.mark.parametrize("name", ["shiftwise_nano", "unireplknet_nano"])
def test_response_norms_decay_if_wanted(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    usual, official = decays(model), decays(model, decay_response_norms=True)
    changed = {name for name in usual if usual[name] != official[name]}
    assert changed == {name for name in usual if ".grn." in name or "mlp.norm." in name}
    assert changed
    assert {official[name] for name in changed} == {0.1}


def test_frozen_parameters_are_left_out() -> None:
    model = Small()
    model.conv.requires_grad_(False)
    optimizer = create_optimizer(model, OptimizerConfig(norm_weight_decay=0.02))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5


def test_own_decays_with_layer_groups() -> None:
    model = timm.create_model("test_convnext", num_classes=3)
    config = OptimizerConfig(lr=1.0, layer_decay=0.5, norm_weight_decay=0.02, weight_decay=0.1)
    plain = create_optimizer(model, OptimizerConfig(lr=1.0, layer_decay=0.5, weight_decay=0.1))
    scales = {id(each): group["lr_scale"] for group in plain.param_groups for each in group["params"]}
    optimizer = create_optimizer(model, config)
    found = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    assert {key: group["lr_scale"] for key, group in found.items()} == scales
    assert found[id(model.head.norm.weight)]["weight_decay"] == 0.02
    assert found[id(model.head.fc.weight)]["weight_decay"] == 0.1


def test_twelve_groups_need_such_a_network() -> None:
    with pytest.raises(ConfigError, match=r"ResNet is not built like ConvNeXt: it has the parameter 'conv1"):
        create_optimizer(timm.create_model("test_resnet"), OptimizerConfig(layer_decay=0.5, layer_groups="convnext12"))
    with pytest.raises(ConfigError, match=r"set optimizer.layer_decay"):
        OptimizerConfig(layer_groups="convnext12")


@pytest.mark.parametrize(("name", "nesterov"), [("sgd", True), ("momentum", False)])
def test_momentum_of_sgd(name: str, nesterov: bool) -> None:
    assert create_optimizer(Small(), OptimizerConfig(name=name)).defaults["momentum"] == 0.9
    optimizer = create_optimizer(Small(), OptimizerConfig(name=name, momentum=0.8))
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.8, nesterov)


def test_rmsprop_of_torchvisions_training_script() -> None:
    config = OptimizerConfig(name="rmsprop", momentum=0.7, eps=0.0316)
    optimizer = create_optimizer(Small(), config)
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert [optimizer.defaults[key] for key in ("alpha", "eps", "momentum")] == [0.9, 0.0316, 0.7]


@pytest.mark.parametrize(
    ("name", "setting", "value"), [("adamw", "momentum", 0.8), ("sgd", "betas", (0.9, 0.99)), ("sgd", "eps", 1e-6)]
)
def test_settings_that_an_optimizer_lacks_are_refused(name: str, setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer.{setting} is .*, but the optimizer '{name}' has no {setting}"):
        create_optimizer(Small(), OptimizerConfig(name=name, **{setting: value}))


def test_parameters_that_are_not_weights_do_not_decay() -> None:
    config = OptimizerConfig(layer_decay=0.5, layer_groups="convnext12", weight_decay_end=0.2, norm_weight_decay=0.3)
    optimizer = create_optimizer([nn.Parameter(torch.ones(3, 3))], config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


# -- course of the learning rate -------------------------------------------------------------------------------------

LENGTH = RunLength(70, 7)


def rates(config: ScheduleConfig, lr: float = 0.5, length: RunLength = LENGTH) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = create_schedule(optimizer, config, length)
    found = []
    for step in range(length.steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_default_course_is_timms_bit_for_bit() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    timms = CosineLRScheduler(
        optimizer, t_initial=56, lr_min=0.01, warmup_t=14, warmup_lr_init=0.1, warmup_prefix=True, t_in_epochs=False
    )
    expected = []
    for step in range(70):
        timms.step_update(step)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(ScheduleConfig(epochs=10, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01), 0.3) == expected


def test_steps() -> None:
    found = rates(ScheduleConfig(epochs=10, warmup_epochs=1, kind="step", decay_epochs=3, gamma=0.5, min_lr=0.1))
    expected = [0.5] * 21 + [0.25] * 21 + [0.125] * 21
    assert found[7:] == pytest.approx(expected, abs=1e-15)
    low = rates(ScheduleConfig(epochs=10, warmup_epochs=0, kind="step", decay_epochs=2, gamma=0.5, min_lr=0.2))
    assert min(low) == 0.2 == low[-1]


def test_steps_equal_those_of_pytorch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    expected = []
    for _ in range(10):
        expected += [optimizer.param_groups[0]["lr"]] * 7
        optimizer.step()
        theirs.step()
    config = ScheduleConfig(epochs=10, warmup_epochs=0, kind="step", decay_epochs=3, gamma=0.1, min_lr=0.0)
    assert rates(config, 1.0) == pytest.approx(expected, rel=1e-12)


def test_exponential() -> None:
    found = rates(ScheduleConfig(epochs=10, warmup_epochs=0, kind="exponential", decay_epochs=2, gamma=0.5, min_lr=0.0))
    assert found == pytest.approx([0.5 * 0.5 ** (step / 14) for step in range(70)], rel=1e-12)
    staircase = rates(ScheduleConfig(epochs=10, warmup_epochs=0, kind="step", decay_epochs=1, gamma=0.9, min_lr=0.0))
    assert staircase == pytest.approx([0.5 * 0.9 ** (step // 7) for step in range(70)], rel=1e-12)


def test_constant() -> None:
    assert set(rates(ScheduleConfig(epochs=10, warmup_epochs=0, kind="constant", min_lr=0.7))) == {0.5}


def test_kinds_of_warmup() -> None:
    def first(kind: str, **changes: object) -> list[float]:
        config = ScheduleConfig(epochs=10, warmup_steps=5, warmup_lr=0.1, warmup_kind=kind, kind="constant", **changes)
        return rates(config)[:7]

    assert first("linear") == pytest.approx([0.1, 0.18, 0.26, 0.34, 0.42, 0.5, 0.5])
    assert first("linspace") == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert first("constant") == pytest.approx([0.1] * 5 + [0.5] * 2)


def test_warmup_of_one_step() -> None:
    assert rates(ScheduleConfig(epochs=10, warmup_steps=1, warmup_kind="linspace", kind="constant"))[:2] == [0.0, 0.5]


def test_weight_decay_follows_half_a_cosine() -> None:
    model = Small()
    config = OptimizerConfig(weight_decay=0.1, weight_decay_end=0.4, norm_weight_decay=0.02)
    optimizer = create_optimizer(model, config)
    schedule = create_schedule(optimizer, ScheduleConfig(epochs=10, warmup_epochs=2), LENGTH, config)
    for step in range(70):
        schedule.step_update(step)
        wanted = 0.4 - 0.3 * 0.5 * (1 + math.cos(math.pi * step / 70))
        found = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
        assert found[id(model.conv.weight)] == pytest.approx(wanted, abs=1e-12)
        assert found[id(model.norm.weight)] == 0.02
        assert found[id(model.scale)] == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "polynomial"}, "schedule.kind 'polynomial' is unknown"),
        ({"gamma": 0.0}, "schedule.gamma is 0.0, but must be above 0"),
        ({"decay_epochs": 0.0}, "schedule.decay_epochs is 0.0, but must be positive"),
        ({"warmup_kind": "cosine"}, "schedule.warmup_kind 'cosine' is unknown"),
        ({"warmup_kind": "constant"}, "the warm-up would train nothing"),
        ({"lr_scale_batch": 0}, "schedule.lr_scale_batch is 0, but must be positive"),
    ],
)
def test_wrong_schedules(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, "optimizer.momentum is 1.0, but must be from 0 to below 1"),
        ({"norm_weight_decay": -1.0}, "optimizer.norm_weight_decay is -1.0, but must be 0 or more"),
        ({"weight_decay": 0.0, "weight_decay_end": 0.1}, "so nothing decays"),
        ({"weight_decay": 0.0, "decay_response_norms": True}, "so nothing decays"),
    ],
)
def test_wrong_optimizers(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)


# -- segmentation and detection --------------------------------------------------------------------------------------


class Dense(nn.Module):
    """A network with the names of one for dense prediction: a body of stages, norms of its outputs, and a head."""

    def __init__(self, blocks: int = 9) -> None:
        super().__init__()
        body = nn.Module()
        body.stem = nn.Conv2d(3, 4, 4)
        body.stages = nn.ModuleList()
        for depth in (1, 1, blocks, 1):
            stage = nn.Module()
            stage.downsample = nn.Conv2d(4, 4, 2)
            stage.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(depth))
            body.stages.append(stage)
        self.backbone = nn.Module()
        self.backbone.body = body
        self.backbone.norms = nn.ModuleList([nn.LayerNorm(4)])
        self.decode_head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))


def shares(model: nn.Module, layer_groups: str) -> dict[str, float]:
    """Return the share of the learning rate of each weight by name, as a number of layers from the head."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer(model, OptimizerConfig(layer_decay=0.5, layer_groups=layer_groups))
    found = {names[id(each)]: group["lr_scale"] for group in optimizer.param_groups for each in group["params"]}
    return {name: -math.log2(share) for name, share in found.items() if name.endswith("weight")}


def test_layer_groups_by_stage() -> None:
    found = shares(Dense(), "stage_wise12")
    stages = {f"backbone.body.stages.{stage}.blocks.0.weight": 12 - stage for stage in range(4)}
    down = {f"backbone.body.stages.{stage}.downsample.weight": 13 for stage in range(4)}
    head = {"backbone.norms.0.weight": 0, **{f"decode_head.{number}.weight": 0 for number in range(3)}}
    expected = {"backbone.body.stem.weight": 13, **stages, **down, **head}
    assert {name: found[name] for name in expected} == expected


def test_layer_groups_by_layer() -> None:
    found = shares(Dense(), "layer_wise6")
    assert [found[f"backbone.body.stages.2.blocks.{number}.weight"] for number in range(9)] == [4, 4, 4, 3, 3, 3, 2, 2, 2]
    assert [found[f"backbone.body.stages.{stage}.downsample.weight"] for stage in range(4)] == [6, 5, 4, 1]
    assert found["backbone.body.stem.weight"] == 7 and found["backbone.norms.0.weight"] == 0
    for kind in ("layer_wise6", "stage_wise6"):
        with pytest.raises(ConfigError, match="is not built like ConvNeXt of this depth: it has the parameter 'conv1"):
            shares(timm.create_model("test_resnet"), kind)
    with pytest.raises(ConfigError, match=r"layer_wise6'.*stages.2.blocks.9"):
        shares(Dense(10), "layer_wise6")
    assert shares(Dense(18), "layer_wise9")["backbone.body.stages.2.blocks.17.weight"] == 2


def test_groups_by_layer_are_those_of_fine_tuning() -> None:
    with torch.device("meta"):
        model = timm.create_model("convnext_small")
    assert shares(model, "layer_wise12") == shares(model, "convnext12")


def test_everything_but_batch_norms_decays() -> None:
    found = decays(Dense(), decayed="all_but_batch_norms")
    without = {name for name, decay in found.items() if decay == 0}
    assert without == {f"decode_head.{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")}
    assert set(found.values()) == {0.0, 0.1}
    with pytest.raises(ConfigError, match="decides what decays"):
        OptimizerConfig(decayed="all_but_batch_norms", bias_weight_decay=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"power": 0.9}, "schedule.power is 0.9.*set it to poly"),
        ({"kind": "multistep"}, r"set it, such as to \[8, 11\]"),
        ({"kind": "multistep", "milestones": (27.0, 33.0), "epochs": 33}, "the run ends before the last one"),
        ({"kind": "multistep", "milestones": (11.0, 8.0)}, "each later than the one before"),
        ({"warmup_factor": 1e-6, "warmup_lr": 1e-5}, "schedule.warmup_lr is 1e-05, which schedule.warmup_factor"),
        ({"warmup_factor": 1e-6, "warmup_kind": "linspace"}, "schedule.warmup_kind is 'linspace', which"),
        ({"warmup_factor": 0.0}, "schedule.warmup_factor is 0.0"),
    ],
)
def test_courses_that_contradict_themselves_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**settings)
