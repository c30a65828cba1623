"""Masks in checkpoints: exact resumption, and states that are refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.sparsity.nets import OPTIMIZERS, controlled, data, equal, quick, same, small_net
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


RESUMED = [
    {"init": "snip", "growth": "gradient"},
    {"init": "erk", "growth": "momentum", "prune_schedule": "cosine", "total_steps": 30},
    {"init": "uniform", "growth": "random", "block": "kernel", "share_every": 2},
    {"init": "snip", "growth": "random", "rule": "published"},
    {"init": "magnitude", "growth": "gradient", "initial_sparsity": 0.1, "total_steps": 30},
]


EVERY = range(31)
SOME = (0, 1, 2, 3, 4, 11, 12, 13, 20, 28, 29, 30)  # before, at and after updates
FEW = (2, 3, 4, 20, 30)
CASES = [
    pytest.param(
        settings,
        accumulate,
        cuts,
        id=f"{settings['init']}-{settings['growth']}-{accumulate}-{'every' if cuts is EVERY else 'some'}",
        marks=[pytest.mark.slow] if cuts is EVERY or (accumulate == 3 and number) else [],
    )
    for number, settings in enumerate(RESUMED)
    for accumulate in (1, 3)
    for cuts in (FEW if number else SOME, EVERY)
]


@pytest.mark.parametrize(("settings", "accumulate", "cuts"), CASES)
def test_resuming_after_any_step_is_exact(settings: dict, accumulate: int, cuts: Sequence[int]) -> None:
    """Runs of 30 steps under bf16 autocast, with averaging and clipping, are resumed after a step."""
    config = DynamicSparsityConfig(sparsity=0.5, update_interval=3, **settings)
    whole, states = build(config), []
    for step in range(31):
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in whole.items()}, file)
        states.append(file)
        if step < 30:
            bf16_steps(whole, step, step + 1, accumulate)
    for cut in cuts:
        states[cut].seek(0)
        saved = torch.load(states[cut], weights_only=True)
        resumed = build(config)
        for name, part in resumed.items():
            part.load_state_dict(saved[name])
        # To the end, or far enough to include an update.
        last = 30 if cut % 10 == 0 else min(cut + config.update_interval, 30)
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
    with pytest.raises(CheckpointError, match="is not a readable mask file"):
        load_masks(tmp_path / "missing.safetensors")
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is not a readable mask file"):
        load_masks(path)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"sparsity": 0.8}, "sparsity=0.5, and this controller was made with sparsity=0.8, which the state would override"),
        ({"block": "kernel"}, "block='element', and .* block='kernel'"),
        ({"block": (3, 3)}, r"block='element', and .* block=\[3, 3\]"),
        ({"rule": "published"}, "rule='exact', and .* rule='published'"),
        ({"initial_sparsity": 0.1, "total_steps": 9}, "initial_sparsity=None, and .* initial_sparsity=0.1"),
    ],
)
def test_settings_that_a_state_would_override_are_refused(settings: dict, names: str) -> None:
    saved = controlled(quick())[2].state_dict()
    controller = controlled(quick(**settings))[2]
    before = controller.masks
    with pytest.raises(CheckpointError, match=names):
        controller.load_state_dict(saved)
    assert same(controller.masks, before)


def test_settings_that_take_effect_after_loading_may_differ() -> None:
    saved = controlled(quick())[2].state_dict()
    others = {"prune_fraction": 0.1, "growth": "gradient", "update_interval": 7, "total_steps": 9, "init": "erk", "seed": 3}
    controlled(quick(**others))[2].load_state_dict(saved)
    masks = controlled(quick())[2].masks
    controlled(quick(sparsity=0.9), masks=masks)[2].load_state_dict(saved)  # the masks do not follow from this sparsity
    controlled(quick(sparsity=0.9, init="from_weights"))[2].load_state_dict(saved)
    pending = controlled(quick(init="snip"))[2].state_dict()
    controlled(quick(init="snip", sparsity=0.9))[2].load_state_dict(pending)  # nothing drawn yet
    older = {name: value for name, value in saved.items() if name != "config"}
    controlled(quick())[2].load_state_dict(older)


def test_anything_but_a_state_is_refused() -> None:
    _, _, controller = controlled(quick())
    saved = controller.state_dict()
    for strange in (None, [1], "state.pt"):
        with pytest.raises(CheckpointError, match=f"is a {type(strange).__name__}: give the dict that state_dict"):
            controller.load_state_dict(strange)
    for key in set(saved) - {"format", "config", "live_zeros"}:
        with pytest.raises(CheckpointError, match=f"lacks {key}: give everything"):
            controller.load_state_dict({name: value for name, value in saved.items() if name != key})
