"""Checkpoints and the index tables of Shift-wise and shuffled kernels: generated, read, written and validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import widekernel
from tests.models.checkpoints import (
    TABLES,
    assert_content_refused,
    load_content,
    logits,
    state_of,
)
from tests.models.zoo import alive, assert_same_state, create
from widekernel.errors import CheckpointError

WITH_TABLES = ["shiftwise_nano", "shiftwise_v1_nano", "slak_pw_nano", "slak_pw_nano_truncated"]


def _tables(state: dict[str, Tensor]) -> list[str]:
    return [key for key in state if key.endswith(TABLES)]


@pytest.mark.parametrize("name", WITH_TABLES)
def test_missing_tables_are_generated(name: str, tmp_path: Path) -> None:
    model, other = alive(name), create(name)
    state = state_of(model, tmp_path, "native")
    tables = _tables(state)
    for key in tables:
        other.state_dict()[key].zero_()
    report = load_content(other, tmp_path, {key: value for key, value in state.items() if key not in tables})
    assert sorted(report.generated) == sorted(tables)
    assert not set(report.loaded) & set(tables)
    assert not report.missing
    assert all(key in str(report) for key in tables)
    assert_same_state(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["shiftwise_nano", "shiftwise_v1_nano"])
def test_official_files_restore_their_tables(name: str, tmp_path: Path) -> None:
    """The file's tables replace those of this network, because the authors' code generates them with the network."""
    model, other = alive(name), create(name)
    for key in _tables(other.state_dict()):
        other.state_dict()[key].zero_()
    report = load_content(other, tmp_path, {"model": state_of(model, tmp_path, "official")})
    assert sorted(report.generated) == sorted(_tables(dict(model.state_dict())))
    assert_same_state(other.state_dict(), model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", ["shiftwise_nano", "shiftwise_v1_nano"])
def test_altered_tables_cannot_be_saved_in_the_official_layout(name: str, table: str, tmp_path: Path) -> None:
    model = create(name)
    key = next(key for key in model.state_dict() if key.endswith(table))
    value = model.state_dict()[key]
    value.copy_(value.flip(-1).clone())
    with pytest.raises(CheckpointError, match=rf"{key} is not the table .*save with layout='native'"):
        widekernel.save_checkpoint(model, tmp_path / "a.pth", layout="official")
    assert not list(tmp_path.iterdir())


def _set_first(value: int) -> Any:
    def change(table: Tensor) -> Tensor:
        table.view(-1)[0] = value
        return table

    return change


INVALID_TABLES = {
    "below": _set_first(-1),
    "far_above": _set_first(10_000),
    "float": lambda table: table.double(),
    "one_number": lambda table: table.view(-1)[0].clone(),
    "sparse": lambda table: table.to_sparse(),
}


@pytest.mark.parametrize("change", INVALID_TABLES)
@pytest.mark.parametrize("table", ["source.tile_at", "source.centre", "selected", "ghosts"])
def test_invalid_tables_are_refused(table: str, change: str, tmp_path: Path) -> None:
    model = alive("shiftwise_nano")
    state = state_of(model, tmp_path, "native")
    key = [key for key in state if key.endswith(table)][-1]
    state[key] = INVALID_TABLES[change](state[key].clone())
    message = assert_content_refused(model, tmp_path, state, "does not fit the ShiftWise; nothing was loaded")
    assert [line.split()[0] for line in message.splitlines()[1:]] == [key]


@pytest.mark.parametrize("name", WITH_TABLES)
def test_tile_in_two_slots_is_refused(name: str, tmp_path: Path) -> None:
    model = alive(name)
    state = state_of(model, tmp_path, "native")
    key = [key for key in state if key.endswith("tile_at")][-1]
    state[key] = state[key].clone()
    state[key][..., 0, 0] = state[key][..., 0, 1]
    assert_content_refused(model, tmp_path, state, rf"nothing was loaded:\n  {key} is not made of permutations$")


@pytest.mark.parametrize("folded", [False, True], ids=["training", "folded"])
def test_channels_in_both_tables_are_refused(folded: bool, tmp_path: Path) -> None:
    model = alive("shiftwise_nano")
    model = widekernel.fold(model) if folded else model
    state = state_of(model, tmp_path, "native")
    key = next(key for key in state if key.endswith("mixer.ghosts"))
    worked = state[key.replace("ghosts", "selected")]
    assert_content_refused(
        model, tmp_path, {**state, key: worked[: state[key].numel()].clone()}, f"{key} names channels of the other"
    )
    outside = key.replace("ghosts", "selected")
    assert_content_refused(
        model, tmp_path, {**state, outside: worked + 16}, rf"{outside} must name different channels of 0\.\.15"
    )


def test_folded_kernels_with_other_anchors_are_refused(tmp_path: Path) -> None:
    model = widekernel.fold(alive("shiftwise_nano"))
    state = state_of(widekernel.fold(alive("shiftwise_nano")), tmp_path, "native")
    key = next(key for key in state if key.endswith("anchor_table"))
    moved = state[key].clone()
    moved[0, 0] -= 1
    assert_content_refused(
        model, tmp_path, {**state, key: moved}, rf"{key} is \[\[0, 15\], .* but the anchors here are \[\(1, 15\)"
    )
    assert load_content(model, tmp_path, state).layout == "native"


def test_tables_of_another_integer_type_are_converted(tmp_path: Path) -> None:
    """Former versions saved them as int16."""
    model, other = alive("shiftwise_nano"), create("shiftwise_nano")
    state = state_of(model, tmp_path, "native")
    report = load_content(other, tmp_path, {**state, **{key: state[key].to(torch.int16) for key in _tables(state)}})
    assert report.notes == ("converted int16 to int32",)
    assert_same_state(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["shiftwise_nano", "shiftwise_v1_nano", "slak_pw_nano", "slak_pw_nano_truncated"])
def test_altered_tables_round_trip(name: str, tmp_path: Path) -> None:
    model, other = alive(name), create(name)
    before = logits(model)
    for key, value in model.state_dict().items():
        if key.endswith(("tile_at", "centre")):
            value.copy_(value.flip(-1).clone())
    altered = logits(model)
    assert not torch.allclose(altered, before)
    widekernel.load_checkpoint(other, widekernel.save_checkpoint(model, tmp_path / "a.safetensors"))
    assert_same_state(other.state_dict(), model.state_dict())
    assert torch.equal(logits(other), altered)
