"""Single layers and unusual arrangements: layers that `accelerate` replaces, and those that it leaves alone, and why."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

from tests.transforms.acceleration import (
    image,
    kinds,
    outputs_and_gradients,
    replace_measurement,
    small,
)
from widekernel import accelerate
from widekernel.layers import DepthwiseConv2d, PointwiseConv2d, PointwiseLinear
from widekernel.transforms.acceleration import timing


def only(layer: nn.Module, x: Tensor | None = None, **kwargs: Any) -> tuple[type, str]:
    """Accelerate one layer, and return its class and the reason."""
    _, report = accelerate(layer, x, **kwargs)
    (row,) = report.layers
    return type(layer), row.reason


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize(
    ("layer", "kind", "shape"),
    [
        (lambda: nn.Conv2d(6, 6, 7, padding=3, groups=6), DepthwiseConv2d, (2, 6, 9, 9)),
        (lambda: nn.Conv2d(6, 6, (3, 9), padding="same", groups=6, bias=False), DepthwiseConv2d, (2, 6, 9, 9)),
        (lambda: nn.Conv2d(6, 6, 1, groups=6), DepthwiseConv2d, (6, 9, 9)),
        (lambda: nn.Conv2d(1, 1, 5, padding=2), DepthwiseConv2d, (2, 1, 9, 9)),
        (lambda: nn.Conv2d(6, 4, 1), PointwiseConv2d, (2, 6, 9, 9)),
        (lambda: nn.Conv2d(6, 4, 1, bias=False), PointwiseConv2d, (6, 9, 9)),
        (lambda: nn.Linear(6, 4), PointwiseLinear, (2, 6)),
        (lambda: nn.Linear(6, 4, bias=False), PointwiseLinear, (6,)),
    ],
)
def test_a_model_that_is_a_layer(
    layer: Any, kind: type, shape: tuple[int, ...], example: bool, always_faster: list[Any]
) -> None:
    model, x = layer(), torch.randn(shape)
    want = outputs_and_gradients(model, x)
    result, report = accelerate(model, x if example else None)
    assert result is model
    assert type(model) is kind
    assert [row.name for row in report.layers] == [""]
    assert report[""].calls == int(example)
    for got, expected in zip(outputs_and_gradients(model, x), want):
        assert_close(got, expected)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), "6 -> 12 channels"),
        (lambda: nn.Conv2d(6, 6, 3, padding=1, stride=2, groups=6), "stride"),
        (lambda: nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6), "dilation"),
        (lambda: nn.Conv2d(6, 6, 3, groups=6), "padding"),
        (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="reflect"), "padding mode"),
        (lambda: nn.Conv2d(6, 4, 1, stride=2), "stride"),
        (lambda: nn.Conv2d(6, 4, 1, padding=1), "padding"),
        (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, dtype=torch.complex64), "complex64"),
        (lambda: nn.Linear(6, 4, device="meta"), "on meta"),
        (lambda: nn.LazyLinear(4), "do not exist"),
        (lambda: nn.LazyConv2d(4, 1), "do not exist"),
        (lambda: parametrizations.weight_norm(nn.Linear(6, 4)), "parametrized"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(6, 6, 3, padding=1, groups=6)), "parametrized"),
        (lambda: timm.layers.Conv2dSame(6, 6, 3, groups=6), "Conv2dSame"),
        (lambda: timm.layers.StdConv2d(6, 4, 1), "StdConv2d"),
        (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 4), "subclass of nn.Linear"),
        (lambda: DepthwiseConv2d(6, 6, 3, padding=1, stride=2, groups=6), "accelerated already; stride"),
        (lambda: PointwiseLinear(6, 4), "accelerated already"),
        (lambda: PointwiseConv2d(6, 4, 1), "accelerated already"),
    ],
)
def test_layers_that_are_left_alone(layer: Any, reason: str, always_faster: list[Any]) -> None:
    model = layer()
    before = type(model)
    kind, why = only(model)
    assert kind is before
    assert reason in why
    assert always_faster == []


def test_layers_of_other_libraries(always_faster: list[Any]) -> None:
    others = [nn.Conv2d(6, 4, 3), nn.Conv2d(1, 8, 3), nn.Conv2d(6, 6, 3, groups=2), nn.Conv1d(6, 6, 3, groups=6)]
    others += [nn.ConvTranspose2d(6, 6, 3, groups=6), nn.Bilinear(2, 2, 2), nn.Embedding(3, 3), nn.Identity()]
    others += [torch.ao.nn.quantized.Linear(6, 4), torch.ao.nn.quantized.Conv2d(6, 4, 1)]
    model = nn.ModuleList(others)
    before = kinds(model)
    assert accelerate(model)[1].layers == ()
    assert kinds(model) == before
    assert str(accelerate(nn.ReLU())[1]).endswith("0 of 0 layers swapped.")


def test_replaced_forward_is_left_alone(always_faster: list[Any]) -> None:
    layer = nn.Linear(6, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert only(layer) == (nn.Linear, "its forward has been replaced")


def test_without_pointwise(always_faster: list[Any]) -> None:
    model = small()
    _, report = accelerate(model, image(), pointwise=False)
    assert [row.name for row in report.layers] == ["1", "2", "4", "5"]
    assert {type(model[i]) for i in (3, 9)} == {nn.Conv2d, nn.Linear}
    assert [row.name for row in accelerate(small(), pointwise=False)[1].swapped] == ["1"]


def test_only_what_is_faster_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_measurement(monkeypatch, lambda after, x: isinstance(after, PointwiseConv2d))
    model = small()
    model[2].eval()
    _, report = accelerate(model, image())
    assert [row.name for row in report.swapped] == ["3"]
    assert (report["3"].milliseconds_before, report["3"].milliseconds_after, report["3"].gain) == (2.0, 1.0, 2.0)
    assert (report["1"].reason, report["1"].gain) == ("not faster", 0.5)
    assert report.totals() == (4.0, 3.0)
    with pytest.raises(KeyError, match="none"):
        report["none"]


def test_equal_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure", lambda *_: (1.04, 1.0))
    assert accelerate(small(), image())[1].swapped == ()


def test_second_time_changes_nothing(always_faster: list[Any]) -> None:
    model = small()
    model[2].eval()
    accelerate(model, image())
    before, asked = kinds(model), list(always_faster)
    _, report = accelerate(model, image())
    assert kinds(model) == before
    assert always_faster == asked
    assert report.swapped == ()
    assert [row.reason for row in report.layers].count("accelerated already") == 3


def test_shared_layers_and_parameters(always_faster: list[Any]) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.again = self.first
            self.tied = nn.Linear(6, 6)
            self.tied.weight = self.first.weight
            self.steps = nn.ModuleList([self.first, self.tied])
            self.hidden = [self.first]

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.hidden[0](self.again(self.first(x))))

    model, x = Shared(), torch.randn(3, 6)
    want = outputs_and_gradients(model, x)
    _, report = accelerate(model, x)
    assert [(row.name, row.calls, row.milliseconds_after) for row in report.layers] == [("first", 3, 3.0), ("tied", 1, 1.0)]
    assert model.first is model.again is model.steps[0] is model.hidden[0]
    assert model.tied.weight is model.first.weight
    assert type(model.first) is type(model.tied) is PointwiseLinear
    for got, expected in zip(outputs_and_gradients(model, x), want):
        assert_close(got, expected)


def test_hooks_stay_and_run(always_faster: list[Any]) -> None:
    model, x, calls = small().eval(), image(), []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[3].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model[9].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[9].weight.register_hook(lambda grad: calls.append("weight"))
    want = model(x).detach()
    accelerate(model, x)
    calls.clear()
    y = model(x)
    y.sum().backward()
    assert_close(y, want)
    assert sorted(calls) == ["backward", "forward", "weight"]


def test_parametrized_layers_stay_correct(always_faster: list[Any]) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    x = torch.randn(2, 6)
    want = model(x)
    assert [row.name for row in accelerate(model, x)[1].swapped] == ["1"]
    assert_close(model(x), want)
    # Layers that are parametrized later are correct, too, and stay so when the parametrization is removed.
    parametrize.register_parametrization(model[1], "weight", Doubled())
    parametrize.remove_parametrizations(model[1], "weight")
    assert isinstance(model[1], PointwiseLinear)
    assert model(x).shape == want.shape


def test_weights_that_hooks_compute(always_faster: list[Any]) -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[1])
    x = torch.randn(2, 6, 5, 5)
    want = outputs_and_gradients(model, x)
    assert len(accelerate(model, x)[1].swapped) == 2
    for got, expected in zip(outputs_and_gradients(model, x), want):
        assert_close(got, expected)


def test_attention_of_pytorch(always_faster: list[Any]) -> None:
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    want = model(x)
    _, report = accelerate(model, x)
    assert [row.name for row in report.layers] == ["self_attn.out_proj", "linear1", "linear2"]
    assert_close(model(x), want)


def test_layers_that_the_example_does_not_call(always_faster: list[Any]) -> None:
    model = small()
    model.unused = nn.Linear(3, 3)  # type: ignore[assignment]
    model.forward = lambda x: nn.Sequential.forward(model[:-2], x)  # type: ignore[method-assign]
    _, report = accelerate(model, image())
    assert report["unused"].reason == report["9"].reason == "the example does not call it"


def test_inputs_by_keyword_and_several_arguments(always_faster: list[Any]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(input=y)

    x, y = torch.randn(2, 3), torch.randn(2, 4)
    for example in ((x, y), {"x": x, "y": y}):
        assert [row.calls for row in accelerate(Two(), example)[1].swapped] == [1, 1]
