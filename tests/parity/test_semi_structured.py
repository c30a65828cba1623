"""The official 2:4 layers and networks (Danhofer, arXiv 2411.00288) against ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.parity.reference import assert_close, filler, images, manifest, weights
from widekernel.errors import CheckpointError
from widekernel.sparsity import semi_structured as ss
from widekernel.sparsity.semi_structured.grouping import group_count, paper_padding, ungroup
from widekernel.sparsity.semi_structured.learned import gumbel_mask
from widekernel.sparsity.semi_structured.masks import check_semi_structured
from widekernel.sparsity.semi_structured.patterns import PATTERNS

LAYERS = [
    *(
        "a3x3",
        "a3x3_blocked",
        "stem4_blocked_bias",
        "c1x1_s2",
        "grouped",
        "grouped_bias",
        "grouped_blocked",
        "odd_input_aug",
    ),
    *("odd_output_aug", "odd_input_aug_bias", "odd_input_aug_blocked", "odd_noaug", "dw7_aug", "dw7_aug_blocked"),
    "dense_sparse2x4_off",
]
MODELS = ["resnet18", "resnet50", "convnext_T"]


class Case:
    """A golden case of one convolution: its geometry, weights, noise and expected arrays."""

    def __init__(self, shared: Path, golden: Path, name: str) -> None:
        listed = json.loads((golden / "sparse24_layers.json").read_text())
        self.name, self.seed = name, listed["seed"]
        self.info = next(case for case in listed["cases"] if case["name"] == name)
        self.conv = self.info["conv"]
        self.groups = self.conv.get("g", 1)
        self.arrays = np.load(golden / "sparse24_layers.npz")
        self.fill = filler(shared)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[f"{self.name}.{key}"])

    def filled(self, key: str, shape: list[int]) -> Tensor:
        return torch.from_numpy(np.array(self.fill.fill_one(f"{self.name}.{key}", shape, self.seed)))

    def layer(self) -> nn.Conv2d:
        conv = self.conv
        sizes = {"stride": conv.get("s", 1), "padding": conv.get("p", 0), "groups": self.groups}
        layer = nn.Conv2d(conv["in"], conv["out"], conv["k"], bias=conv.get("b", False), **sizes)
        with torch.no_grad():
            layer.weight.copy_(self.filled("conv.weight", list(layer.weight.shape)))
            if layer.bias is not None:
                layer.bias.copy_(self.filled("conv.bias", list(layer.bias.shape)))
        return layer

    def official_state(self) -> dict[str, Tensor]:
        """Return the layer as the official code stores it, as layer `0` of a network."""
        state = {}
        for key, shape, _ in self.info["keys"]:
            if key.startswith(("Ws.", "bs.")) or key in ("W", "b"):
                state[f"0.{key}"] = self._stored(key, shape)
            else:
                state[f"0.{key}"] = self.filled(key, shape)
        return state

    def _stored(self, key: str, shape: list[int]) -> Tensor:
        layer = self.layer()
        parts = layer.weight.detach().reshape(self.groups, layer.out_channels // self.groups, -1)
        if key.startswith("bs.") or key == "b":
            biases = layer.bias.detach().reshape(self.groups, -1)
            return biases.flatten() if key == "b" else biases[int(key[3:])]
        rows, columns = (shape[0] // self.groups, shape[1] // self.groups) if key == "W" else shape
        padded = [F.pad(part, (0, columns - part.shape[1], 0, rows - part.shape[0])) for part in parts]
        return torch.block_diag(*padded) if key == "W" else padded[int(key[3:])]

    def padded_mask(self, mask: Tensor) -> Tensor:
        """Return a (G, 4) mask as the official array (groups, out, in), including padding."""
        return mask.reshape(self["mask"].shape)


def run(case: Case) -> dict[str, Tensor]:
    """Run our masked convolution forward and backward with the given logits and noise."""
    layer = case.layer()
    shape, groups = layer.weight.shape, case.groups
    logits = case["choice_weights"].clone().requires_grad_()
    x = case["x"].clone().requires_grad_()
    drawn = gumbel_mask(logits, case["gumbel"])
    mask = ungroup(drawn, shape, "im2col", groups)
    y = F.conv2d(x, layer.weight * mask, layer.bias, layer.stride, layer.padding, groups=groups)
    y.backward(case["gout"])
    return {
        "drawn": drawn.detach(),
        "mask": mask.detach(),
        "y": y.detach(),
        "logits": logits.grad,
        "x": x.grad,
        "W": layer.weight.grad,
    }


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if name not in ("odd_noaug", "dense_sparse2x4_off", "dw7_aug_blocked")]
)
def test_layers(shared: Path, golden: Path, name: str) -> None:
    case = Case(shared, golden, name)
    ours = run(case)
    assert set(ours["drawn"].unique().tolist()) == {0.0, 1.0}, "exactly, where the official mask is off by 1e-7"
    assert torch.equal(case.padded_mask(ours["drawn"]).to(torch.uint8), case["mask"])
    assert_close(ours["y"], case["y"].numpy())
    assert_close(ours["logits"], case["grad_choice_weights"].numpy())
    assert_close(ours["x"], case["grad_x"].numpy())
    compare_weight_gradient(case, ours["W"])
    assert (case.info["max_abs_diff_vs_masked_conv"] < 1e-5) and "note" not in case.info


def compare_weight_gradient(case: Case, ours: Tensor) -> None:
    """Compare with the stored array: the first matrix, which is the first group or the whole block-diagonal."""
    stored = case["grad_W0"]
    parts = ours.reshape(case.groups, ours.shape[0] // case.groups, -1)
    rows, columns = parts.shape[1:]
    blocked = "W" in [key for key, _, _ in case.info["keys"]]
    wide = stored.shape[1] // case.groups if blocked else stored.shape[1]
    for group in range(case.groups if blocked else 1):
        theirs = stored[group * rows : group * rows + rows, group * wide : group * wide + columns]
        assert_close(parts[group], theirs.numpy())


def test_blocked_depthwise_differs_as_documented(shared: Path, golden: Path) -> None:
    """The official layer reads the wrong columns; the mask is the same, and ours is the masked convolution."""
    case = Case(shared, golden, "dw7_aug_blocked")
    assert "differs from the masked convolution" in case.info["note"]
    ours = run(case)
    assert torch.equal(case.padded_mask(ours["drawn"]).to(torch.uint8), case["mask"])
    difference = (ours["y"] - case["y"]).abs().max().item()
    assert difference == pytest.approx(case.info["max_abs_diff_vs_masked_conv"], abs=1e-4)
    layer = case.layer()
    by_hand = F.conv2d(case["x"], layer.weight.detach() * ours["mask"], layer.bias.detach(), padding=3, groups=4)
    # At most 49 products are added, in an order that depends on the kernel.
    bound = (
        49
        * torch.finfo(torch.float32).eps
        * F.conv2d(
            case["x"].abs(), (layer.weight.detach() * ours["mask"]).abs(), layer.bias.detach().abs(), padding=3, groups=4
        )
    )
    assert ((ours["y"] - by_hand).abs() <= bound).all()


def test_size_that_the_official_code_refuses(shared: Path, golden: Path) -> None:
    """135 is not a multiple of four: the official code fails without padding; here padding is part of the grouping."""
    case = Case(shared, golden, "odd_noaug")
    assert "must be divisible by 4" in case.info["official_error"]
    layer = case.layer()
    mask = ss.magnitude_mask(layer.weight, "im2col")
    check_semi_structured(layer.weight.detach() * mask, "im2col")
    assert group_count(layer.weight.shape, "im2col") == 35


def test_layer_without_masks(shared: Path, golden: Path) -> None:
    case = Case(shared, golden, "dense_sparse2x4_off")
    model = nn.Sequential(case.layer())
    nn.init.zeros_(model[0].weight)
    masks = ss.load_official(model, case.official_state())
    assert not masks.logits and not masks.choices and masks.dropped == ("0.zero_bias",)
    assert_close(model(case["x"]).detach(), case["y"].numpy())


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "odd_noaug"])
def test_layers_load(shared: Path, golden: Path, name: str) -> None:
    """Weight, bias and choice weights are restored from every official form: blocked, grouped and padded too."""
    case = Case(shared, golden, name)
    reference, model = nn.Sequential(case.layer()), nn.Sequential(case.layer())
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    masks = ss.load_official(model, case.official_state())
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in model.state_dict().items())
    if name == "dense_sparse2x4_off":
        return
    assert torch.equal(masks.logits["0.weight"], case["choice_weights"])
    drawn = gumbel_mask(masks.logits["0.weight"], case["gumbel"])
    assert torch.equal(case.padded_mask(drawn).to(torch.uint8), case["mask"])
    controller = ss.prepare(model, ss.SemiStructuredConfig("learned", "im2col"), logits=masks.logits)
    assert torch.equal(controller.choices["0.weight"], case["choice_weights"].argmax(1).to(torch.uint8))


@pytest.mark.parametrize("name", ["a3x3", "odd_input_aug", "grouped", "dw7_aug"])
def test_entropy(shared: Path, golden: Path, name: str) -> None:
    """The official figure is the entropy of one draw, softmax(logits + noise); ours is that of softmax(logits)."""
    case = Case(shared, golden, name)
    noisy = torch.log_softmax(case["choice_weights"] + case["gumbel"], 1)
    assert float(-(noisy.exp() * noisy).sum(1).mean()) == pytest.approx(case.info["entropy_mean"], abs=1e-5)


@pytest.mark.parametrize("name", ["lin_12_10", "lin_6_6"])
def test_linear(shared: Path, golden: Path, name: str) -> None:
    listed = json.loads((golden / "sparse24_linear.json").read_text())
    case = next(case for case in listed["cases"] if case["name"] == name)
    arrays, fill = np.load(golden / "sparse24_linear.npz"), filler(shared)
    filled = {
        key: torch.from_numpy(np.array(fill.fill_one(f"{name}.{key}", shape, listed["seed"])))
        for key, shape, _ in case["keys"]
    }
    rows, columns = filled["weight"].shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=case["bias"]))
    masks = ss.load_official(model, {f"0.{key}": value for key, value in filled.items()})
    drawn = gumbel_mask(masks.logits["0.weight"], torch.from_numpy(arrays[f"{name}.gumbel"]))
    mask = ungroup(drawn, (rows, columns), "im2col")
    assert torch.equal(mask.to(torch.uint8), torch.from_numpy(arrays[f"{name}.mask"]))
    y = F.linear(torch.from_numpy(arrays[f"{name}.x"]), model[0].weight * mask, model[0].bias)
    assert_close(y.detach(), arrays[f"{name}.y"])


def test_padding_rule(golden: Path) -> None:
    rows = json.loads((golden / "sparse24_augment.json").read_text())["rows"]
    assert len(rows) == 14
    for row in rows:
        padded = paper_padding(row["out"], row["in"])
        assert padded == (row["padded_out"], row["padded_in"])
        assert group_count((row["out"], row["in"]), "im2col") == row["quadruplets"]
        kind = "OUTPUT" if padded[0] > row["out"] else "INPUT" if padded[1] > row["in"] else "NONE"
        assert kind == row["augmented"]


def network(name: str) -> nn.Module:
    """Return the network of torchvision."""
    from torchvision import models

    return getattr(models, {"convnext_T": "convnext_tiny"}.get(name, name.removesuffix("_blocked")))(weights=None)


def with_masks(model: nn.Module, masks: ss.OfficialMasks, noise: dict[str, Tensor] | None) -> nn.Module:
    """Apply a network's official masks: the most probable ones, or those that given noise selects."""
    if noise is None:
        ss.prepare(model, ss.SemiStructuredConfig(axis="im2col"), choices=masks.choices)
        return ss.convert(model)
    with torch.no_grad():
        for key, logits in masks.logits.items():
            weight = model.get_parameter(key)
            weight.mul_(ungroup(gumbel_mask(logits, noise[key]), weight.shape, "im2col"))
    return model


