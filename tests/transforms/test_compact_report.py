"""Report of compaction, which also says what was not saved; and refused arguments."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.models.zoo import alive
from tests.transforms.compaction import FREE, mask
from widekernel.errors import ArgumentError, ShapeError
from widekernel.layers import (
    Rect,
)
from widekernel.layers.grouped import ChannelGroup, GroupedKernels
from widekernel.transforms.compaction import CostModel, compact, compact_report


def test_the_report_says_that_scattered_zeros_save_nothing() -> None:
    model = alive("slak_nano")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= torch.rand(weight.shape) < 0.6
    report = compact_report(model)
    for row in report:
        assert row.realized == row.dense
        assert row.nonzero < row.dense
        assert row.reason
    assert any("lie between live taps" in row.reason for row in report)
    assert any("computed like other weights" in row.reason for row in report)


def test_the_report_names_layers_that_cannot_be_folded() -> None:
    model = mask(alive("slak_pw_nano_truncated"), "channel", 0.5)
    with pytest.warns(UserWarning, match="not folded"):
        report = compact_report(model)
    row = next(row for row in report if row.name == "stages.0.blocks.0.mixer")
    assert row.reason == "not folded: a branch equals no single kernel near the borders"


def test_the_report_as_text_and_as_json() -> None:
    report = compact_report(mask(alive("slak_nano"), "channel", 0.5), FREE)
    assert "stages.0.blocks.0.mixer: 16 -> " in str(report)
    rows = json.loads(json.dumps(report.to_dict()))
    assert rows[0]["name"] == "stages.0.blocks.0.mixer"
    assert rows[0]["realized"] < rows[0]["dense"]


def test_compacting_twice_changes_nothing() -> None:
    once = compact(mask(alive("shiftwise_nano"), "channel", 1.0), FREE)
    twice = compact(once, FREE)
    assert list(twice.state_dict()) == list(once.state_dict())
    assert compact_report(twice) == compact_report(once)


def test_not_a_module() -> None:
    with pytest.raises(ArgumentError, match=r"given a dict: it takes a network"):
        compact({})  # type: ignore[type-var]


def test_no_weights() -> None:
    with pytest.raises(ArgumentError, match="meta device: zeros can be found only in weights"):
        compact(nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize("size", [(3, 64, 64), (1, 3, 0, 64)])
def test_a_wrong_batch(size: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="must be four positive numbers"):
        compact(nn.Linear(2, 2), input_size=size)


@pytest.mark.parametrize("wrong", [{"mac": -1}, {"block": 0}, {"ragged": 0.5}])
def test_wrong_prices(wrong: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="costs must be at least 0, block and ragged at least 1"):
        CostModel(**wrong)


def test_groups_that_overlap() -> None:
    group = ChannelGroup([Rect.centered(torch.randn(2, 1, 3, 3))], torch.zeros(2), [0, 1], [0, 1])
    with pytest.raises(ArgumentError, match=r"must be different channels of 0\.\.3"):
        GroupedKernels([group, group], torch.zeros(4), torch.zeros(4))
