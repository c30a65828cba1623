"""Acceleration: equal outputs and gradients, the same objects under the same names, and a report that tells everything.

What is faster is not tested: measurements are replaced by a decision.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import widekernel
from widekernel import accelerate, fold, ops
from widekernel.errors import ArgumentError
from widekernel.layers import DepthwiseConv2d, PointwiseConv2d, PointwiseLinear
from widekernel.transforms.acceleration import timing
from widekernel.transforms.acceleration.input_capture import Situation

OURS = (DepthwiseConv2d, PointwiseConv2d, PointwiseLinear)
NETWORKS = {
    "convnext_atto": 64,
    "mobilenetv3_small_050": 64,
    "efficientnet_b0": 64,
    "resnet18": 64,
    "vit_tiny_patch16_224": 224,
    "slak_nano": 64,
    "replknet_nano": 64,
    "roadmap_nano": 64,
    "shiftwise_nano": 64,
}
EACH = pytest.mark.parametrize("name", NETWORKS)
Measure = Callable[[nn.Module, nn.Module, Tensor, bool], tuple[float, float]]


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    timing.forget()
    yield
    timing.forget()


def deciding(monkeypatch: pytest.MonkeyPatch, faster: bool | Callable[[nn.Module, Tensor], bool] = True) -> list[Any]:
    """Let the other way be twice as fast where `faster` says so, half as fast elsewhere; gives the list of measurements."""
    asked: list[Any] = []

    def measure(before: nn.Module, after: nn.Module, x: Tensor, backward: bool) -> tuple[float, float]:
        asked.append((type(before), type(after), tuple(x.shape), backward))
        good = faster if isinstance(faster, bool) else faster(after, x)
        return (2.0, 1.0) if good else (1.0, 2.0)

    monkeypatch.setattr(timing, "measure", measure)
    return asked


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return deciding(monkeypatch)


def network(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    kwargs = {"num_classes": 10} | ({"depth": 2} if name.startswith("vit") else {})
    return timm.create_model(name, **kwargs).to(dtype)


def pictures(name: str, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, NETWORKS[name], NETWORKS[name]).to(dtype)


def small() -> nn.Sequential:
    """Every kind of layer, in 8 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 16, 3, padding=1, groups=8),
        nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def image(channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, 12, 10)


