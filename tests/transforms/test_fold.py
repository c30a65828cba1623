"""Folding: equal outputs for every network, unchanged originals, and unusual arrangements of modules."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import widekernel
from tests.layers.helpers import assert_close, randomized
from widekernel import ops
from widekernel.layers import (
    ConvNorm,
    DepthwiseConv2d,
    FoldedLargeKernel,
    LargeKernel,
    PartialChannels,
    Rectangles,
    ShiftTiles,
    ShuffledStrips,
    TruncatedTiles,
)
from widekernel.transforms.fold import Foldable

REGISTERED = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("widekernel.")]
NETWORKS: dict[str, dict[str, Any]] = {name: {} for name in REGISTERED if name.endswith("_nano")}
NETWORKS |= {
    name: {"depths": (1, 1, 1, 1), "width": 16}
    for name in REGISTERED
    if name.startswith("roadmap_") and name not in NETWORKS
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
EACH = pytest.mark.parametrize("name", NETWORKS)
STEPS = [name for name in NETWORKS if name.startswith("roadmap_") and not name.endswith("nano")]
# The steps of the roadmap have the same parts in other combinations: every fourth is short.
EACH_ONCE = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in STEPS and STEPS.index(name) % 4 else []) for name in NETWORKS],
)
C = 4


def network(name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
    model = timm.create_model(name, num_classes=10, **NETWORKS[name], **kwargs)
    return randomized(model).to(dtype)


def pictures(dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, dtype=torch.float64).to(dtype)


def silently_folded(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return widekernel.fold(model)


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def layer(channels: int = C) -> LargeKernel:
    return LargeKernel(Rectangles(channels, [(9, 9), (3, 3)]), [nn.BatchNorm2d(channels) for _ in range(2)])


def test_every_family_is_there() -> None:
    families = {name.rsplit("_", 1)[0] for name in NETWORKS if name.endswith("_nano")}
    assert families >= {
        "replknet",
        "slak",
        "slak_reg",
        "slak_pw",
        "slak_pww",
        "shiftwise",
        "shiftwise_v1",
        "roadmap",
        "unireplknet",
    }
    assert sum(name.startswith("roadmap_") for name in NETWORKS) == 15


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@EACH
def test_outputs_of_networks(name: str, dtype: torch.dtype) -> None:
    model, x = network(name, dtype), pictures(dtype)
    folded = silently_folded(model)
    assert type(folded) is type(model)
    assert count(folded, LargeKernel) == 0
    with torch.no_grad():
        want = model(x)
        with ops.trace() as trace:
            got = folded(x)
    assert want.std() > 0
    assert_close(got, want, TOLERANCE[dtype])
    large, depthwise = count(model, LargeKernel), [m for m in folded.modules() if isinstance(m, DepthwiseConv2d)]
    assert len(trace.calls) == large + sum(not module.reasons_against() for module in depthwise)
    assert count(folded, FoldedLargeKernel) == large


@EACH_ONCE
def test_the_state_of_a_folded_network_restores_it(name: str) -> None:
    torch.manual_seed(1)
    folded = widekernel.fold(network(name, torch.float32))
    torch.manual_seed(2)
    other = widekernel.fold(network(name, torch.float32))
    x = pictures(torch.float32)
    with torch.no_grad():
        want = folded(x)
        assert not torch.equal(other(x), want)
        file = io.BytesIO()
        torch.save(folded.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other(x), want)


@EACH_ONCE
def test_the_state_of_a_network_restores_it(name: str) -> None:
    torch.manual_seed(1)
    model = network(name, torch.float32)
    torch.manual_seed(2)
    other = network(name, torch.float32)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    x = pictures(torch.float32)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        assert torch.equal(widekernel.fold(other)(x), widekernel.fold(model)(x))


def snapshot(model: nn.Module) -> list[Any]:
    modules = [(name, type(module), module.training, id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    return [modules, parameters]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["replknet_nano", "slak_pww_nano", "shiftwise_nano", "roadmap_nano"])
def test_the_original_is_left_alone(name: str, training: bool) -> None:
    model = network(name).train(training)
    model.requires_grad_(False).get_classifier().requires_grad_(True)
    state, before, random = copy.deepcopy(model.state_dict()), snapshot(model), torch.get_rng_state()
    folded = widekernel.fold(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert snapshot(model) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in folded.modules())
    memory = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not memory & {tensor.data_ptr() for tensor in folded.state_dict().values() if tensor.numel()}


@EACH_ONCE
def test_folding_twice_changes_nothing(name: str) -> None:
    once = widekernel.fold(network(name, torch.float32))
    twice = silently_folded(once)
    assert [(n, type(m)) for n, m in twice.named_modules()] == [(n, type(m)) for n, m in once.named_modules()]
    assert list(twice.state_dict()) == list(once.state_dict())
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in twice.state_dict().items())


def test_a_bare_layer() -> None:
    bare, x = randomized(layer()), torch.randn(2, C, 8, 8, dtype=torch.float64)
    folded = silently_folded(bare)
    assert isinstance(folded, FoldedLargeKernel)
    assert isinstance(bare, Foldable)
    assert_close(folded(x), bare(x))


def test_a_bare_layer_on_some_channels() -> None:
    inner = LargeKernel(ShiftTiles(2, 9, 3, 2, 2), [nn.BatchNorm2d(2) for _ in range(3)], identity=True)
    bare, x = randomized(PartialChannels(inner, [0, 3], C)), torch.randn(2, C, 8, 8, dtype=torch.float64)
    folded = silently_folded(bare)
    assert count(folded, FoldedLargeKernel) == 1
    assert_close(folded(x), bare(x))


def test_a_custom_network() -> None:
    model = randomized(
        nn.Sequential(
            ConvNorm(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.GELU()),
            nn.Sequential(layer(), nn.ReLU(), layer()),
            nn.ModuleDict({"deep": layer()})["deep"],
            nn.Flatten(),
        )
    )
    folded = silently_folded(model)
    x = pictures()[..., :9, :8]
    assert_close(folded(x), model(x))
    assert count(folded, _BatchNorm) == 0
    assert count(folded, FoldedLargeKernel) == 3


@pytest.mark.parametrize("name", ["replknet_nano", "slak_nano", "shiftwise_nano", "roadmap_08_gelu"])
def test_synchronized_batch_norms(name: str) -> None:
    model = network(name)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert count(converted, nn.SyncBatchNorm)
    x = pictures()
    with torch.no_grad():
        assert_close(silently_folded(converted)(x), model(x), TOLERANCE[torch.float64])


def test_one_module_in_two_places_of_a_sequence() -> None:
    shared = layer()
    model, x = randomized(nn.Sequential(shared, nn.ReLU(), shared)), torch.randn(2, C, 8, 8, dtype=torch.float64)
    folded = silently_folded(model)
    assert isinstance(folded[0], FoldedLargeKernel)
    assert folded[0] is folded[2]
    assert_close(folded(x), model(x))


def test_one_module_under_two_parents() -> None:
    shared = ConvNorm(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C), layer())
    model = randomized(nn.Sequential(nn.Sequential(shared), nn.Sequential(nn.ReLU(), shared)))
    x = torch.randn(2, C, 8, 8, dtype=torch.float64)
    folded = silently_folded(model)
    assert folded[0][0] is folded[1][1]
    assert count(folded, FoldedLargeKernel) == 1
    assert_close(folded(x), model(x))


def test_one_block_in_two_places() -> None:
    blocks = network("replknet_nano").stages[0].blocks
    model, x = nn.Sequential(*blocks, *blocks), torch.randn(2, 16, 12, 12, dtype=torch.float64)
    folded = silently_folded(model)
    assert folded[0] is folded[2]
    with torch.no_grad():
        assert_close(folded(x), model(x), TOLERANCE[torch.float64])


def test_layers_without_an_equivalent_kernel_are_named() -> None:
    model = randomized(nn.Sequential(layer(), nn.Sequential(LargeKernel(TruncatedTiles(ShuffledStrips(C, 9, 3))))))
    x = torch.randn(2, C, 8, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"not folded: 1\.0 \(a branch equals no single kernel near the borders\)$"):
        folded = widekernel.fold(model)
    assert isinstance(folded[0], FoldedLargeKernel)
    assert_close(folded(x), model(x))


def test_norms_without_statistics_are_named() -> None:
    whole = LargeKernel(Rectangles(C, [(5, 5)]), [nn.BatchNorm2d(C, track_running_stats=False)])
    model, x = randomized(nn.Sequential(whole)), torch.randn(2, C, 8, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"not folded: 0 \(a batch norm has no running statistics\)$"):
        folded = widekernel.fold(model)
    assert_close(folded(x), model(x))


def test_a_network_that_cannot_be_folded_completely() -> None:
    model, x = network("slak_pw_nano", padding="same"), pictures()
    with pytest.warns(
        UserWarning, match=r"not folded: stages\.0\.blocks\.0\.mixer \(a branch .*stages\.3\.blocks\.0\.mixer \(a"
    ):
        folded = widekernel.fold(model)
    with torch.no_grad():
        assert_close(folded(x), model(x), TOLERANCE[torch.float64])


def test_feature_maps() -> None:
    model, x = network("shiftwise_nano", features_only=True), pictures()
    folded = silently_folded(model)
    with torch.no_grad():
        for got, want in zip(folded(x), model(x), strict=True):
            assert_close(got, want, TOLERANCE[torch.float64])


SOME = ["slak_nano", "shiftwise_nano"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name not in SOME]


@pytest.mark.parametrize("name", [*SOME[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in SOME[1:]), *OTHERS])
def test_folded_networks_compile(name: str) -> None:
    torch._dynamo.reset()
    folded, x = widekernel.fold(network(name)), pictures()
    with torch.no_grad():
        assert_close(torch.compile(folded, fullgraph=True, backend="aot_eager")(x), folded(x), TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", SOME + OTHERS)
def test_folded_networks_export(name: str) -> None:
    folded = widekernel.fold(network(name))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(folded, (pictures(),), dynamic_shapes=({0: batch},))
    calls = [node for node in program.graph.nodes if node.target is torch.ops.widekernel.depthwise_sum.default]
    assert len(calls) >= count(folded, FoldedLargeKernel)
    x = pictures(batch=3)
    with torch.no_grad():
        assert_close(program.module()(x), folded(x), TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["replknet_nano", "shiftwise_nano"])
def test_folded_networks_can_be_trained(name: str) -> None:
    folded = widekernel.fold(network(name))
    folded(pictures()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in folded.parameters())
