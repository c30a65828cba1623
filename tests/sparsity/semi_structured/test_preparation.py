"""Layers that become 2:4, and the reasons why others stay dense."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import widekernel  # noqa: F401
from tests.sparsity.nets import check_same_network
from widekernel.errors import ArgumentError
from widekernel.layers import DepthwiseConv2d
from widekernel.sparsity import semi_structured as ss


class Doubled(nn.Linear):
    """A subclass with its own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 16)
        self.out = nn.Linear(16, 16, bias=False)
        self.out.weight = self.embedding.weight
        self.plain = nn.Linear(16, 16)


def rows(controller: ss.SemiStructured) -> dict[str, ss.LayerReport]:
    return {row.name: row for row in controller.report}


def test_every_layer_is_reported() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(16, 8, 3),
            "linear": nn.Linear(16, 8),
            "subclass": Doubled(16, 8),
            "ours": DepthwiseConv2d(32, 32, 7, padding=3, groups=32),
            "depthwise": nn.Conv2d(32, 64, 3, groups=32),
            "grouped": nn.Conv2d(32, 32, 3, groups=2),
            "stem": nn.Conv2d(3, 32, 4),
            "narrow": nn.Linear(32, 7),
            "normed": parametrizations.weight_norm(nn.Linear(16, 16)),
            "meta": nn.Linear(16, 16, device="meta"),
            "lazy": nn.LazyLinear(16),
            "skipped": nn.Linear(16, 16),
            "norm": nn.BatchNorm2d(3),
        }
    )
    untouched = {name: copy.deepcopy(model[name].state_dict()) for name in ("ours", "grouped", "stem", "skipped")}
    report = rows(ss.prepare(model, ss.SemiStructuredConfig(exclude=("skip*",))))
    assert [name for name, row in report.items() if row.masked] == ["conv", "linear", "subclass"]
    reasons = {name: row.reason for name, row in report.items()}
    assert reasons["ours"] == reasons["depthwise"] and reasons["ours"].startswith("depthwise: with one input channel")
    assert reasons["grouped"] == "grouped (2 groups)"
    assert reasons["stem"] == "too small: 3 input channels, fewer than min_in_channels=16"
    assert reasons["narrow"] == "too small: 7 output channels, fewer than min_out_channels=8"
    assert reasons["normed"] == "its weight is parametrized already"
    assert reasons["meta"] == "its weight has no data (meta device)" and reasons["lazy"] == "its weight has no data yet"
    assert reasons["skipped"] == "excluded"
    assert report["conv"].groups == 8 * 9 * 4 and report["conv"].shape == (8, 16, 3, 3) and 0.6 < report["conv"].kept < 0.9
    for name, before in untouched.items():
        assert all(torch.equal(value, before[key]) for key, value in model[name].state_dict().items())


def test_magnitude_masks_are_zeros_in_plain_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 16))
    before = copy.deepcopy(model.state_dict())
    parameters = [id(parameter) for parameter in model.parameters()]
    controller = ss.prepare(model)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert list(model.state_dict()) == list(before) and all(parameter.requires_grad for parameter in model.parameters())
    for name, mask in controller.masks.items():
        assert torch.equal(mask, ss.magnitude_mask(before[name]))
        assert torch.equal(model.get_parameter(name), torch.where(mask, before[name], 0))
    assert controller.parameters() == [] and float(controller.regularization()) == 0 and not controller.is_learned


def test_masks_hold_in_training() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    controller = ss.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        with pytest.raises(ArgumentError, match=r"0\.weight is not 2:4"):
            ss.convert(model)
        controller.apply_masks()
        assert ss.validate(model) == ("0.weight", "2.weight")
    assert torch.equal(model[0].weight != 0, controller.masks["0.weight"])


def test_state_of_fixed_masks() -> None:
    torch.manual_seed(1)
    first = nn.Sequential(nn.Linear(16, 8))
    state = ss.prepare(first).state_dict()
    second = nn.Sequential(nn.Linear(16, 8))
    nn.init.ones_(second[0].weight)
    controller = ss.prepare(second)
    nn.init.ones_(second[0].weight)
    controller.load_state_dict(state)
    assert torch.equal(second[0].weight != 0, first[0].weight != 0)


def test_layers_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 16))
    report = rows(ss.prepare(model, ss.SemiStructuredConfig(layers=("0", "[2-9]"))))
    assert [row.masked for row in report.values()] == [True, False, True]
    assert report["1"].reason == "not among the selected layers"


def test_a_network_of_one_layer() -> None:
    layer = nn.Linear(16, 8)
    controller = ss.prepare(layer)
    assert list(controller.masks) == ["weight"] and ss.validate(ss.convert(layer)) == ("weight",)