def noise_of(shared: Path, masks: ss.OfficialMasks, seed: int) -> dict[str, Tensor]:
    fill = filler(shared)
    return {
        key: torch.from_numpy(fill.gumbel_noise(f"{key.removesuffix('.weight')}.choice_weights", value.shape, seed))
        for key, value in masks.logits.items()
    }


# With logits of zero, one network is short.
ZERO = [pytest.param(name, "zero", marks=[pytest.mark.slow] if number else []) for number, name in enumerate(MODELS)]


@pytest.mark.parametrize(("name", "kind"), [*ZERO, *((name, "noise") for name in MODELS)])
def test_networks(shared: Path, golden: Path, name: str, kind: str) -> None:
    case = f"sparse24_{name}_96x96_s0_{kind}"
    row = next(row for row in json.loads((golden / "index.json").read_text()) if row["case"] == case)
    state = weights(shared, manifest(shared, row["manifest"])["keys"], row["seed"])
    model = network(name).eval()
    masks = ss.load_official(model, state)
    noise = noise_of(shared, masks, row["seed"]) if kind == "noise" else None
    with torch.no_grad():
        logits = with_masks(model, masks, noise)(images(shared, row["input_seed"], row["input_shape"]))
    assert_close(logits, np.load(golden / row["file"])["logits"])


