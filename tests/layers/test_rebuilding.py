"""Layers that are configured like others, and replacement of modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.layers.helpers import assert_close
from widekernel.layers import DepthwiseConv2d, PointwiseConv2d, PointwiseLinear
from widekernel.layers.rebuilding import is_plain, layer_like
from widekernel.layers.replacing import replace_modules, with_submodule
from widekernel.layers.sources import tensors_of

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 4),
    "pointwise linear": lambda: PointwiseLinear(6, 4, bias=False),
    "convolution": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
    "depthwise": lambda: DepthwiseConv2d(6, 6, 5, padding="same", groups=6, bias=False),
    "pointwise": lambda: PointwiseConv2d(6, 4, 1),
}
EACH = pytest.mark.parametrize("name", LAYERS)


def configuration(layer: nn.Module) -> tuple[Any, ...]:
    flags = [(key, p.shape, p.dtype, p.requires_grad) for key, p in layer.named_parameters()]
    return type(layer), layer.extra_repr(), layer.training, flags


@EACH
def test_a_layer_like_another_one(name: str) -> None:
    layer = LAYERS[name]().double().eval()
    layer.weight.requires_grad_(False)
    layer.register_forward_hook(lambda *_: pytest.fail("a hook was copied"))
    state = torch.get_rng_state()
    bias = None if layer.bias is None else layer.bias + 1
    new = layer_like(layer, 2 * layer.weight.float(), bias)
    assert torch.equal(torch.get_rng_state(), state)
    assert configuration(new) == configuration(layer)
    assert_close(new.weight, 2 * layer.weight.float().double())
    new(torch.randn(2, 6, 9, 9).double() if isinstance(layer, nn.Conv2d) else torch.randn(2, 6).double())


@EACH
def test_weights_that_fit_are_not_copied(name: str) -> None:
    layer = LAYERS[name]()
    new = layer_like(layer, layer.weight, layer.bias)
    assert new.weight is not layer.weight
    assert new.weight.data_ptr() == layer.weight.data_ptr()


def test_sizes_follow_from_the_weights() -> None:
    linear = layer_like(nn.Linear(6, 4), torch.zeros(3, 5), torch.zeros(3))
    assert (linear.in_features, linear.out_features) == (5, 3)
    conv = layer_like(nn.Conv2d(6, 4, 1, groups=2, bias=False), torch.zeros(8, 2, 1, 1), torch.zeros(8))
    assert (conv.in_channels, conv.out_channels, conv.groups, conv.bias.numel()) == (4, 8, 2, 8)


def test_another_class() -> None:
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    new = layer_like(layer, layer.weight, layer.bias, DepthwiseConv2d)
    x = torch.randn(2, 6, 8, 8)
    assert type(new) is DepthwiseConv2d
    assert_close(new(x), layer(x))


def test_parametrized_layers_are_rebuilt_as_plain_ones() -> None:
    layer = parametrizations.weight_norm(PointwiseLinear(6, 4))
    assert is_plain(layer)
    new = layer_like(layer, layer.weight, layer.bias)
    x = torch.randn(2, 6)
    assert type(new) is PointwiseLinear
    assert_close(new(x), layer(x))


def test_modules_that_are_shared_are_replaced_once() -> None:
    shared, asked = nn.ReLU(), []
    model = nn.Sequential(shared, nn.Sequential(shared, nn.Tanh()), nn.ModuleDict({"a": shared}))

    def replace(module: nn.Module, name: str) -> tuple[nn.Module, bool]:
        asked.append(name)
        return (nn.GELU(), False) if isinstance(module, nn.ReLU) else (module, not isinstance(module, nn.ModuleDict))

    assert replace_modules(model, replace) is model
    assert asked == ["", "0", "1", "1.1", "2"]
    assert isinstance(model[0], nn.GELU)
    assert model[0] is model[1][0]
    assert model[2]["a"] is shared  # the dict was not to be looked at


def test_replacements_are_visited_too() -> None:
    def replace(module: nn.Module, _: str) -> tuple[nn.Module, bool]:
        kinds = {nn.ReLU: lambda: nn.Sequential(nn.Tanh()), nn.Tanh: nn.Sigmoid}
        return (kinds[type(module)]() if type(module) in kinds else module), True

    assert str(replace_modules(nn.ReLU(), replace)) == str(nn.Sequential(nn.Sigmoid()))


@pytest.mark.parametrize("name", ["1", "0.0"])
def test_a_copy_with_another_submodule(name: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Tanh()), nn.ReLU())
    before = str(model)
    new = with_submodule(model, name, nn.GELU())
    assert str(model) == before
    assert isinstance(new.get_submodule(name), nn.GELU)
    assert new.get_submodule("0.1") is model.get_submodule("0.1")


def kernels(count: int) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.randn(2, 1, 3, 3)) for _ in range(count))


def assert_holds(held: list[Tensor], parameters: nn.ParameterList) -> None:
    assert len(held) == len(parameters)
    assert all(a is b for a, b in zip(held, parameters))


@pytest.mark.parametrize("count", [0, 1, 12, 16, 17, 20])
def test_lists_of_parameters(count: int) -> None:
    given = kernels(count)
    assert_holds(tensors_of(given), given)


def test_lists_of_parameters_after_changes() -> None:
    given = kernels(3)
    given[1] = nn.Parameter(torch.zeros(2, 1, 5, 5))
    assert_holds(tensors_of(given), given)
    prune.random_unstructured(given, "1", 0.5)
    assert_holds(tensors_of(given), given)
    prune.remove(given, "1")
    assert_holds(tensors_of(given), given)
    given.append(nn.Parameter(torch.zeros(2, 1, 1, 1)))
    assert_holds(tensors_of(given), given)


def test_lists_of_parametrized_tensors() -> None:
    given = kernels(2)
    parametrizations.weight_norm(given, "0")
    for a, b in zip(tensors_of(given), given):
        assert torch.equal(a, b)