@pytest.mark.parametrize("kind", [DepthwiseConv2d, nn.Conv2d])
def test_depthwise_layers_selected_by_name_are_an_error(kind: type[nn.Conv2d]) -> None:
    model = nn.ModuleDict({"mixer": kind(32, 32, 7, groups=32), "pw": nn.Conv2d(32, 32, 1)})
    with pytest.raises(ArgumentError, match=r"selected but cannot be 2:4: mixer \(depthwise"):
        ss.prepare(model, ss.SemiStructuredConfig(layers=("mixer", "pw")))
    with pytest.raises(ArgumentError, match=r"no layer of the ModuleDict can be 2:4: mixer: depthwise.*pw: not among"):
        ss.prepare(model, ss.SemiStructuredConfig(layers=("mix*",)))


def test_taps_are_for_depthwise_layers_only() -> None:
    model = nn.ModuleDict({"mixer": nn.Conv2d(32, 32, 7, groups=32), "pw": nn.Conv2d(32, 32, 1)})
    controller = ss.prepare(model, ss.SemiStructuredConfig(axis="taps"))
    assert list(controller.masks) == ["mixer.weight"]
    assert rows(controller)["pw"].reason == "axis='taps' is for depthwise layers"
    ss.validate(model)


def test_grouped_layers_have_paper_groups() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=2))
    ss.prepare(model, ss.SemiStructuredConfig(axis="im2col"))
    ss.validate(model[0].weight, "im2col", 2)


def test_errors() -> None:
    with pytest.raises(ArgumentError, match="no layer of the Sequential can be 2:4: it has no Conv2d and no Linear"):
        ss.prepare(nn.Sequential(nn.ReLU()))
    model = nn.ModuleDict({"conv": nn.Conv2d(16, 8, 3), "norm": nn.BatchNorm2d(3)})
    with pytest.raises(ArgumentError, match=r"'conf' matches no Conv2d or Linear of the network\. Did you mean 'conv'\?"):
        ss.prepare(model, ss.SemiStructuredConfig(layers=("conf",)))
    with pytest.raises(ArgumentError, match="'norm' is a BatchNorm2d: only Conv2d and Linear"):
        ss.prepare(model, ss.SemiStructuredConfig(layers=("norm",)))
    with pytest.raises(ArgumentError, match="method='magnitude' has none: use method='learned'"):
        ss.prepare(model, logits={})
    with pytest.raises(ArgumentError, match="starts from logits"):
        ss.prepare(model, ss.SemiStructuredConfig("learned"), choices={})
    with pytest.raises(ArgumentError, match=r"masks were given for fc\.weight, which are not weights"):
        ss.prepare(model, choices={"fc.weight": torch.zeros(4, dtype=torch.uint8)})
    with pytest.raises(ArgumentError, match=r"choices of conv\.weight are .* has 288 groups"):
        ss.prepare(model, choices={"conv.weight": torch.zeros(4, dtype=torch.uint8)})
    ss.prepare(model)
    with pytest.raises(ArgumentError, match="was prepared before: convert it first"):
        ss.prepare(model)


def test_a_refused_network_is_unchanged() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(16, 8, 3)})
    before = model["conv"].weight.detach().clone()
    for given in (
        {"conv.weight": torch.zeros(4, dtype=torch.uint8)},
        {"conv.weight": torch.full((288,), 9, dtype=torch.uint8)},
    ):
        with pytest.raises(ArgumentError):
            ss.prepare(model, choices=given)
    assert torch.equal(model["conv"].weight, before) and model["conv"].weight.requires_grad


@pytest.mark.parametrize("method", ["magnitude", "permuted", "learned"])
def test_shared_weights_stay_dense(method: str) -> None:
    model = Tied()
    report = rows(ss.prepare(model, ss.SemiStructuredConfig(method)))
    assert report["out"].reason == "its weight is shared with another layer" and report["plain"].masked
    assert model.out.weight is model.embedding.weight and bool((model.out.weight != 0).all())


@pytest.mark.parametrize("method", ["magnitude", "learned"])
def test_a_module_in_two_places_is_masked_once(method: str) -> None:
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    ss.prepare(model, ss.SemiStructuredConfig(method))
    plain = ss.convert(model.eval())
    assert plain[0] is plain[2]
    check_same_network(plain, model, torch.randn(2, 16))


@pytest.mark.parametrize("name", ["slak_tiny", "resnet26d", "vit_tiny_patch16_224", "shiftwise_tiny"])
@pytest.mark.parametrize("method", ["magnitude", "learned"])
@pytest.mark.full
def test_networks(name: str, method: str) -> None:
    model = timm.create_model(name, num_classes=16).eval()
    controller = ss.prepare(model, ss.SemiStructuredConfig(method))
    assert sum(row.masked for row in controller.report) >= 10
    plain = ss.convert(model)
    check_same_network(plain, model, torch.randn(1, 3, 224, 224))
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())
    ss.validate(plain)


def test_standardized_weights_stay_dense() -> None:
    from timm.layers import StdConv2d

    report = rows(ss.prepare(nn.ModuleDict({"a": StdConv2d(16, 16, 3), "b": nn.Conv2d(16, 16, 3)})))
    assert "standardizes" in report["a"].reason and report["b"].masked