def test_blocked_residual_network_loads(shared: Path) -> None:
    keys = manifest(shared, "sparse24_resnet18_blocked")["keys"]
    masks = ss.load_official(network("resnet18"), weights(shared, keys, 0))
    assert len(masks.logits) == 4 and not masks.biases
    assert masks.key_map["conv1.W"] == "conv1.weight"


def test_file_and_timm(shared: Path, golden: Path, tmp_path: Path) -> None:
    """The same checkpoint as a file, in a container, into timm's network of the same keys."""
    keys = manifest(shared, "sparse24_resnet18")["keys"]
    path = tmp_path / "official.pth"
    torch.save({"model": weights(shared, keys, 0), "epoch": 3}, path)
    model = timm.create_model("resnet18").eval()
    masks = ss.load_official(model, path)
    with torch.no_grad():
        logits = with_masks(model, masks, None)(images(shared, 0, [2, 3, 96, 96]))
    assert_close(logits, np.load(golden / "sparse24_resnet18_96x96_s0_zero.npz")["logits"])


def test_load_report_of_residual_networks(shared: Path, golden: Path) -> None:
    """In the official code, a dense checkpoint lacks masks, and convolutions have two names; ours just loads it."""
    report = json.loads((golden / "sparse24_resnet18_load_report.json").read_text())["resnet18"]
    official = {key for key, _, _ in manifest(shared, "sparse24_resnet18")["keys"]}
    model = network("resnet18")
    dense = {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}
    masked = {key.removesuffix(".choice_weights") for key in official if key.endswith(".choice_weights")}
    assert masked == {"conv1", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))}
    made = {f"{name}.{part}" for name in masked for part in ("choice_weights", "masking_patterns", "zero_bias")}
    assert set(report["missing"]) == made
    renamed = {
        f"{key.removesuffix('.weight')}.Ws.0"
        for key in dense
        if ".conv" in key or ("downsample" in key and key.endswith("weight"))
    }
    kept = {f"{name}.weight" for name in masked}
    assert set(report["unexpected"]) == (renamed | kept) - official and report["unexpected_count"] == len(
        report["unexpected"]
    )
    masks = ss.load_official(model, dense)
    assert not masks.logits and set(masks.key_map.values()) == set(dense)
    assert all(bool((value == 0.5).all()) for value in model.parameters())


