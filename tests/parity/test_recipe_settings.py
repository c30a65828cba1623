"""Optimizer groups and schedules of the published recipes."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from widekernel.engine.optimization import create_optimizer
from widekernel.engine.optimization_config import OptimizerConfig, ScheduleConfig
from widekernel.engine.reporter import RunLength
from widekernel.engine.schedule import create_schedule
from widekernel.models.layouts.registry import layouts_of

NETWORKS = {"slak_tiny": "slak_tiny", "replknet31b": "replknet_31b"}


def settings_by_name(model: nn.Module, config: OptimizerConfig) -> dict[str, tuple[float, bool]]:
    """Return the scale of the learning rate and whether weight decay applies, for each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = create_optimizer(model, config).param_groups
    return {names[id(each)]: (group["lr_scale"], group["weight_decay"] > 0) for group in groups for each in group["params"]}


@pytest.mark.parametrize("case", NETWORKS)
def test_twelve_groups(golden: Path, case: str) -> None:
    """Scale and weight decay of every parameter equal those of the official code."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = timm.create_model(NETWORKS[case])
    found = settings_by_name(model, OptimizerConfig(layer_decay=0.7, layer_groups="convnext12"))
    layout = layouts_of(model)[0]
    ours = {layout.to_official(name)[0]: value for name, value in found.items()}
    rows = json.loads((golden / "layer_decay.json").read_text())[case]["params"]
    assert {name for name, *_ in rows} == ours.keys()
    for name, layer, scale, decays in rows:
        assert ours[name][0] == pytest.approx(scale, rel=1e-12), name
        assert ours[name][0] == pytest.approx(0.7 ** (13 - layer), rel=1e-12), name
        assert ours[name][1] == decays, name


def test_twelve_groups_of_timms_convnext(golden: Path) -> None:
    """timm's ConvNeXt has other names; groups are compared by stage, block and kind of parameter."""
    with torch.device("meta"):
        model = timm.create_model("convnext_tiny")
    found = settings_by_name(model, OptimizerConfig(layer_decay=0.7, layer_groups="convnext12"))
    rows = json.loads((golden / "layer_decay.json").read_text())["convnext_tiny"]["params"]
    expected = {name: (scale, decays) for name, _, scale, decays in rows}
    parts = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
    renamed = {}
    for name, value in found.items():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        name = name.replace(".blocks", "").replace("stem.", "downsample_layers.0.")
        for stage in range(4):
            name = name.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}")
        renamed[name.replace("head.norm", "norm").replace("head.fc", "head")] = value
    assert renamed.keys() == expected.keys()
    for name, (scale, decays) in expected.items():
        assert renamed[name] == (pytest.approx(scale, rel=1e-12), decays), name


def test_schedules(golden: Path) -> None:
    """The learning rate of every stored step equals that of the official code within 1e-12, and so does the weight decay."""
    cases = json.loads((golden / "lr_schedule.json").read_text())["schedules"]
    assert len(cases) == 7
    for case in cases:
        given = case["args"]
        length = RunLength(case["length"], given["niter_per_ep"])
        parameter = nn.Parameter(torch.zeros(2, 2))
        if case["what"].startswith("weight decay"):
            rate = ScheduleConfig(epochs=given["epochs"], warmup_epochs=0)
            decay = OptimizerConfig(weight_decay=given["base_value"], weight_decay_end=given["final_value"])
            optimizer = torch.optim.AdamW([parameter], weight_decay=given["base_value"])
            schedule, key = create_schedule(optimizer, rate, length, decay), "weight_decay"
        else:
            rate = ScheduleConfig(
                epochs=given["epochs"],
                warmup_epochs=given.get("warmup_epochs", 0),
                warmup_steps=given.get("warmup_steps"),
                warmup_kind="linspace",
                min_lr=given["final_value"],
            )
            optimizer = torch.optim.AdamW([parameter], lr=given["base_value"])
            schedule, key = create_schedule(optimizer, rate, length), "lr"
        values, stored = [], dict(case["samples"])
        for step in range(case["length"]):
            schedule.step_update(step)
            values.append(optimizer.param_groups[0][key])
            if step in stored:
                assert values[-1] == pytest.approx(stored[step], abs=1e-12), (case["what"], step)
        assert math.fsum(values) == pytest.approx(case["sum"], rel=1e-12)
