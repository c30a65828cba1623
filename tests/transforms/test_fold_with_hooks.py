"""Folding and compacting of networks with hooks and replaced methods, all of which stay in effect."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

import widekernel
from tests.layers.helpers import assert_close, randomized
from widekernel.layers import FoldedLargeKernel, LargeKernel, PartialChannels
from widekernel.layers.alterations import alteration
from widekernel.layers.large_kernel import is_plain_relu
from widekernel.sparsity.semi_structured.controller import keep_in_evaluation
from widekernel.transforms.compaction import compact, compact_report

BLOCK = "stages.0.blocks.0"


def network(name: str) -> nn.Module:
    model = randomized(timm.create_model(name, num_classes=10))
    with torch.no_grad():
        for parameter in model.head.fc.parameters():
            parameter.normal_()
    return model


def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def output_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, output: output.tanh() * 2)


def input_hook(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda module, args: (args[0].tanh() * 2,))


def other_forward(layer: nn.Module) -> None:
    layer.forward = types.MethodType(lambda self, x: type(self).forward(self, x).tanh() * 2, layer)


WAYS = {"output_hook": output_hook, "input_hook": input_hook, "other_forward": other_forward}
FORMS = {"fold": widekernel.fold, "reparameterize": reparameterize_model, "compact": compact}
PLACES = [
    ("slak_nano", "mixer"),
    ("slak_nano", "mixer.norms.0"),
    ("slak_nano", "mlp"),
    ("slak_nano", "mlp.fc2"),
    ("slak_nano", "mlp.drop2"),
    ("replknet_nano", "prelkb_bn"),
    ("replknet_nano", "pw1"),
    ("replknet_nano", "pw1.conv"),
    ("replknet_nano", "pw2.bn"),
    ("replknet_nano", "large_kernel"),
    ("replknet_nano", "large_kernel.norms.1"),
    ("shiftwise_nano", "mixer"),
    ("shiftwise_nano", "mixer.layer"),
    ("shiftwise_nano", "norm"),
    ("shiftwise_nano", "norm2"),
    ("shiftwise_nano", "mlp.fc2"),
    ("shiftwise_v1_nano", "mixer"),
    ("unireplknet_nano", "mixer"),
    ("unireplknet_nano", "norm"),
    ("unireplknet_nano", "norm2"),
    ("unireplknet_nano", "mlp.norm"),
]


# One way a place, in turn, and all of them on a norm and on a convolution.
CASES = [
    (name, place, way)
    for i, (name, place) in enumerate(PLACES)
    for j, way in enumerate(WAYS)
    if i % 3 == j or place in ("mixer.norms.0", "pw1.conv")
]


@pytest.mark.parametrize(("name", "place", "way"), CASES)
@torch.no_grad()
def test_hooks_and_replaced_methods_stay_in_effect(name: str, place: str, way: str) -> None:
    model, x = network(name), pictures()
    before = model(x)
    WAYS[way](model.get_submodule(f"{BLOCK}.{place}"))
    want = model(x)
    assert (want - before).abs().max() > 1e-6 * before.abs().max()
    for form in FORMS.values():
        # timm folds block by block, so that names are those within one.
        path = "" if form is reparameterize_model else f"{BLOCK}.*"
        with pytest.warns(UserWarning, match=rf"not folded: .*{path}(forward|replaced)"):
            folded = form(model)
        assert_close(folded(x), want, 1e-9)
        assert alteration(folded.get_submodule(f"{BLOCK}.{place}"))
        assert any(isinstance(module, FoldedLargeKernel) for module in folded.modules())  # the others are folded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(widekernel.fold(widekernel.fold(model))(x), want, 1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["act", "pw1.act", "large_kernel"])
@torch.no_grad()
def test_hooks_and_replaced_methods_of_folded_networks_stay_in_effect(place: str, way: str) -> None:
    """The rectifier is not fused into the large kernel if either of them has a hook or a replaced method."""
    model, x = network("replknet_nano"), pictures()
    folded = widekernel.fold(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in (model, folded):
            WAYS[way](each.get_submodule(f"{BLOCK}.{place}"))
        assert_close(folded(x), model(x), 1e-9)
        assert_close(compact(folded)(x), model(x), 1e-9)


@pytest.mark.parametrize("place", ["mixer", "mixer.norms.0", "mlp.fc2"])
def test_backward_hooks_keep_firing(place: str) -> None:
    model, calls = network("slak_nano"), []
    model.get_submodule(f"{BLOCK}.{place}").register_full_backward_hook(lambda *args: calls.append(1))
    with pytest.warns(UserWarning, match=rf"{BLOCK}.* has a backward hook"):
        folded = widekernel.fold(model)
    folded(pictures()).sum().backward()
    assert calls == [1]


def test_hooks_on_blocks_and_networks_do_not_prevent_folding() -> None:
    model, seen = network("slak_nano"), []
    for part in (model, model.get_submodule(BLOCK), model.get_submodule(f"{BLOCK}.mlp.fc1")):
        part.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = widekernel.fold(model)
    assert not any(isinstance(module, LargeKernel) for module in folded.modules())
    assert folded.get_submodule(BLOCK).gamma is None
    folded(pictures())
    assert seen == ["Linear", "MixerBlock", "SLaK"]


@torch.no_grad()
def test_a_block_whose_forward_was_replaced_keeps_its_layer_scale() -> None:
    model, x = network("slak_nano"), pictures()
    block = model.get_submodule(BLOCK)
    block.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + self.gamma.view(1, -1, 1, 1), block)
    with pytest.warns(UserWarning, match=rf"{BLOCK} \(the forward of MixerBlock has been replaced\)$"):
        folded = widekernel.fold(model)
    assert_close(folded(x), model(x), 1e-9)


def test_hooks_that_only_compute_weights_do_not_prevent_folding() -> None:
    model = network("replknet_nano")
    block = model.get_submodule(BLOCK)
    nn.utils.weight_norm(block.pw1.conv)
    nn.utils.spectral_norm(block.pw2.conv)
    nn.utils.prune.l1_unstructured(block.prelkb_bn, "weight", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        folded = widekernel.fold(model)
    assert all(type(folded.get_submodule(f"{BLOCK}.{name}")) is nn.Identity for name in ("prelkb_bn", "pw1.bn", "pw2.bn"))
    assert_close(folded(x := pictures()), model.eval()(x), 1e-9)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["slak_nano", "shiftwise_nano"])
@torch.no_grad()
def test_a_parametrized_layer_scale_is_kept_and_named(name: str, form: str) -> None:
    model, x = network(name), pictures()
    parametrize.register_parametrization(model.get_submodule(BLOCK), "gamma", Doubled())
    called = "the layer" if form == "reparameterize" else BLOCK
    text = rf"{called} \(gamma is parametrized: call .*remove_parametrizations\(block, 'gamma'\)"
    with pytest.warns(UserWarning, match=text):
        folded = FORMS[form](model)
    assert_close(folded(x), model(x), 1e-9)
    parametrize.remove_parametrizations(model.get_submodule(BLOCK), "gamma")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(FORMS[form](model)(x), model(x), 1e-9)


# ---- Dead units


MLPS = [
    ("slak_nano", "mlp", "fc1", "fc2", ["fc1", "act", "drop1", "fc2"]),
    ("replknet_nano", "", "pw1.conv", "pw2.conv", ["pw1", "pw1.conv", "pw1.act", "pw2", "pw2.conv"]),
]


@pytest.mark.parametrize("way", ["output_hook", "other_forward"])
@pytest.mark.parametrize(("name", "mlp", "first", "second", "places"), MLPS)
@torch.no_grad()
def test_units_that_a_hook_could_revive_are_kept(
    name: str, mlp: str, first: str, second: str, places: list[str], way: str
) -> None:
    at = f"{BLOCK}.mlp" if mlp else "stages.0.blocks.1"
    for place in places:
        folded, x = widekernel.fold(network(name)), pictures()
        layer = folded.get_submodule(f"{at}.{first}")
        layer.weight[:3] = 0
        units = len(layer.weight)
        assert len(compact(folded).get_submodule(f"{at}.{first}").weight) == units - 3
        part = folded.get_submodule(f"{at}.{place}")
        if way == "output_hook":
            part.register_forward_hook(lambda module, args, output: output + 1 + args[0].mean())
        else:
            part.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + 1 + x.mean(), part)
        compacted = compact(folded)
        assert_close(compacted(x), folded(x), 1e-9)
        assert len(compacted.get_submodule(f"{at}.{first}").weight) == units
        row = next(row for row in compact_report(compacted) if row.name == at)
        assert row.reason.startswith("3 hidden units have zero weights but are kept: ")
        assert place in row.reason
        assert row.channels_kept == units


@torch.no_grad()
def test_kernels_with_hooks_are_not_compacted() -> None:
    folded, x = widekernel.fold(network("slak_nano")), pictures()
    mixer = folded.get_submodule(f"{BLOCK}.mixer")
    for kernel in mixer.kernels:
        kernel[:8] = 0
    output_hook(mixer)
    compacted = compact(folded)
    assert_close(compacted(x), folded(x), 1e-9)
    row = next(row for row in compact_report(compacted) if row.name == f"{BLOCK}.mixer")
    assert row.reason == "FoldedLargeKernel has a forward hook"


# ---- Gradients


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "shiftwise_nano", "roadmap_nano"])
def test_a_frozen_backbone_stays_frozen(name: str, form: str) -> None:
    model: Any = network(name).requires_grad_(False)
    model.head.fc.requires_grad_(True)
    found = {key for key, value in FORMS[form](model).named_parameters() if value.requires_grad}
    assert found == {"head.fc.weight", "head.fc.bias"}


def test_results_of_trained_parameters_are_trained() -> None:
    model: Any = network("replknet_nano").requires_grad_(False)
    block = model.get_submodule(BLOCK)
    block.pw2.bn.bias.requires_grad_(True)
    block.large_kernel.norms[1].weight.requires_grad_(True)
    found = {key for key, value in widekernel.fold(model).named_parameters() if value.requires_grad}
    assert found
    assert all(key.startswith((f"{BLOCK}.pw2.conv.", f"{BLOCK}.large_kernel.")) for key in found)
    assert {key.removeprefix(f"{BLOCK}.").split(".")[0] for key in found} == {"pw2", "large_kernel"}


def test_plain_rectifiers() -> None:
    act = nn.ReLU()
    assert is_plain_relu(act)
    other_forward(act)
    assert not is_plain_relu(act)


def test_partial_channels_with_a_hook_fold_their_layer() -> None:
    model = network("shiftwise_v1_nano")
    output_hook(model.get_submodule(f"{BLOCK}.mixer"))
    with pytest.warns(UserWarning, match="PartialChannels"):
        folded = widekernel.fold(model)
    mixer = folded.get_submodule(f"{BLOCK}.mixer")
    assert isinstance(mixer, PartialChannels)
    assert isinstance(mixer.layer, FoldedLargeKernel)


def test_norms_kept_in_evaluation_by_our_own_hook_are_folded() -> None:
    model = network("slak_nano")
    model.get_submodule(f"{BLOCK}.mixer.norms.0").register_forward_pre_hook(keep_in_evaluation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = widekernel.fold(model)
    assert isinstance(folded.get_submodule(f"{BLOCK}.mixer"), FoldedLargeKernel)
