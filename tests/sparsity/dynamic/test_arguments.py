"""Arguments of the wrong kind, whose errors say what to give; and names as users write them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.sparsity.nets import controlled, data, quick, small_net
from widekernel.errors import ArgumentError
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig
from widekernel.sparsity.selection import select


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": "0.4"}, "sparsity is '0.4', but must be a number, such as 0.5"),
        ({"sparsity": None}, "sparsity is None, but must be a number"),
        ({"prune_fraction": "0.4"}, "prune_fraction is '0.4', but must be a number"),
        ({"stop_fraction": None}, "stop_fraction is None, but must be a number"),
        ({"momentum": True}, "momentum is True, but must be a number"),
        ({"initial_sparsity": "0.1", "total_steps": 9}, "initial_sparsity is '0.1', but must be a number"),
        ({"regrow": "no"}, "regrow='no' must be True or False"),
        ({"block": 3}, r"block=3 must be one of .*such as \(3, 3\)"),
        ({"block": None}, "block=None must be one of"),
        ({"layers": []}, r"layers=\[\] selects nothing"),
        ({"layers": ","}, r"layers=\(\) selects nothing"),
        ({"layers": ""}, "layers '' is unknown"),
        ({"layers": None}, "layers=None must hold patterns"),
        ({"exclude": 3}, "exclude=3 must hold patterns"),
    ],
)
def test_settings_of_the_wrong_kind(settings: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DynamicSparsityConfig(**settings)


def test_a_module_stands_for_its_parameters() -> None:
    def masked(*arguments) -> set[str]:
        return {choice.name for choice in select(small_net(), *arguments) if choice.masked}

    assert masked(["fc"]) == masked(DynamicSparsityConfig(layers="fc").layers) == {"fc.weight"}
    assert masked("all") - masked("all", ["strips"]) == {f"strips.source.kernels.{i}" for i in range(3)}
    assert masked("all") - masked("all", ["strips.source"]) == masked("all") - masked("all", ["strips"])
    with pytest.raises(ArgumentError, match=r"'head.fc' matches no parameter.*Did you mean 'head'"):
        select(small_net(), ["head.fc"])


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"exclude=\['\*'\] leaves nothing .* excludes 8 parameters that could be"):
        select(small_net(), "all", ["*"])
    with pytest.raises(ArgumentError, match=r"exclude=\['fc'\] leaves nothing .* excludes 1 param"):
        select(small_net(), ["fc.*"], ["fc"])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (data(0)[0], r"batch is a Tensor: give a pair, batch=\(inputs, targets\)"),
        (data(0, 2)[0], "batch is a Tensor"),  # of length two
        ([data(0)[0]], "batch is a list of 1"),
        ("x", "batch is a str of 1"),
        ((data(0)[0], data(0)[1].float()), r"the targets are torch.float32 \(4,\).*targets.long"),
        ((data(0)[0], data(0)[1].tolist()), "the targets a list"),
    ],
)
def test_batches_of_the_wrong_kind(batch, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        controlled(quick(init="snip"), batch=batch)


def test_class_probabilities_and_other_losses_are_accepted() -> None:
    images, _ = data(0)
    assert controlled(quick(init="snip"), batch=(images, torch.full((4, 4), 0.25)))[2].masks
    other = torch.nn.functional.mse_loss
    assert controlled(quick(init="snip"), batch=[images, torch.ones(4, 4)], loss=other)[2].masks


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"fc.weight": np.ones((12, 8), bool)}, "the mask of fc.weight is a ndarray: give a bool tensor"),
        ([torch.ones(12, 8)], "masks is a list: give a dict"),
    ],
)
def test_masks_of_the_wrong_kind(masks, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        controlled(quick(), masks=masks)


def test_a_network_without_values_is_refused() -> None:
    model = small_net().to("meta")
    for init in ("snip", "uniform", "magnitude"):
        with pytest.raises(ArgumentError, match=r"stem.weight is on the meta device .*to_empty"):
            DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.1), quick(init=init))