def candidates_of(model: nn.Module) -> set[str]:
    """Name what must be in a report, by rules written down here once more."""
    names = set()
    for name, module in model.named_modules():
        wanted = isinstance(module, nn.Linear)
        if isinstance(module, nn.Conv2d):
            depthwise = 1 < module.groups == module.in_channels
            wanted = depthwise or (module.groups == 1 and module.kernel_size == (1, 1))
        if wanted:
            names.add(name)
    return names


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """What must stay as it is: objects, values, flags and hooks."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        [(key, id(tensor), hash(tensor.detach().numpy().tobytes())) for key, tensor in tensors],
        [(key, id(module), module.training) for key, module in model.named_modules(remove_duplicate=False)],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()],
    )


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def outputs_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()], materialize_grads=True)]


# Whole networks.


@pytest.mark.parametrize("channels_last", [False, True])
@EACH
def test_outputs_and_gradients_stay(name: str, channels_last: bool, always: list[Any]) -> None:
    model, x = network(name).eval(), pictures(name)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    want = outputs_and_gradients(model, x)
    result, report = accelerate(model, x)
    assert result is model
    assert report.swapped
    for got, expected in zip(outputs_and_gradients(model, x), want):
        assert_close(got, expected, rtol=1e-9, atol=1e-9 * (1 + expected.detach().abs().max().item()))


@EACH
def test_outputs_stay_in_single_precision(name: str, always: list[Any]) -> None:
    model, x = network(name, torch.float32).eval(), pictures(name, torch.float32)
    with torch.no_grad():
        want = model(x)
        accelerate(model, x)
        assert_close(model(x), want, rtol=1e-5, atol=1e-5 * (1 + want.abs().max().item()))


@pytest.mark.parametrize("example", [False, True])
@EACH
def test_objects_and_keys_stay(name: str, example: bool, always: list[Any]) -> None:
    model = network(name, torch.float32)
    before, keys = state_of(model), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    accelerate(model, pictures(name, torch.float32) if example else None)
    assert any(isinstance(module, OURS) for module in model.modules())
    assert state_of(model) == before
    assert list(model.state_dict()) == keys
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


@EACH
def test_every_candidate_is_reported_once(name: str, always: list[Any]) -> None:
    model = network(name, torch.float32)
    wanted, before = candidates_of(model), dict(model.named_modules())
    classes = {key: type(module) for key, module in before.items()}
    _, report = accelerate(model, pictures(name, torch.float32))
    names = [layer.name for layer in report.layers]
    assert sorted(names) == sorted(set(names))
    assert wanted <= set(names)
    for layer in report.layers:
        now = type(model.get_submodule(layer.name))
        assert layer.is_swapped == (now is not classes[layer.name])
        assert layer.after == (now.__name__ if layer.is_swapped else None)
        assert layer.is_swapped or layer.reason
        assert layer.name in str(report)
    json.dumps(report.to_dict())


def test_state_dicts_load_both_ways(always: list[Any]) -> None:
    plain, x = network("mobilenetv3_small_050"), pictures("mobilenetv3_small_050")
    fast = accelerate(network("mobilenetv3_small_050"), x)[0]
    fast.load_state_dict(plain.state_dict())
    assert_close(fast.eval()(x), plain.eval()(x))
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(1.1)
    plain.load_state_dict(fast.state_dict())
    assert_close(fast(x), plain(x))


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
def test_training_with_an_optimizer_of_before(name: str, always: list[Any]) -> None:
    plain = network(name)
    fast = copy.deepcopy(plain)
    steps = []
    for model in (plain, fast):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-3)
        if model is fast:
            accelerate(model, pictures(name))
        losses = []
        for seed in range(3):
            torch.manual_seed(seed)
            loss = nn.functional.cross_entropy(model.train()(pictures(name, batch=4)), torch.tensor([0, 1, 2, 3]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        steps.append(torch.stack(losses))
    assert_close(steps[1], steps[0], rtol=1e-8, atol=1e-8)


def test_autocast(always: list[Any]) -> None:
    model, x = network("convnext_atto", torch.float32).eval(), pictures("convnext_atto", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        accelerate(model, x)
        got = model(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert_close(got, want, rtol=0.1, atol=0.05)
    got.float().sum().backward()


def test_what_runs(always: list[Any]) -> None:
    model, x = small(), image()
    with ops.trace() as before:
        model(x)
    accelerate(model, x)
    with ops.trace() as after:
        model(x).sum().backward()
    assert before.calls == []
    assert after.backends(ops.problem.DEPTHWISE_SUM)
    assert set(after.backends()) <= set(ops.backends())


def test_copies_of_an_accelerated_network(always: list[Any]) -> None:
    model = accelerate(small().eval(), image())[0]
    x = image()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert kinds(other) == kinds(model)
        assert_close(other(x), model(x))


def test_folding_what_was_accelerated(always: list[Any]) -> None:
    model, x = network("slak_nano").eval(), pictures("slak_nano")
    accelerate(model, x)
    want = model(x)
    folded = fold(model)
    assert_close(folded(x), want, rtol=1e-9, atol=1e-9)
    assert any(isinstance(module, PointwiseLinear) for module in folded.modules())
    assert_close(accelerate(fold(network("replknet_nano")), pictures("replknet_nano"))[0](x).shape, want.shape)


def test_compiles_whole(always: list[Any]) -> None:
    torch._dynamo.reset()
    model, x = small().double().eval(), image().double()
    accelerate(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(outputs_and_gradients(compiled, x), outputs_and_gradients(model, x)):
        assert_close(got, want)


@pytest.mark.slow
def test_compiles_a_network(always: list[Any]) -> None:
    torch._dynamo.reset()
    model, x = network("convnext_atto", torch.float32).eval(), pictures("convnext_atto", torch.float32)
    accelerate(model, x)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
def test_exports(name: str, always: list[Any]) -> None:
    model, x = network(name).eval(), pictures(name)
    accelerate(model, x)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = pictures(name, batch=3)
    assert_close(program.module()(more), model(more))


def test_features_by_tracing(always: list[Any]) -> None:
    model = timm.create_model("efficientnet_b0", features_only=True, feature_cls="fx").eval()
    x = pictures("efficientnet_b0", torch.float32)
    wanted = model(x)
    accelerate(model, x)
    for got, want in zip(model(x), wanted):
        assert_close(got, want, rtol=1e-4, atol=1e-4)
    whole = accelerate(network("efficientnet_b0", torch.float32).eval(), x)[0]
    traced = timm.models.FeatureGraphNet(whole, out_indices=(0, 1))
    assert len(traced(x)) == 2


# Single layers and odd arrangements.


def only(layer: nn.Module, x: Tensor | None = None, **kwargs: Any) -> tuple[type, str]:
    """Accelerate one layer, and give its class and the reason."""
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
def test_a_model_that_is_a_layer(layer: Any, kind: type, shape: tuple[int, ...], example: bool, always: list[Any]) -> None:
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
def test_layers_that_are_left_alone(layer: Any, reason: str, always: list[Any]) -> None:
    model = layer()
    before = type(model)
    kind, why = only(model)
    assert kind is before
    assert reason in why
    assert always == []


def test_layers_that_are_none_of_ours(always: list[Any]) -> None:
    others = [nn.Conv2d(6, 4, 3), nn.Conv2d(1, 8, 3), nn.Conv2d(6, 6, 3, groups=2), nn.Conv1d(6, 6, 3, groups=6)]
    others += [nn.ConvTranspose2d(6, 6, 3, groups=6), nn.Bilinear(2, 2, 2), nn.Embedding(3, 3), nn.Identity()]
    others += [torch.ao.nn.quantized.Linear(6, 4), torch.ao.nn.quantized.Conv2d(6, 4, 1)]
    model = nn.ModuleList(others)
    before = kinds(model)
    assert accelerate(model)[1].layers == ()
    assert kinds(model) == before
    assert str(accelerate(nn.ReLU())[1]).endswith("0 of 0 layers swapped.")


def test_replaced_forward_is_left_alone(always: list[Any]) -> None:
    layer = nn.Linear(6, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert only(layer) == (nn.Linear, "its forward has been replaced")


def test_without_pointwise(always: list[Any]) -> None:
    model = small()
    _, report = accelerate(model, image(), pointwise=False)
    assert [row.name for row in report.layers] == ["1", "4", "5"]
    assert {type(model[i]) for i in (3, 9)} == {nn.Conv2d, nn.Linear}
    assert [row.name for row in accelerate(small(), pointwise=False)[1].swapped] == ["1"]


def test_only_what_is_faster_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    deciding(monkeypatch, lambda after, x: isinstance(after, PointwiseConv2d))
    model = small()
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


def test_second_time_changes_nothing(always: list[Any]) -> None:
    model = small()
    accelerate(model, image())
    before, asked = kinds(model), list(always)
    _, report = accelerate(model, image())
    assert kinds(model) == before
    assert always == asked
    assert report.swapped == ()
    assert [row.reason for row in report.layers].count("accelerated already") == 3


def test_shared_layers_and_parameters(always: list[Any]) -> None:
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


def test_hooks_stay_and_run(always: list[Any]) -> None:
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


def test_parametrised_layers_stay_right(always: list[Any]) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    x = torch.randn(2, 6)
    want = model(x)
    assert [row.name for row in accelerate(model, x)[1].swapped] == ["1"]
    assert_close(model(x), want)
    # What is parametrised afterwards is right, too, and so is what was when it is no longer.
    parametrize.register_parametrization(model[1], "weight", Doubled())
    parametrize.remove_parametrizations(model[1], "weight")
    assert isinstance(model[1], PointwiseLinear)
    assert model(x).shape == want.shape


def test_weights_that_hooks_compute(always: list[Any]) -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[1])
    x = torch.randn(2, 6, 5, 5)
    want = outputs_and_gradients(model, x)
    assert len(accelerate(model, x)[1].swapped) == 2
    for got, expected in zip(outputs_and_gradients(model, x), want):
        assert_close(got, expected)


def test_attention_of_pytorch(always: list[Any]) -> None:
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    want = model(x)
    _, report = accelerate(model, x)
    assert [row.name for row in report.layers] == ["self_attn.out_proj", "linear1", "linear2"]
    assert_close(model(x), want)


def test_layers_that_the_example_does_not_call(always: list[Any]) -> None:
    model = small()
    model.unused = nn.Linear(3, 3)  # type: ignore[assignment]
    model.forward = lambda x: nn.Sequential.forward(model[:-2], x)  # type: ignore[method-assign]
    _, report = accelerate(model, image())
    assert report["unused"].reason == report["9"].reason == "the example does not call it"


def test_inputs_by_keyword_and_several_arguments(always: list[Any]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(input=y)

    x, y = torch.randn(2, 3), torch.randn(2, 4)
    for example in ((x, y), {"x": x, "y": y}):
        assert [row.calls for row in accelerate(Two(), example)[1].swapped] == [1, 1]


# What is measured.


def test_backward_is_measured_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = deciding(monkeypatch)
    assert accelerate(small(), image())[1].backward
    assert all(backward for *_, backward in asked)
    asked.clear()
    report = accelerate(small().eval(), image())[1]
    assert not report.backward
    with torch.no_grad():
        accelerate(small().train(), image(batch=5))
    assert asked
    assert not any(backward for *_, backward in asked)


def test_what_was_measured_is_remembered(always: list[Any]) -> None:
    model = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(3)])
    accelerate(model, image(8))
    assert len(always) == 1
    accelerate(copy.deepcopy(small()[1:2]), image(8))
    assert len(always) == 2
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8), image(8))
    assert len(always) == 2
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), image(8))
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8), image(8, batch=3))
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8), image(8).contiguous(memory_format=torch.channels_last))
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8).eval(), image(8))
    accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8).double(), image(8).double())
    assert len(always) == 7
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        accelerate(nn.Conv2d(8, 8, 3, padding=1, groups=8), image(8))
    finally:
        torch.set_num_threads(threads)
    assert len(always) == 8


def test_without_example_pointwise_must_win_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = deciding(monkeypatch)
    model = nn.Sequential(nn.Linear(96, 384), nn.Conv2d(384, 768, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    report = accelerate(model)[1]
    assert len(report.swapped) == 3
    assert report["2"].reason == "by rule: no example to measure"
    maps = [(batch, 384, 14, 14) for batch in (1, 1, 8, 8)]
    assert [shape for _, _, shape, _ in asked] == [(1, 56, 56, 96), (8, 56, 56, 96), *maps]
    timing.forget()
    deciding(monkeypatch, lambda after, x: x.shape[0] == 8)
    report = accelerate(nn.Sequential(nn.Linear(96, 384), nn.Conv2d(384, 768, 1)))[1]
    assert report.swapped == ()
    assert report["0"].reason == "not faster for (1, 56, 56, 96), contiguous"
    assert report["1"].reason == "not faster for (1, 384, 14, 14), contiguous"
    timing.forget()
    deciding(monkeypatch, lambda after, x: x.stride(1) != 1)
    assert accelerate(nn.Conv2d(384, 768, 1))[1][""].reason == "not faster for (1, 384, 14, 14), channels_last"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1, bias=False)], ids=str
)
def test_measuring(layer: nn.Module, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement itself, on tiny layers: it gives times, and leaves gradients, hooks and random numbers alone."""
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
        times = timing.compare(layer, replacement, Situation.of(x), backward)
        assert min(times) > 0
    assert state_of(layer) == before
    assert torch.equal(torch.get_rng_state(), numbers)


