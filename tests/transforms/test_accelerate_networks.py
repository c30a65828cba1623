"""Whole networks keep outputs, gradients, objects and names; measurements are replaced by fixed decisions."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from tests.transforms.acceleration import (
    EACH,
    OURS,
    candidates_of,
    each_with,
    image,
    kinds,
    network,
    outputs_and_gradients,
    pictures,
    small,
    state_of,
)
from widekernel import accelerate, fold, ops
from widekernel.layers import PointwiseLinear


@each_with("channels_last")
def test_outputs_and_gradients_stay(name: str, channels_last: bool, always_faster: list[Any]) -> None:
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
def test_outputs_stay_in_single_precision(name: str, always_faster: list[Any]) -> None:
    model, x = network(name, torch.float32).eval(), pictures(name, torch.float32)
    with torch.no_grad():
        want = model(x)
        accelerate(model, x)
        assert_close(model(x), want, rtol=1e-5, atol=1e-5 * (1 + want.abs().max().item()))


@each_with("example")
def test_objects_and_keys_stay(name: str, example: bool, always_faster: list[Any]) -> None:
    model = network(name, torch.float32)
    before, keys = state_of(model), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    accelerate(model, pictures(name, torch.float32) if example else None)
    assert any(isinstance(module, OURS) for module in model.modules())
    assert state_of(model) == before
    assert list(model.state_dict()) == keys
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


@EACH
def test_every_candidate_is_reported_once(name: str, always_faster: list[Any]) -> None:
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


def test_state_dicts_load_both_ways(always_faster: list[Any]) -> None:
    plain, x = network("mobilenetv3_small_050"), pictures("mobilenetv3_small_050")
    fast = accelerate(network("mobilenetv3_small_050"), x)[0]
    fast.load_state_dict(plain.state_dict())
    assert_close(fast.eval()(x), plain.eval()(x))
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(1.1)
    plain.load_state_dict(fast.state_dict())
    assert_close(fast(x), plain(x))


@pytest.mark.parametrize("name", [pytest.param("convnext_atto", marks=pytest.mark.slow), "mobilenetv3_small_050"])
def test_training_with_an_optimizer_built_before(name: str, always_faster: list[Any]) -> None:
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


def test_autocast(always_faster: list[Any]) -> None:
    model, x = network("convnext_atto", torch.float32).eval(), pictures("convnext_atto", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        accelerate(model, x)
        got = model(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert_close(got, want, rtol=0.1, atol=0.05)
    got.float().sum().backward()


def test_which_backends_run(always_faster: list[Any]) -> None:
    model, x = small(), image()
    with ops.trace() as before:
        model(x)
    accelerate(model, x)
    with ops.trace() as after:
        model(x).sum().backward()
    assert before.calls == []
    assert after.backends(ops.problem.DEPTHWISE_SUM)
    assert set(after.backends()) <= set(ops.backends())


def test_copies_of_an_accelerated_network(always_faster: list[Any]) -> None:
    model = accelerate(small().eval(), image())[0]
    x = image()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert kinds(other) == kinds(model)
        assert_close(other(x), model(x))


def test_folding_an_accelerated_network(always_faster: list[Any]) -> None:
    model, x = network("slak_nano").eval(), pictures("slak_nano")
    accelerate(model, x)
    want = model(x)
    folded = fold(model)
    assert_close(folded(x), want, rtol=1e-9, atol=1e-9)
    assert any(isinstance(module, PointwiseLinear) for module in folded.modules())
    assert_close(accelerate(fold(network("replknet_nano")), pictures("replknet_nano"))[0](x).shape, want.shape)


def test_compiles_whole(always_faster: list[Any]) -> None:
    torch._dynamo.reset()
    model, x = small().double().eval(), image().double()
    accelerate(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(outputs_and_gradients(compiled, x), outputs_and_gradients(model, x)):
        assert_close(got, want)


@pytest.mark.slow
def test_compiles_a_network(always_faster: list[Any]) -> None:
    torch._dynamo.reset()
    model, x = network("convnext_atto", torch.float32).eval(), pictures("convnext_atto", torch.float32)
    accelerate(model, x)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["convnext_atto", pytest.param("mobilenetv3_small_050", marks=pytest.mark.slow)])
def test_exports(name: str, always_faster: list[Any]) -> None:
    model, x = network(name).eval(), pictures(name)
    accelerate(model, x)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = pictures(name, batch=3)
    assert_close(program.module()(more), model(more))


def test_features_by_tracing(always_faster: list[Any]) -> None:
    model = timm.create_model("efficientnet_b0", features_only=True, feature_cls="fx").eval()
    x = pictures("efficientnet_b0", torch.float32)
    wanted = model(x)
    accelerate(model, x)
    for got, want in zip(model(x), wanted):
        assert_close(got, want, rtol=1e-4, atol=1e-4)
    whole = accelerate(network("efficientnet_b0", torch.float32).eval(), x)[0]
    traced = timm.models.FeatureGraphNet(whole, out_indices=(0, 1))
    assert len(traced(x)) == 2
