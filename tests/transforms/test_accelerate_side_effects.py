"""`accelerate` changes nothing but classes of layers, and a network that it refuses stays as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import widekernel
from tests.transforms.acceleration import (
    image,
    kinds,
    small,
    state_of,
)
from widekernel import accelerate
from widekernel.errors import ArgumentError
from widekernel.layers import PointwiseLinear
from widekernel.transforms.acceleration import timing


class Unruly(nn.Module):
    """Network that misbehaves in evaluation: it changes buffers, draws random numbers and replaces tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5).eval()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = x.detach()
        self.count = self.count + 1
        random.random(), np.random.rand(), torch.rand(3)
        if x.sum() == 0:
            raise RuntimeError("all zeros")
        return self.drop(self.norm(self.fc(x)))

    def train(self, mode: bool = True) -> nn.Module:
        pytest.fail("train() was called")


@pytest.mark.parametrize("fails", [False, True])
def test_the_run_leaves_no_trace(fails: bool, always_faster: list[Any]) -> None:
    model = Unruly()
    before, numbers = state_of(model), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    if fails:
        with pytest.raises(ArgumentError, match=r"\(2, 4\) float32.*all zeros"):
            accelerate(model, torch.zeros(2, 4))
        assert type(model.fc) is nn.Linear
    else:
        accelerate(model, torch.ones(2, 4))
        assert type(model.fc) is PointwiseLinear
    assert state_of(model) == before
    assert model.last is None
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers[1:]


class InPlace(nn.Module):
    """Network that changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.strides: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, more: list[Tensor] | None = None) -> Tensor:
        self.strides.append(x.stride())
        assert more is None or more[0] is x
        return self.pointwise(x.div_(4.0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps"])
def test_the_example_is_left_alone(layout: str, always_faster: list[Any]) -> None:
    x = torch.randn(2, 4, 6, 6)
    x = {"contiguous": x, "channels_last": x.to(memory_format=torch.channels_last), "gaps": x[:, :, ::2, 1:]}[layout]
    before = x.clone()
    for example in (x, (x, [x]), {"x": x, "more": [x]}):
        model = InPlace()
        accelerate(model, example)
        assert torch.equal(x, before) and model.strides == [x.stride()]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (lambda: torch.randn(2, 4, 8, 8), r"example_input \(\(2, 4, 8, 8\) float32\)"),
        (lambda: image().double(), "float64"),
        (lambda: (image(), image()), "tuple of arguments"),
        (lambda: {"nothing": image()}, "nothing="),
        (lambda: (), "cannot run"),
        (lambda: [image()], "example_input is a list"),
        (lambda: 3, "example_input is a int"),
        (lambda: {1: image()}, "example_input is a dict"),
    ],
)
def test_examples_that_do_not_fit(example: Any, message: str, always_faster: list[Any]) -> None:
    model = small()
    before, classes = state_of(model), kinds(model)
    with pytest.raises(ArgumentError, match=message):
        accelerate(model, example())
    assert state_of(model) == before
    assert kinds(model) == classes


def test_failing_measurements_leave_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(before: nn.Module, after: nn.Module, x: Tensor, backward: bool) -> tuple[float, float]:
        if isinstance(after, PointwiseLinear):
            raise MemoryError
        return 2.0, 1.0

    monkeypatch.setattr(timing, "measure", measure)
    model = small()
    classes = kinds(model)
    for example in (None, image()):
        with pytest.raises(MemoryError):
            accelerate(model, example)
        assert kinds(model) == classes


def test_models_that_are_refused() -> None:
    for wrong in (None, torch.zeros(3), nn.Linear, "resnet18"):
        with pytest.raises(ArgumentError, match=r"nn\.Module"):
            accelerate(wrong)  # type: ignore[type-var]
    with pytest.raises(ArgumentError, match="then compile"):
        accelerate(torch.compile(small()))  # type: ignore[type-var]
    with pytest.raises(ArgumentError, match="run the network once"):
        accelerate(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))


def test_networks_without_data(always_faster: list[Any]) -> None:
    with torch.device("meta"):
        model, x = small(), image()
    _, report = accelerate(model, x)
    assert report.swapped == ()
    assert "nothing to measure" in report["1"].reason
    assert [row.name for row in accelerate(model)[1].swapped] == ["1"]


def test_empty_inputs(always_faster: list[Any]) -> None:
    _, report = accelerate(nn.Linear(6, 4), torch.randn(0, 6))
    assert "is empty" in report[""].reason


def test_in_inference_mode(always_faster: list[Any]) -> None:
    model, x = small().eval(), image()
    want = model(x)
    with torch.inference_mode():
        accelerate(model, x)
    assert_close(model(x), want)
    model(x).sum().backward()


def test_public_name() -> None:
    assert "accelerate" in widekernel.__all__
    assert widekernel.accelerate is widekernel.transforms.accelerate


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # By default the convolutions of PyTorch, with which ours are compared, round to TF32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = small().cuda().eval(), image().cuda()
    want = model(x)
    _, report = accelerate(model, x)
    assert report["1"].gain is not None
    assert "on cuda" in report["3"].reason
    assert_close(model(x), want, rtol=1e-4, atol=1e-4)
