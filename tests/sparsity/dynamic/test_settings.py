"""Settings that are refused, and parameters that are masked."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from tests.sparsity.nets import quick, small_net, train_step
from widekernel.errors import ArgumentError
from widekernel.sparsity import (
    DynamicSparsity,
    DynamicSparsityConfig,
    published_shiftwise,
    published_slak,
)
from widekernel.sparsity.selection import select

# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0, but must be from 0 to below 1"),
        ({"sparsity": -0.1}, "from 0 to below 1"),
        ({"sparsity": float("nan")}, "from 0 to below 1"),
        ({"init": "snipp"}, "Did you mean 'snip'"),
        ({"growth": "grad"}, "one of 'random', 'gradient'"),
        ({"growth": "gradients"}, "Did you mean 'gradient'"),
        ({"prune": "magnitud"}, "Did you mean 'magnitude'"),
        ({"prune_schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"rule": "exct"}, "Did you mean 'exact'"),
        ({"layers": "large_kernels_only"}, "Did you mean 'large_kernel_only'"),
        ({"block": "kernels"}, "Did you mean 'kernel'"),
        ({"block": (3, 0)}, "two positive integers"),
        ({"block": (3, 3, 3)}, "two positive integers"),
        ({"prune_fraction": 1.5}, "from 0 to 1"),
        ({"stop_fraction": 0.0}, "above 0 and at most 1"),
        ({"momentum": 1.0}, "from 0 to below 1"),
        ({"update_interval": 0}, "whole number, at least 1"),
        ({"update_interval": 2.5}, "whole number, at least 1"),
        ({"total_steps": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
        ({"initial_sparsity": 0.9, "total_steps": 9}, "at most 0.4"),
        ({"min_fan_in": 1, "block": "kernel"}, "use block='element'"),
        ({"block": "semi_structured"}, "set sparsity=0.5"),
        ({"rule": "published", "min_fan_in": 1}, "use rule='exact'"),
        ({"exclude": ("",)}, "patterns of parameter names"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message.replace("(", r"\(")):
        DynamicSparsityConfig(**settings)


@pytest.mark.parametrize("settings", [{"prune_schedule": "cosine"}, {"initial_sparsity": 0.1}])
def test_schedules_need_the_length_of_the_training(settings: dict) -> None:
    model = small_net()
    with pytest.raises(ArgumentError, match="set total_steps"):
        DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.1), quick(**settings))


def test_settings_as_plain_values() -> None:
    config = quick(layers=["a.*"], block=[3, 3])
    assert DynamicSparsityConfig(**config.to_dict()) == config
    assert config.layers == ("a.*",) and config.block == (3, 3)
    assert DynamicSparsityConfig(layers="stages.*").layers == ("stages.*",)
    assert DynamicSparsityConfig(layers="fc.weight, a.*", exclude="b.*,c").layers == ("fc.weight", "a.*")
    assert DynamicSparsityConfig(exclude="b.*,c").exclude == ("b.*", "c")


def test_published_settings() -> None:
    assert published_slak(0.4).rule == published_shiftwise().rule == "published"
    assert published_slak(0.4, total_steps=10).prune_schedule == "cosine"
    assert published_shiftwise().block == "kernel" and published_shiftwise().share_every == 131
    assert published_slak(0.4, prune_fraction=0.5).prune_fraction == 0.5


# -- selection ---------------------------------------------------------------------------------------------------------


def test_every_parameter_is_listed_with_a_reason() -> None:
    model = small_net()
    choices = {choice.name: choice for choice in select(model, "all")}
    assert list(choices) == [name for name, _ in model.named_parameters()]
    masked = {name for name, choice in choices.items() if choice.masked}
    assert masked == {name for name, p in model.named_parameters() if p.dim() > 1 and name != "gamma"}
    assert choices["gamma"].reason == "scales or shifts channels"
    large = {choice.name for choice in select(model, "large_kernel_only") if choice.masked}
    assert large == {"strips.source.kernels.0", "strips.source.kernels.1", "tiles.source.tiles.0", "tiles.source.tiles.1"}
    some = {choice.name: choice.reason for choice in select(model, ["fc.*", "head.weight"], ["fc.*"])}
    assert some["fc.weight"] == "excluded by name" and not some["head.weight"]
    assert some["stem.weight"] == "not among the layers named"


@pytest.mark.parametrize("name", ["replknet_31b", "slak_pww_tiny", "slak_reg_tiny", "shiftwise_tiny", "convnext_atto"])
def test_large_kernels_of_the_families(name: str) -> None:
    model = timm.create_model(name, num_classes=2)
    chosen = [choice for choice in select(model, "large_kernel_only") if choice.masked]
    assert chosen and all(len(choice.shape) == 4 and choice.shape[1] == 1 for choice in chosen)
    small = [choice for choice in select(model, "large_kernel_only") if "gates" in choice.name]
    assert not any(choice.masked for choice in small)
    if name == "replknet_31b":
        assert {choice.shape[2:] for choice in chosen} == {(31, 31), (29, 29), (27, 27), (13, 13)}


def test_embeddings_and_other_kinds_stay_dense() -> None:
    model = nn.ModuleDict(
        {"e": nn.Embedding(5, 4), "l": nn.Linear(4, 4), "c": nn.Conv1d(2, 3, 3)} | {"b": nn.Bilinear(2, 3, 4)}
    )
    reasons = {choice.name: choice.reason for choice in select(model, "all")}
    assert reasons["e.weight"] == "is an embedding" and not reasons["l.weight"] and not reasons["c.weight"]
    assert reasons["b.weight"] == "has 3 dimensions and belongs to no convolution"


def test_nothing_to_mask_is_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ArgumentError, match=r"no layer that can be masked \(2 x scales or shifts channels\)"):
        DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.1), quick())
    frozen = small_net().requires_grad_(False)
    with pytest.raises(ArgumentError, match="is frozen"):
        DynamicSparsity(frozen, torch.optim.SGD(frozen.parameters(), 0.1), quick())
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(ArgumentError, match="no layer has groups of four input channels"):
        DynamicSparsity(net, torch.optim.SGD(net.parameters(), 0.1), quick(block="semi_structured"))


def test_patterns_that_match_nothing_maskable_are_errors() -> None:
    model = small_net()
    model.fc.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ArgumentError, match=r"names fc.weight, which cannot be masked: it is frozen"):
        DynamicSparsity(model, optimizer, quick(layers=["fc.*"]))
    with pytest.raises(ArgumentError, match=r"'nothing\.\*' matches no parameter"):
        DynamicSparsity(model, optimizer, quick(layers=["nothing.*"]))
    with pytest.raises(ArgumentError, match="matches no parameter"):
        DynamicSparsity(model, optimizer, quick(exclude=["nothing"]))


def test_frozen_parameters_stay_as_they_are() -> None:
    model = small_net()
    model.fc.requires_grad_(False)
    before = model.fc.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    controller = DynamicSparsity(model, optimizer, quick())
    for step in range(4):
        train_step(model, optimizer, step)
    assert "fc.weight" not in controller.masks and torch.equal(model.fc.weight, before)
    assert next(choice.reason for choice in controller.selection if choice.name == "fc.weight").startswith("is frozen")


def test_shared_parameters_are_an_error() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ArgumentError, match=r"a\.weight and b\.weight are one shared parameter"):
        DynamicSparsity(model, optimizer, quick())
    assert set(DynamicSparsity(model, optimizer, quick(exclude=["a.weight"])).masks) == {"c.weight"}


def test_an_optimizer_of_another_network_is_an_error() -> None:
    model = small_net()
    with pytest.raises(ArgumentError, match=r"does not train 8 of the 8 masked parameters, such as stem\.weight"):
        DynamicSparsity(model, torch.optim.SGD(small_net().parameters(), 0.1), quick())
    others = [p for name, p in model.named_parameters() if name != "head.weight"]
    with pytest.raises(ArgumentError, match="does not train 1 of the 8"):
        DynamicSparsity(model, torch.optim.SGD(others, 0.1), quick())
    with pytest.raises(ArgumentError, match=r"give a torch\.optim\.Optimizer"):
        DynamicSparsity(model, model.parameters(), quick())


def test_two_controllers_of_one_parameter_are_an_error() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = DynamicSparsity(model, optimizer, quick(layers="fc.*"))
    DynamicSparsity(model, optimizer, quick(layers="head.*"))
    with pytest.raises(ArgumentError, match=r"fc\.weight is masked by another DynamicSparsity"):
        DynamicSparsity(model, optimizer, quick(layers="fc.*, stem.*"))
    first.remove()
    DynamicSparsity(model, optimizer, quick(layers="fc.*, stem.*"))


def test_an_optimizer_without_hooks_is_an_error() -> None:
    from timm.optim import Lookahead

    model = small_net()
    with pytest.raises(ArgumentError, match="Lookahead calls no hooks"):
        DynamicSparsity(model, Lookahead(torch.optim.SGD(model.parameters(), 0.1)), quick())