def test_load_report_of_convnext(shared: Path, golden: Path) -> None:
    report = json.loads((golden / "sparse24_convnext_T_load_report.json").read_text())["convnext_T"]
    keys = manifest(shared, "sparse24_convnext_T")["keys"]
    masks = ss.load_official(network("convnext_T"), weights(shared, keys, 0))
    renamed = {theirs: ours for theirs, ours in masks.key_map.items() if theirs != ours}
    assert renamed == {theirs: ours for ours, theirs in report["key_map"]}
    tables = {
        f"{key.removesuffix('.weight')}.{part}" for key in masks.logits for part in ("choice_weights", "masking_patterns")
    }
    assert tables == set(report["missing"]) and report["unexpected"] == []


def official_resnet(shared: Path) -> dict[str, Any]:
    return weights(shared, manifest(shared, "sparse24_resnet18")["keys"], 0)


def test_trained_zero_bias_is_kept(shared: Path) -> None:
    """The official code adds it to the outputs of layers without a bias, so dropping it would change the network."""
    state = official_resnet(shared)
    state["layer2.0.downsample.0.zero_bias"] = torch.linspace(-1, 1, 128)
    plain, model = network("resnet18").eval(), network("resnet18").eval()
    ss.load_official(plain, official_resnet(shared))
    masks = ss.load_official(model, state)
    assert masks.biases == ("layer2.0.downsample.0",)
    x = torch.randn(2, 64, 8, 8)
    layers = [one.get_submodule("layer2.0.downsample.0") for one in (model, plain)]
    expected = layers[1](x) + torch.linspace(-1, 1, 128).view(1, -1, 1, 1)
    torch.testing.assert_close(layers[0](x), expected)


