"""Masks survive checkpoints."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.sparsity.nets import OPTIMIZERS, controlled, data, quick, same, small_net
from widekernel.errors import CheckpointError
from widekernel.sparsity import (
    DynamicSparsity,
    DynamicSparsityConfig,
    load_masks,
    save_masks,
)


def bf16_steps(parts: dict, first: int, last: int, accumulate: int) -> None:
    model, optimizer, average = parts["model"], parts["optimizer"], parts["average"]
    for step in range(first, last):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = data(step * 10 + part)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y) / accumulate
            loss.backward()
        parts["controller"].mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)


def build(config: DynamicSparsityConfig) -> dict:
    model = small_net().train()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    controller = DynamicSparsity(model, optimizer, config, averages=[average])
    return {"model": model, "optimizer": optimizer, "average": average, "controller": controller}


def flat(value) -> list:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [part for key in value for part in [key, *flat(value[key])]]
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in flat(item)]
    return [value]


def equal(left, right) -> bool:
    left, right = flat(left), flat(right)
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right)
    )


RESUMED = [
    {"init": "snip", "growth": "gradient"},
    {"init": "erk", "growth": "momentum", "prune_schedule": "cosine", "total_steps": 30},
    {"init": "uniform", "growth": "random", "block": "kernel", "share_every": 2},
    {"init": "snip", "growth": "random", "rule": "published"},
    {"init": "magnitude", "growth": "gradient", "initial_sparsity": 0.1, "total_steps": 30},
]


CASES = [pytest.param(settings, 1, id=f"{settings['init']}-{settings['growth']}-1") for settings in RESUMED] + [
    pytest.param(settings, 3, id=f"{settings['init']}-{settings['growth']}-3", marks=[pytest.mark.slow] if number else [])
    for number, settings in enumerate(RESUMED)
]


@pytest.mark.parametrize(("settings", "accumulate"), CASES)
def test_cut_anywhere_and_resumed(settings: dict, accumulate: int) -> None:
    """30 steps under bf16 autocast with averaging and clipping, cut after every step."""
    config = DynamicSparsityConfig(sparsity=0.5, update_interval=3, **settings)
    whole, states = build(config), []
    for step in range(31):
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in whole.items()}, file)
        states.append(file)
        if step < 30:
            bf16_steps(whole, step, step + 1, accumulate)
    for cut in range(31):
        states[cut].seek(0)
        saved = torch.load(states[cut], weights_only=True)
        resumed = build(config)
        for name, part in resumed.items():
            part.load_state_dict(saved[name])
        # to the end, or far enough to meet an update
        last = 30 if cut % 10 == 0 else min(cut + 4, 30)
        bf16_steps(resumed, cut, last, accumulate)
        states[last].seek(0)
        expected = torch.load(states[last], weights_only=True)
        assert equal({name: part.state_dict() for name, part in resumed.items()}, expected), cut


def test_masks_of_another_network_are_refused(tmp_path: Path) -> None:
    model, _, controller = controlled(quick())
    state = controller.state_dict()
    other = timm.create_model("slak_nano", num_classes=3)
    strange = DynamicSparsity(other, torch.optim.SGD(other.parameters(), 0.1), quick())
    with pytest.raises(CheckpointError, match="belong to another network"):
        strange.load_state_dict(state)
    wider, _, _ = controlled(quick())
    wider.head = nn.Linear(12, 9)
    third = DynamicSparsity(wider, torch.optim.SGD(wider.parameters(), 0.1), quick())
    with pytest.raises(CheckpointError, match=r"head.weight is \(4, 12\) in the file and \(9, 12\) here"):
        third.load_state_dict(state)
    with pytest.raises(CheckpointError, match="format 2"):
        controller.load_state_dict({**state, "format": 2})
    path = tmp_path / "masks.safetensors"
    save_masks(controller.masks, path)
    assert path.stat().st_size < 4000
    assert same(load_masks(path, model), controller.masks) and same(load_masks(path), controller.masks)
    with pytest.raises(CheckpointError, match="belong to another network"):
        load_masks(path, other)
    with pytest.raises(CheckpointError, match="is not a readable file of masks"):
        load_masks(tmp_path / "missing.safetensors")
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is not a readable file of masks"):
        load_masks(path)