def test_measuring_frozen_layers_and_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 0.0)
    frozen = nn.Linear(6, 4).requires_grad_(False)
    assert min(timing.compare(frozen, PointwiseLinear, Situation.of(torch.randn(3, 6)), True)) > 0


def test_real_measurements_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    model, x = small().eval(), image()
    want = model(x)
    _, report = accelerate(model, x)
    assert all(row.gain is not None for row in report.layers if row.calls and not row.reason)
    assert "ms instead of" in str(report)
    assert_close(model(x), want)


# Nothing else is touched.


class Restless(nn.Module):
    """Does whatever a network should not do in evaluation."""

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
            raise RuntimeError("no light")
        return self.drop(self.norm(self.fc(x)))

    def train(self, mode: bool = True) -> nn.Module:
        pytest.fail("train() was called")


@pytest.mark.parametrize("dark", [False, True])
def test_the_run_leaves_no_trace(dark: bool, always: list[Any]) -> None:
    model = Restless()
    before, numbers = state_of(model), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    if dark:
        with pytest.raises(ArgumentError, match=r"\(2, 4\) float32.*no light"):
            accelerate(model, torch.zeros(2, 4))
        assert type(model.fc) is nn.Linear
    else:
        accelerate(model, torch.ones(2, 4))
        assert type(model.fc) is PointwiseLinear
    assert state_of(model) == before
    assert model.last is None
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers[1:]


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
def test_examples_that_do_not_fit(example: Any, message: str, always: list[Any]) -> None:
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


def test_what_is_no_network() -> None:
    for wrong in (None, torch.zeros(3), nn.Linear, "resnet18"):
        with pytest.raises(ArgumentError, match=r"nn\.Module"):
            accelerate(wrong)  # type: ignore[type-var]
    with pytest.raises(ArgumentError, match="then compile"):
        accelerate(torch.compile(small()))  # type: ignore[type-var]
    with pytest.raises(ArgumentError, match="run the network once"):
        accelerate(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))


def test_networks_without_data(always: list[Any]) -> None:
    with torch.device("meta"):
        model, x = small(), image()
    _, report = accelerate(model, x)
    assert report.swapped == ()
    assert "nothing to measure" in report["1"].reason
    assert [row.name for row in accelerate(model)[1].swapped] == ["1"]


def test_empty_inputs(always: list[Any]) -> None:
    _, report = accelerate(nn.Linear(6, 4), torch.randn(0, 6))
    assert "is empty" in report[""].reason


def test_in_inference_mode(always: list[Any]) -> None:
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