def test_zero_bias_of_groups(shared: Path, golden: Path) -> None:
    """One vector of out / groups numbers is added to the outputs of every group."""
    case = Case(shared, golden, "grouped")
    state = case.official_state()
    state["0.zero_bias"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    model = nn.Sequential(case.layer())
    ss.load_official(model, state)
    assert model[0].bias.tolist() == [1.0, 2.0, 3.0, 4.0] * 2
    state = Case(shared, golden, "grouped_bias").official_state()
    state["0.zero_bias"] = torch.ones(4)
    model = nn.Sequential(Case(shared, golden, "grouped_bias").layer())
    masks = ss.load_official(model, state)
    assert not masks.biases and "0.zero_bias" in masks.dropped, "layers with a bias never use it"


def as_official(model: nn.Module, names: list[str], blocked: bool) -> dict[str, Tensor]:
    """Return a network's state dict in the official layout, with random choice weights."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        prefix, _, last = key.rpartition(".")
        if prefix not in names:
            state[key] = value
        elif last == "bias":
            state[f"{prefix}.b" if blocked else f"{prefix}.bs.0"] = value
        else:
            state[f"{prefix}.W" if blocked else f"{prefix}.Ws.0"] = value.flatten(1)
            state[f"{prefix}.choice_weights"] = torch.randn(value.numel() // 4, 6)
            state[f"{prefix}.masking_patterns"] = torch.tensor(PATTERNS).float()
            if not blocked:
                state[f"{prefix}.zero_bias"] = torch.zeros(value.shape[0])
    return state


@pytest.mark.full
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("name", ["resnet34", "convnext_small"])
def test_larger_networks_load(name: str, blocked: bool) -> None:
    """No reference numbers exist for these two, so the loaded values are compared with the written ones."""
    stems = ["conv1", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))]
    names = stems if name == "resnet34" else ["features.0.0", *(f"features.{i}.1" for i in (2, 4, 6))]
    written, model = network(name).eval(), network(name).eval()
    state = as_official(written, names, blocked)
    masks = ss.load_official(model, state)
    assert list(masks.choices) == [f"{prefix}.weight" for prefix in sorted(names)]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in written.state_dict().items())
    ss.prepare(model, ss.SemiStructuredConfig(axis="im2col"), choices=masks.choices)
    assert len(ss.validate(model)) == 4


def test_resumed_learning_starts_at_the_official_choices(shared: Path) -> None:
    model = network("resnet18").train()
    masks = ss.load_official(model, official_resnet(shared))
    config = ss.SemiStructuredConfig("learned", "im2col", total_steps=5, tau_start=1.0, tau_end=1.0)
    controller = ss.prepare(model, config, logits=masks.logits)
    assert all(torch.equal(controller.choices[key], masks.choices[key]) for key in masks.choices)
    optimizer = torch.optim.AdamW(controller.parameters(), 1.0, weight_decay=0.0)
    before = model.conv1.parametrizations.weight.original.clone()
    F.cross_entropy(model(images(shared, 0, [2, 3, 64, 64])), torch.tensor([3, 5])).backward()
    optimizer.step()
    controller.step()
    assert torch.equal(model.conv1.parametrizations.weight.original, before) and controller.flip_rate() > 0
    ss.validate(ss.convert(model))


def test_trained_patterns_are_refused(shared: Path) -> None:
    state = official_resnet(shared)
    state["conv1.masking_patterns"] = state["conv1.masking_patterns"] * 0.9
    model = network("resnet18")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"conv1\.masking_patterns: the table of patterns was trained"):
        ss.load_official(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_network_is_refused(shared: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv3\.weight: the file holds nothing for it"):
        ss.load_official(network("resnet50"), official_resnet(shared))


def test_weights_between_groups(shared: Path, golden: Path) -> None:
    """With masks they are never used, and dropped; without masks the layer is not a grouped convolution."""
    case = Case(shared, golden, "grouped_blocked")
    state = case.official_state()
    state["0.W"][0, -1] = 3.0
    model = nn.Sequential(case.layer())
    ss.load_official(model, state)
    assert torch.equal(model[0].weight, case.layer().weight)
    del state["0.choice_weights"], state["0.masking_patterns"]
    with pytest.raises(CheckpointError, match=r"0\.W has weights between its 2 groups"):
        ss.load_official(model, state)
