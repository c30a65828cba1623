"""timm's `reparameterize_model` does what `fold` does."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import widekernel
from tests.models.zoo import NANO, alive, assert_near, assert_same_state, create, images, snapshot
from widekernel.errors import CheckpointError
from widekernel.layers import FoldedLargeKernel, LargeKernel


def _logits(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(images())


def _silently(model: nn.Module, **kwargs: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return reparameterize_model(model, **kwargs)


@pytest.mark.parametrize("name", NANO)
def test_it_folds(name: str) -> None:
    model = alive(name)
    before, want = snapshot(model), _logits(model)
    merged, folded = _silently(model), widekernel.fold(model)
    assert_same_state(merged.state_dict(), folded.state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in folded.modules()]
    assert_near(_logits(merged), want)
    assert_same_state(model.state_dict(), before)


NESTED = {
    "in_place": lambda model: _silently(model, inplace=True),
    "twice": lambda model: _silently(_silently(model)),
    "after_fold": lambda model: _silently(widekernel.fold(model)),
    "before_fold": lambda model: widekernel.fold(_silently(model)),
    "within_another": lambda model: _silently(nn.Sequential(nn.Sequential(model)))[0][0],
    "within_a_module": lambda model: _silently(nn.ModuleDict({"a": model}))["a"],
}


@pytest.mark.parametrize("how", NESTED)
@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano", "roadmap_nano"])
def test_nested_and_repeated(name: str, how: str) -> None:
    model = alive(name)
    want = _logits(model)
    merged = NESTED[how](model)
    assert_near(_logits(merged), want)
    assert not any(isinstance(module, LargeKernel) for module in merged.modules())
    with pytest.raises(CheckpointError, match="is folded"):
        widekernel.save_checkpoint(merged, "never.pth", layout="official")


def test_extractors_and_layers() -> None:
    model = alive("slak_nano", features_only=True)
    merged = _silently(model)
    for ours, theirs in zip(_logits(merged), _logits(model), strict=True):
        assert_near(ours, theirs)
    layer = copy.deepcopy(alive("slak_nano").stages[0].blocks[0].mixer)
    assert isinstance(_silently(nn.Sequential(layer))[0], FoldedLargeKernel)


def test_layers_that_cannot_be_merged_are_named() -> None:
    model = create("slak_pw_nano_truncated").eval()
    with pytest.warns(UserWarning, match="these layers were not folded: .*equals no single kernel near the borders"):
        merged = reparameterize_model(model)
    assert_near(_logits(merged), _logits(model))


def test_modes_and_frozen_parameters_stay() -> None:
    model = alive("slak_nano").requires_grad_(False).train()
    merged = _silently(model)
    assert all(module.training for module in merged.modules())
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_an_isotropic_network_without_layer_scale_is_unchanged(tmp_path: Any) -> None:
    """Nothing in it is folded, so it still has its official form."""
    model = widekernel.fold(alive("convnext_isotropic_nano"))
    path = widekernel.save_checkpoint(model, tmp_path / "a.pth", layout="official")
    other = timm.create_model("convnext_isotropic_nano")
    widekernel.load_checkpoint(other, path)
    assert_same_state(other.state_dict(), model.state_dict())
