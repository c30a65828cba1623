"""Measurements of `accelerate`, their number, and the conclusions from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.native import thread_count
from tests.transforms.acceleration import (
    image,
    replace_measurement,
    small,
    state_of,
)
from widekernel import accelerate
from widekernel.layers import DepthwiseConv2d, PointwiseConv2d, PointwiseLinear
from widekernel.transforms.acceleration import timing
from widekernel.transforms.acceleration.input_capture import InputSpec


def test_backward_is_measured_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace_measurement(monkeypatch)
    assert accelerate(small(), image())[1].backward
    assert all(backward for *_, backward in asked)
    asked.clear()
    report = accelerate(small().eval(), image())[1]
    assert not report.backward
    with torch.no_grad():
        accelerate(small().train(), image(batch=5))
    assert asked
    assert not any(backward for *_, backward in asked)


def test_measurements_are_remembered(always_faster: list[Any]) -> None:
    model = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(3)])
    accelerate(model, image(8))
    assert len(always_faster) == 1
    accelerate(copy.deepcopy(small()[1:2]), image(8))
    assert len(always_faster) == 2
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8), image(8))
    assert len(always_faster) == 2
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), image(8))
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8), image(8, batch=3))
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8), image(8).contiguous(memory_format=torch.channels_last))
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8).eval(), image(8))
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8).double(), image(8).double())
    assert len(always_faster) == 7
    with thread_count(torch.get_num_threads() + 1):
        accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8), image(8))
    assert len(always_faster) == 8


def test_without_example_pointwise_must_win_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace_measurement(monkeypatch)
    model = nn.Sequential(nn.Linear(96, 384), nn.Conv2d(384, 768, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    report = accelerate(model)[1]
    assert len(report.swapped) == 3
    assert report["2"].reason == "by rule: no example to measure"
    maps = [(batch, 384, 14, 14) for batch in (1, 1, 8, 8)]
    assert [shape for _, _, shape, _ in asked] == [(1, 56, 56, 96), (8, 56, 56, 96), *maps]
    timing.forget()
    replace_measurement(monkeypatch, lambda after, x: x.shape[0] == 8)
    report = accelerate(nn.Sequential(nn.Linear(96, 384), nn.Conv2d(384, 768, 1)))[1]
    assert report.swapped == ()
    assert report["0"].reason == "not faster for (1, 56, 56, 96), contiguous"
    assert report["1"].reason == "not faster for (1, 384, 14, 14), contiguous"
    timing.forget()
    replace_measurement(monkeypatch, lambda after, x: x.stride(1) != 1)
    assert accelerate(nn.Conv2d(384, 768, 1))[1][""].reason == "not faster for (1, 384, 14, 14), channels_last"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1, bias=False)], ids=str
)
def test_measuring(layer: nn.Module, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement itself, on tiny layers: it returns times and does not touch gradients, hooks and random numbers."""
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    layer = copy.deepcopy(layer).train(backward)
    layer.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    layouts = (
        image(6),
        image(6).contiguous(memory_format=torch.channels_last),
        image(12)[:, ::2],
        image(1).expand(-1, 6, -1, -1),
    )
    before, numbers = state_of(layer), torch.get_rng_state()
    replacement = DepthwiseConv2d if layer.groups > 1 else PointwiseConv2d
    for x in layouts:
        times = timing.compare(layer, replacement, InputSpec.of(x), backward)
        assert min(times) > 0
    assert state_of(layer) == before
    assert torch.equal(torch.get_rng_state(), numbers)


def test_measuring_frozen_layers_and_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 0.0)
    frozen = nn.Linear(6, 4).requires_grad_(False)
    assert min(timing.compare(frozen, PointwiseLinear, InputSpec.of(torch.randn(3, 6)), True)) > 0


def test_real_measurements_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    model, x = small().eval(), image()
    want = model(x)
    _, report = accelerate(model, x)
    assert all(row.gain is not None for row in report.layers if row.calls and not row.reason)
    assert "ms instead of" in str(report)
    assert_close(model(x), want)
