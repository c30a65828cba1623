"""Tracing, compiling and exporting: no network causes a graph break."""

from __future__ import annotations

import pytest
import torch
from timm.models._features_fx import FeatureGraphNet, create_feature_extractor

from tests.models.zoo import ALIKE, NANO, SMALL, alive, assert_near, every_family_once, images

# The steps of the roadmap have the same parts in other combinations: every eighth is short.
ROADMAP = [name for name in SMALL if name.startswith("roadmap_") and name.endswith("_small")]
SHORT = [name for name in SMALL if name not in ROADMAP] + ROADMAP[::8]
every_small_model = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.slow]) for name in SMALL],
)
# What compiles them has been seen in other networks: plain blocks, and the sources of kernels.
ALSO_ALIKE = (*ALIKE, "convnext_isotropic_nano", "slak_pw_nano")
SEEN = "slak_nano"
"""The network that is compiled with more than its graph, and therefore not by its graph alone."""
most_families_once = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALSO_ALIKE else []) for name in NANO]
)


@every_small_model
def test_feature_extraction_by_tracing(name: str) -> None:
    model, x = alive(name), images()
    nodes = {"stages.0": "first", "stages.3": "last", "head": "logits"}
    traced = create_feature_extractor(model, nodes)
    with torch.no_grad():
        out = traced.eval()(x)
        maps = [stage(y) for y, stage in zip([model.stem(x)], model.stages)]
        assert torch.equal(out["first"], maps[0])
        assert torch.equal(out["logits"], model(x))
    assert out["last"].shape[1] == model.feature_info[3]["num_chs"]


@every_small_model
def test_traced_backward(name: str) -> None:
    model, x = alive(name), images()
    traced = FeatureGraphNet(model, (0, 1, 2, 3)).train()
    for module in traced.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    outputs = traced(x)
    assert [y.shape[1] for y in outputs] == traced.feature_info.channels()
    sum(y.square().mean() for y in outputs).backward()
    without = [key for key, parameter in traced.named_parameters() if parameter.grad is None]
    assert [key for key in without if not key.startswith(("graph_module.feature_norms", "graph_module.norm_pre"))] == []


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        # The graph is what differs between families; what the backend does with it is seen in one of them, and in training.
        *[pytest.param(name, "eager", marks=[pytest.mark.slow] if name in (*ALSO_ALIKE, SEEN) else []) for name in NANO],
        *[pytest.param(name, "aot_eager", marks=[] if name == SEEN else [pytest.mark.slow]) for name in NANO],
    ],
)
def test_compiled_without_a_graph_break(name: str, backend: str) -> None:
    torch._dynamo.reset()
    model, x = alive(name), images()
    with torch.no_grad():
        expected = model(x)
        assert_near(torch.compile(model, backend=backend, fullgraph=True)(x), expected)


@pytest.mark.slow
@every_family_once
def test_compiled_training(name: str) -> None:
    torch._dynamo.reset()
    model, x = alive(name), images()
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(x).square().mean().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    for key, reference in gradients[0].items():
        assert_near(gradients[1][key], reference, 1e-4)


@most_families_once
def test_exported(name: str) -> None:
    model, x = alive(name), images()
    exported = torch.export.export(model, (x,))
    with torch.no_grad():
        assert_near(exported.module()(x), model(x))
