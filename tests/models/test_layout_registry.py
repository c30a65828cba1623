"""The registry of layouts and signatures, and a family that registers its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

import widekernel
from tests.models.checkpoints import assert_refused, logits
from tests.models.zoo import NANO, alive, assert_same_state, create
from widekernel.errors import ArgumentError
from widekernel.layers import LargeKernel, Rectangles
from widekernel.models.base import Parts, StagedConvNet
from widekernel.models.blocks import MixerBlock, convnext_parts
from widekernel.models.builder import build_model, default_cfg
from widekernel.models.convnext_layouts import BLOCK, OFFICIAL_BLOCK, TAIL, backbone_rules, block_rules
from widekernel.models.layouts import registry
from widekernel.models.layouts.layout import Layout, Rule
from widekernel.models.layouts.registry import BLOCK_KEY, identify, register_layouts, register_signature
from widekernel.models.options import ModelOptions, StageSpec

# ---- A family of its own, as a new module would define it


@dataclass(frozen=True)
class ToyConfig:
    kernel_size: int = 9
    depths: tuple[int, ...] = (1, 1)
    dims: tuple[int, ...] = (8, 16)


class ToyNet(StagedConvNet):
    def parts(self, cfg: ToyConfig, options: ModelOptions) -> Parts:
        def make_block(i: int, width: int, rate: float, spec: StageSpec) -> nn.Module:
            source = Rectangles(width, [(cfg.kernel_size, 3), (3, cfg.kernel_size), (5, 5), (3, 3)])
            mixer = LargeKernel(source, [nn.BatchNorm2d(width) for _ in range(4)])
            return MixerBlock(mixer, width, rate, layer_scale=0.1, options=options)

        return convnext_parts(cfg.dims, options, make_block)


default_cfgs = generate_default_cfgs({"toynet_tiny.untrained": default_cfg(64, 8)})


@register_model
def toynet_tiny(pretrained: bool = False, **kwargs: Any) -> ToyNet:
    return build_model(ToyNet, "toynet_tiny", ToyConfig(), pretrained, kwargs)


def toy_layouts(model: ToyNet) -> tuple[Layout, ...]:
    layer, ours = f"{OFFICIAL_BLOCK}.toy", f"{BLOCK}.mixer"
    branches = (
        Rule(f"{layer}.conv{{k}}.weight", f"{ours}.source.kernels.{{k}}"),
        Rule(f"{layer}.bn{{k}}.{{rest}}", f"{ours}.norms.{{k}}.{{rest}}"),
    )
    rules = (*backbone_rules(len(model.cfg.dims)), *branches, *block_rules(OFFICIAL_BLOCK, BLOCK), *TAIL)
    return (Layout("ToyNet", rules, part_order=("downsample_layers", "stages", "toy", "norm", "head")),)


@pytest.fixture
def toynet(monkeypatch: pytest.MonkeyPatch) -> ToyNet:
    """Register the layouts of the family for one test, and create a network."""
    monkeypatch.setattr(registry, "_SIGNATURES", dict(registry._SIGNATURES))
    monkeypatch.setattr(registry, "_LAYOUTS", dict(registry._LAYOUTS))
    register_layouts(ToyNet)(toy_layouts)
    register_signature("ToyNet", r"^stages\.\d+\.\d+\.toy\.conv", "official")
    register_signature(
        "widekernel's ToyNet", rf"{BLOCK_KEY}mixer\.source\.kernels\.3$", "native", over=("widekernel's SLaK",)
    )
    return alive_toy()


def alive_toy(**kwargs: Any) -> ToyNet:
    model = timm.create_model("toynet_tiny", **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def test_official_files_of_a_new_family_load(toynet: ToyNet, tmp_path: Path) -> None:
    path = widekernel.save_checkpoint(toynet, tmp_path / "a.pth", layout="official")
    keys = list(torch.load(path)["model"])
    assert keys[0] == "downsample_layers.0.0.weight"
    assert "stages.0.0.toy.conv1.weight" in keys and "stages.1.0.toy.bn0.running_mean" in keys
    other = alive_toy()
    report = widekernel.load_checkpoint(other, path)
    assert report.layout == "ToyNet"
    assert not (report.missing or report.ignored or report.dropped)
    assert_same_state(other.state_dict(), toynet.state_dict())
    assert torch.equal(logits(other), logits(toynet))


def test_errors_name_the_new_family(toynet: ToyNet, tmp_path: Path) -> None:
    official = widekernel.save_checkpoint(toynet, tmp_path / "a.pth", layout="official")
    native = widekernel.save_checkpoint(toynet, tmp_path / "a.safetensors")
    assert_refused(create("slak_nano"), official, "holds ToyNet, but the model is a SLaK")
    # Its keys match the signature of SLaK too, which has three branches at most.
    assert_refused(create("replknet_nano"), native, "holds widekernel's ToyNet, but the model is a RepLKNet")
    slak = widekernel.save_checkpoint(create("slak_nano"), tmp_path / "b.safetensors")
    message = assert_refused(toynet, slak, r"holds widekernel's SLaK, but the model is a ToyNet \(widekernel's ToyNet\)")
    assert "which takes official weights of ToyNet: create the matching model" in message


def test_new_family_folds_and_extracts_features(toynet: ToyNet) -> None:
    torch.testing.assert_close(logits(widekernel.fold(toynet)), logits(toynet), rtol=1e-4, atol=1e-5)
    maps = timm.create_model("toynet_tiny", features_only=True)(torch.randn(1, 3, 64, 64))
    assert [tuple(feature.shape[1:]) for feature in maps] == [(8, 16, 16), (16, 8, 8)]


# ---- The registry


def test_subclasses_have_the_layouts_of_their_family() -> None:
    class Subclass(type(create("slak_nano"))):  # type: ignore[misc]
        pass

    model = create("slak_nano")
    model.__class__ = Subclass
    assert [layout.family for layout in registry.layouts_of(model)] == ["SLaK"]
    assert registry.layouts_of(nn.Linear(2, 2)) == ()


def test_a_signature_is_registered_once(toynet: ToyNet) -> None:
    register_signature("ToyNet", r"^stages\.\d+\.\d+\.toy\.conv", "official")
    with pytest.raises(ArgumentError, match="signature 'ToyNet' is already registered with other keys"):
        register_signature("ToyNet", "another", "official")
    with pytest.raises(ArgumentError, match=r"form 'foreing' is unknown: .*Did you mean 'foreign'"):
        register_signature("another", "another", "foreing")  # type: ignore[arg-type]


@pytest.mark.parametrize("folded", [False, True], ids=["training", "folded"])
@pytest.mark.parametrize("name", NANO)
def test_signatures_do_not_depend_on_their_order(name: str, folded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = widekernel.fold(alive(name)) if folded else create(name)
    found = identify(model.state_dict())
    monkeypatch.setattr(registry, "_SIGNATURES", dict(reversed(registry._SIGNATURES.items())))
    assert identify(model.state_dict()) == found is not None
