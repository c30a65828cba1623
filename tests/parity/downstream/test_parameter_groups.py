"""Share of the learning rate and weight decay of every parameter, as the official optimizers of D4 and D5 set them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.parity.downstream.reference import folder, manifest
from tests.parity.downstream.test_manifests import network
from widekernel.engine.optimization_config import OptimizerConfig
from widekernel.engine.parameter_groups import parameter_groups
from widekernel.models.layouts.conversion import to_official

MANIFESTS = {
    "convnext_tiny_ade": "upernet_convnext_tiny_ade",
    "convnext_tiny_coco": "cascade_convnext_tiny",
    "slak_tiny_ade": "upernet_slak_tiny_ade",
    "slak_tiny_ade_80k": "upernet_slak_tiny_ade",
    "replknet31b_fcos": "fcos_replknet31b",
}


def official_names(model: nn.Module) -> dict[str, str]:
    """Fill every tensor of a network with its number, and return the official name for each of ours."""
    own = list(model.state_dict())
    numbered = {}
    for number, (name, value) in enumerate(model.state_dict().items()):
        one = torch.full((1,) * value.ndim, float(number))
        numbered[name] = one.expand(value.shape)
    model.load_state_dict(numbered, assign=True)
    return {own[int(value.reshape(-1)[0])]: name for name, value in to_official(model).items()}


def found_options(model: nn.Module, config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """Return share of the learning rate and weight decay of each parameter, by its official name."""
    names = official_names(model)
    ours = {id(parameter): names[name] for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    return {
        ours[id(parameter)]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def expected_options(row: dict[str, Any], names: set[str]) -> dict[str, tuple[float, float]]:
    if "groups" in row:
        return {name: (group["lr_scale"], group["weight_decay"]) for group in row["groups"] for name in group["params"]}
    return {name: (1.0, 0.0 if name in row["no_decay"] else row["weight_decay"]) for name in names}


def settings(row: dict[str, Any]) -> OptimizerConfig:
    rule = row["paramwise_cfg"]
    if "decay_type" not in rule:
        return OptimizerConfig(lr=row["lr"], weight_decay=row["weight_decay"], decayed="all_but_batch_norms")
    groups: Any = f"{rule['decay_type']}{rule['num_layers']}"
    rate = rule["decay_rate"]
    return OptimizerConfig(lr=row["lr"], weight_decay=row["weight_decay"], layer_decay=rate, layer_groups=groups)


@pytest.mark.parametrize("name", MANIFESTS)
def test_groups_equal_the_official_ones(name: str, shared: Path) -> None:
    rows = json.loads((folder(shared) / "golden" / "param_groups.json").read_text())
    row = next(row for row in rows if row["name"] == name)
    assert {row["name"] for row in rows} == set(MANIFESTS)
    with torch.device("meta"):
        model = network(manifest(shared, MANIFESTS[name])["config"])
    found = found_options(model, settings(row))
    expected = expected_options(row, set(found))
    assert len(found) == row["parameters"] and found.keys() == expected.keys()
    for key, (share, decay) in expected.items():
        assert found[key] == (pytest.approx(share, rel=1e-12), decay), key
    if "decayed_1d" in row:
        assert set(row["no_decay"]) | set(row["decayed_1d"]) <= found.keys()
