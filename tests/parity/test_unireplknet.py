"""UniRepLKNet: layers, merged weights, backbones, training steps, parameter groups and costs of the official network."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import SqueezeExcite
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

import widekernel
from tests.conftest import shared_folder
from tests.models.zoo import on_meta
from tests.parity.reference import arguments, assert_close, create, images, manifest, official_file, weights
from widekernel.analysis.complexity import complexity
from widekernel.dense.backbone import build_pyramid
from widekernel.engine.optimization import create_optimizer
from widekernel.engine.optimization_config import OptimizerConfig
from widekernel.errors import CheckpointError
from widekernel.layers import FoldedLargeKernel, LargeKernel, Rectangles
from widekernel.models.blocks import ResponseNormBlock, UnbiasedResponseNorm
from widekernel.models.layouts.conversion import to_official
from widekernel.models.layouts.registry import layouts_of
from widekernel.models.options import ModelOptions
from widekernel.models.unireplknet import DILATED_BRANCHES, dilated_block


def content(golden: Path, name: str) -> Any:
    return json.loads((golden / f"unireplknet_{name}.json").read_text())


def cases(name: str) -> list[Any]:
    folder = shared_folder()
    return [] if folder is None else content(folder / "parity" / "golden", name)["cases"]


def every(name: str, key: str) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=str(case[key])) for case in cases(name)])


def check_gradient(ours: Tensor, reference: list[float], absolute: float = 0.0) -> None:
    """Compare a gradient with the norm and the sum of the official one."""
    norm, total = reference
    ours = ours.double()
    assert abs(ours.norm().item() - norm) <= 1e-4 * norm + absolute
    assert abs(ours.sum().item() - total) <= (1e-4 * norm + absolute) * ours.numel() ** 0.5 + 1e-6


def branch_names(size: int) -> list[tuple[str, str]]:
    dilated = [(f"dil_conv_k{side}_{step}", f"dil_bn_k{side}_{step}") for side, step in DILATED_BRANCHES.get(size, ())]
    return [("lk_origin", "origin_bn"), *dilated]


def filled_layer(layer: LargeKernel, state: dict[str, Tensor], names: list[tuple[str, str]]) -> dict[str, str]:
    """Fill a layer; return the official name of each of its tensors."""
    known = {}
    for i, (conv, norm) in enumerate(names):
        known[f"source.kernels.{i}"] = f"{conv}.weight"
        known |= {f"norms.{i}.{key}": f"{norm}.{key}" for key in layer.norms[i].state_dict()}
    layer.load_state_dict({ours: state[theirs] for ours, theirs in known.items()})
    return known


@every("dilated", "kernel_size")
def test_dilated_block(case: dict[str, Any], shared: Path, golden: Path) -> None:
    """Response, merged kernel, gradients and statistics; the block of size 5 exists only as a layer."""
    size, channels = case["kernel_size"], case["channels"]
    branches = [(branch["kernel"], branch["dilation"]) for branch in case["branches"]]
    if size in DILATED_BRANCHES:
        assert list(DILATED_BRANCHES[size]) == branches
        make = lambda: dilated_block(channels, size)  # noqa: E731
    else:
        sides = [size, *(side for side, _ in branches)]
        make = lambda: LargeKernel(  # noqa: E731
            Rectangles(channels, [(side, side) for side in sides], [1, *(step for _, step in branches)]),
            [nn.BatchNorm2d(channels) for _ in sides],
        )
    names = [("lk_origin", "origin_bn"), *(tuple(branch["names"]) for branch in case["branches"])]
    state = {key.split(".", 1)[1]: value for key, value in weights(shared, case["keys"], 0).items()}
    data = np.load(golden / "unireplknet_dilated.npz")
    for image in case["maps"]:
        layer = make().eval()
        known = filled_layer(layer, state, names)
        height, width = image["size"]
        key = f"k{size}_{height}x{width}"
        x = images(shared, image["input_seed"], [2, channels, height, width]).requires_grad_()
        with torch.no_grad():
            folded = layer.folded()
            assert_close(layer(x), data[f"{key}.y_eval"])
            assert_close(folded(x), data[f"{key}.y_eval"])
        assert [tuple(kernel.shape[2:]) for kernel in folded.kernels] == [(size, size)]
        assert_close(folded.kernels[0].detach(), data[f"k{size}.merged_weight"])
        assert_close(folded.bias.detach(), data[f"k{size}.merged_bias"])
        layer.train()
        y = layer(x)
        assert_close(y.detach(), data[f"{key}.y_train"])
        y.backward(torch.from_numpy(np.random.RandomState(image["gout_seed"]).standard_normal(y.shape)).float())
        assert x.grad is not None
        assert_close(x.grad, data[f"{key}.grad_input"], relative=1e-4)
        for ours, parameter in layer.named_parameters():
            assert parameter.grad is not None
            # Where the dilation is at least the height, batch norm leaves hardly any gradient, which float32 cannot resolve.
            small = any(step >= min(height, width) for _, step in branches)
            check_gradient(parameter.grad, image["grad_norm_and_sum_f64"][known[ours]], absolute=1e-3 if small else 0.0)
        for ours, buffer in layer.named_buffers():
            if known[ours] in image["running_mean_first"]:
                assert buffer[0].item() == pytest.approx(image["running_mean_first"][known[ours]], rel=1e-5, abs=1e-6)


BLOCK_PARTS = {
    "gamma": "gamma",
    "se.down": "se.fc1",
    "se.up": "se.fc2",
    "pwconv1.1": "mlp.fc1",
    "act.1.gamma": "mlp.norm.weight",
    "act.1.beta": "mlp.norm.bias",
    "pwconv2.0": "mlp.fc2",
    "pwconv2.2": "norm2",
    "norm": "norm",
}


def small_layer(case: dict[str, Any]) -> nn.Module:
    if case["name"] == "se":
        return SqueezeExcite(12, rd_channels=3)
    if case["name"] == "ln_first":
        return ModelOptions(3, []).channel_norm()(12)
    norm = GlobalResponseNorm(12)
    return UnbiasedResponseNorm(norm) if case["name"] == "grn_nobias" else norm


def block_and_names(case: dict[str, Any]) -> tuple[ResponseNormBlock, dict[str, str]]:
    name = case["name"]
    size = int(name.removeprefix("block").split("_")[0])
    mixer: nn.Module = nn.Identity()
    if size in DILATED_BRANCHES:
        mixer = dilated_block(12, size)
    elif size:
        mixer = LargeKernel(Rectangles(12, [(size, size)]))
    scale, ratio = (0.0 if "nogamma" in name else 1e-6), (2 if "ffn2" in name else 4)
    block = ResponseNormBlock(mixer, 12, 0.0, scale, ModelOptions(3, []), ratio, norm=size > 0)
    known = {}
    for i, (conv, norm) in enumerate(branch_names(size) if size in DILATED_BRANCHES else [("", "")] if size else []):
        known[f"mixer.source.kernels.{i}"] = f"dwconv.{conv}.weight".replace("..", ".")
        if norm:
            known |= {f"mixer.norms.{i}.{key}": f"dwconv.{norm}.{key}" for key in nn.BatchNorm2d(1).state_dict()}
    for ours in block.state_dict():
        for theirs, part in BLOCK_PARTS.items():
            if ours == part or ours.startswith(f"{part}."):
                known[ours] = theirs + ours.removeprefix(part)
    return block, known


@every("layers", "name")
def test_layers(case: dict[str, Any], shared: Path, golden: Path) -> None:
    """Response norm, squeeze-excite, layer norm and whole blocks: evaluation, training, gradients, merged tensors."""
    name, data = case["name"], np.load(golden / "unireplknet_layers.npz")
    state = {key.split(".", 1)[1]: value for key, value in weights(shared, case["keys"], 0).items()}
    if name.startswith("block"):
        layer, known = block_and_names(case)
    else:
        layer = small_layer(case)
        renamed = {"down": "fc1", "up": "fc2", "gamma": "weight", "beta": "bias"}
        known = {".".join(renamed.get(part, part) for part in key.split(".")): key for key in state}
    values = {ours: state[theirs].view(layer.state_dict()[ours].shape) for ours, theirs in known.items()}
    assert values.keys() == layer.state_dict().keys() and len(values) == len(state)
    layer.load_state_dict(values)
    layer.eval()
    x = (images(shared, 0, case["input_shape"]) * case["input_scale"]).requires_grad_()
    with torch.no_grad():
        assert_close(layer(x), data[f"{name}.y_eval"])
        if isinstance(layer, ResponseNormBlock):
            folded = widekernel.fold(layer)
            assert_close(folded(x), data[f"{name}.y_eval"])
            assert widekernel.fold(folded) is not None
            check_merged_block(folded, name, data)
            double = layer.double()
            expected, ours = double(x.double()), widekernel.fold(double)(x.double())
            assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()
            layer.float()
    layer.train()
    y = layer(x)
    assert_close(y.detach(), data[f"{name}.y_train"])
    y.backward(torch.from_numpy(np.random.RandomState(1).standard_normal(y.shape)).float())
    assert x.grad is not None
    assert_close(x.grad, data[f"{name}.grad_input"], relative=1e-4)
    for ours, parameter in layer.named_parameters():
        assert parameter.grad is not None
        norm, total = case["grad_norm_and_sum_f64"][known[ours]]
        if norm >= 1e-6:
            check_gradient(parameter.grad, [norm, total], absolute=1e-3 if "dil_conv" in known[ours] else 0.0)


def check_merged_block(block: nn.Module, name: str, data: Any) -> None:
    found = {key for key in data if key.startswith(f"{name}.merged:")}
    large = f"{name}.merged:dwconv.lk_origin" if f"{name}.merged:dwconv.lk_origin.bias" in found else f"{name}.merged:dwconv"
    expected = {
        "act.1.gamma": block.mlp.norm.weight.view(1, 1, 1, -1),
        "pwconv1.1.weight": block.mlp.fc1.weight,
        "pwconv1.1.bias": block.mlp.fc1.bias,
        "pwconv2.0.weight": block.mlp.fc2.weight,
        "pwconv2.0.bias": block.mlp.fc2.bias,
        "se.down.weight": block.se.fc1.weight,
        "se.down.bias": block.se.fc1.bias,
        "se.up.weight": block.se.fc2.weight,
        "se.up.bias": block.se.fc2.bias,
    }
    tensors = {f"{name}.merged:{key}": value for key, value in expected.items()}
    if isinstance(block.mixer, FoldedLargeKernel):
        tensors |= {f"{large}.weight": block.mixer.kernels[0], f"{large}.bias": block.mixer.bias}
    assert tensors.keys() == found
    for key, value in tensors.items():
        assert_close(value.detach(), data[key])


SIZES = ("a", "f", "p", "n", "t", "s", "b", "l", "xl")
MERGED = {
    "unireplknet_mini_merged_s0": "unireplknet_mini",
    "unireplknet_mini_kernels_merged_s0": "unireplknet_mini_kernels",
    "unireplknet_mini_nols_merged_s0": "unireplknet_mini_nols",
    "unireplknet_a_merged_s0_128": "unireplknet_a",
    "unireplknet_t_merged_s0_224": "unireplknet_t",
    "unireplknet_s_merged_s0_96": "unireplknet_s",
}
with_big_ones_full = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if "mini" in case else [pytest.mark.full]) for case in MERGED]
)


@with_big_ones_full
def test_merged_weights(case: str, shared: Path, golden: Path, tmp_path: Path) -> None:
    """A folded network, saved in the official layout, has the keys, order, shapes and weights of the official merge."""
    model = create(manifest(shared, MERGED[case])).eval()
    widekernel.load_checkpoint(model, official_file(shared, tmp_path, MERGED[case], 0))
    state = to_official(widekernel.fold(model))
    keys = [(key, list(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in state.items()]
    assert keys == [tuple(row) for row in manifest(shared, f"{MERGED[case]}_merged")["keys"]]
    expected = np.load(golden / f"{case}.npz")
    for key in expected:
        if key != "logits":
            name = key.removeprefix("merged:")
            found = state[name[:-4]][:2] if name.endswith("[:2]") else state[name]
            assert_close(found, expected[key])


@pytest.mark.parametrize("form", ["training", "merged"])
def test_round_trip_of_official_files(form: str, shared: Path, tmp_path: Path) -> None:
    """What is loaded from an official file is saved as it was: training form unfolded, merged form folded."""
    name = "unireplknet_mini_kernels" + ("_merged" if form == "merged" else "")
    model = create(manifest(shared, name)).eval()
    model = widekernel.fold(model) if form == "merged" else model
    path = official_file(shared, tmp_path, name, 3)
    report = widekernel.load_checkpoint(model, path)
    assert not report.notes
    widekernel.save_checkpoint(model, tmp_path / "again.pth", layout="official")
    before = torch.load(path)["model"]
    after = torch.load(tmp_path / "again.pth")
    after = after.get("model", after)
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_merged_files_in_both_forms(shared: Path, golden: Path, tmp_path: Path) -> None:
    """A merged file gives the official logits in the training form, in the folded form, and in the former one folded."""
    description = manifest(shared, "unireplknet_mini_deploy")
    path = official_file(shared, tmp_path, "unireplknet_mini_deploy", 4)
    model = create(description).eval()
    direct = widekernel.fold(create(description).eval())
    notes = widekernel.load_checkpoint(model, path).notes
    assert "5 merged blocks were put into the training form" in notes[0]
    widekernel.load_checkpoint(direct, path)
    data, x = np.load(golden / "unireplknet_mini_deployctor_s4.npz"), images(shared, 4, [2, 3, 64, 64])
    with torch.no_grad():
        for network in (model, direct, widekernel.fold(model)):
            assert_close(network(x), data["logits"])
        # In the training form, the norms have a variance of 1 - eps, rounded to float32.
        assert_close(direct.double()(x.double()), data["logits_f64"], relative=1e-10, absolute=1e-12)


def test_training_files_do_not_fit_folded_networks(shared: Path, tmp_path: Path) -> None:
    folded = widekernel.fold(create(manifest(shared, "unireplknet_mini")).eval())
    with pytest.raises(CheckpointError, match="load the weights before folding"):
        widekernel.load_checkpoint(folded, official_file(shared, tmp_path, "unireplknet_mini", 0))


def test_biases_of_the_first_files(shared: Path, tmp_path: Path) -> None:
    """The first published files have a bias in 3x3 blocks, which goes into the norm that follows."""
    description = manifest(shared, "unireplknet_mini")
    state = weights(shared, description["keys"], 0)
    biases = {"stages.0.0.dwconv.bias": torch.randn(8), "stages.2.1.dwconv.bias": torch.randn(24)}
    torch.save({"model": state | biases}, tmp_path / "early.pth")
    model, plain = create(description).eval(), create(description).eval()
    report = widekernel.load_checkpoint(model, tmp_path / "early.pth")
    assert report.notes == ("2 biases of small kernels were moved into the norms that follow",) and not report.ignored
    widekernel.load_checkpoint(plain, official_file(shared, tmp_path, "unireplknet_mini", 0))
    layer, norm = plain.stages[2].blocks[1].mixer, plain.stages[2].blocks[1].norm
    x = torch.randn(2, 24, 5, 6)
    with torch.no_grad():
        expected = norm(layer(x) + biases["stages.2.1.dwconv.bias"].view(1, -1, 1, 1))
        block = model.stages[2].blocks[1]
        torch.testing.assert_close(block.norm(block.mixer(x)), expected)


BACKBONES = {
    "unireplknet_mini_feats_s0_64x96": "unireplknet_mini_feats",
    "unireplknet_t_feats_s0_128x96": "unireplknet_t_feats",
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if "mini" in case else [pytest.mark.full]) for case in BACKBONES]
)
def test_backbone_form(case: str, shared: Path, golden: Path, tmp_path: Path) -> None:
    """Maps before and after the norms of a pyramid, folded and unfolded, and the keys of its official file."""
    description = manifest(shared, BACKBONES[case])
    args = arguments("UniRepLKNet", {**description["kwargs"], "num_classes": 0})
    pyramid = build_pyramid("unireplknet_t", {key: value for key, value in args.items() if key != "num_classes"}).eval()
    report = widekernel.load_checkpoint(pyramid, official_file(shared, tmp_path, BACKBONES[case], 0))
    assert not report.ignored and not report.missing
    row = next(row for row in json.loads((golden / "index.json").read_text()) if row["case"] == case)
    expected, x = np.load(golden / f"{case}.npz"), images(shared, row["input_seed"], row["input_shape"])
    with torch.no_grad():
        for network in (pyramid, widekernel.fold(pyramid)):
            raw = network.body.forward_intermediates(x, intermediates_only=True)
            for kind, maps in (("feat", network(x)), ("raw", raw)):
                for i, found in enumerate(maps):
                    assert list(found.shape) == expected[f"{kind}{i}_shape"].tolist()
                    at = torch.from_numpy(expected[f"{kind}{i}_idx"])
                    assert_close(found.flatten()[at], expected[f"{kind}{i}_val"])
    official = to_official(pyramid)
    assert [[key, list(value.shape)] for key, value in official.items()] == [row[:2] for row in description["keys"]]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case["name"], marks=[pytest.mark.slow] if case["name"].endswith("_a") else [])
        for case in cases("train_step")
    ],
)
def test_train_step(case: dict[str, Any], shared: Path, golden: Path, tmp_path: Path) -> None:
    name, data = case["name"], np.load(golden / "unireplknet_train_step.npz")
    model = create(manifest(shared, case["manifest"])).train()
    widekernel.load_checkpoint(model, official_file(shared, tmp_path, case["manifest"], case["seed"]))
    x = images(shared, case["seed"], case["input_shape"]).requires_grad_()
    logits = model(x)
    loss = nn.functional.cross_entropy(logits, torch.tensor(case["labels"]))
    loss.backward()
    assert abs(loss.item() - case["loss_f64"]) <= 1e-5 * abs(case["loss_f64"])
    assert_close(logits, data[f"{name}.logits_train"])
    assert x.grad is not None
    if f"{name}.grad_input" in data:
        assert_close(x.grad, data[f"{name}.grad_input"], relative=1e-4)
    else:
        at = torch.from_numpy(data[f"{name}.grad_input_idx"])
        assert_close(x.grad.flatten()[at], data[f"{name}.grad_input_val"], relative=1e-4)
    (layout, *_) = layouts_of(model)
    official = {key: layout.to_official(key)[0] for key in model.state_dict()}
    compared = 0
    for key, parameter in model.named_parameters():
        norm, total = case["grad_norm_and_sum_f64"][official[key]]
        assert parameter.grad is not None, key
        if official[key] in case["ill_conditioned"]:
            check_gradient(parameter.grad, [norm, total], absolute=4e-3 * norm)
        elif norm >= 1e-6:
            check_gradient(parameter.grad, [norm, total])
            compared += 1
    assert compared > 0.7 * len(case["grad_norm_and_sum_f64"])
    for key, buffer in model.named_buffers():
        if f"{name}.buf:{official[key]}" in data:
            assert_close(buffer, data[f"{name}.buf:{official[key]}"])


def test_gradient_checkpointing(shared: Path, golden: Path, tmp_path: Path) -> None:
    """Gradients are equal, and statistics are updated twice, as in the official code."""
    case = next(case for case in cases("train_step") if case["name"] == "unireplknet_mini")
    model = create(manifest(shared, case["manifest"])).train()
    widekernel.load_checkpoint(model, official_file(shared, tmp_path, case["manifest"], case["seed"]))
    model.set_grad_checkpointing()
    x = images(shared, case["seed"], case["input_shape"])
    nn.functional.cross_entropy(model(x), torch.tensor(case["labels"])).backward()
    norm = model.stages[0].blocks[0].norm
    data = np.load(golden / "unireplknet_train_step.npz")
    assert_close(norm.running_mean, data["unireplknet_mini.bufcp:stages.0.0.norm.running_mean"])
    assert norm.num_batches_tracked.item() - 0 == case["num_batches_tracked_with_cp"]
    check_gradient(model.head.fc.weight.grad, case["grad_norm_and_sum_f64"]["head.weight"])


def test_drop_path(shared: Path, golden: Path, tmp_path: Path) -> None:
    """Rates grow linearly from 0 over all blocks, and the branch is scaled by 1 / (1 - rate) where it is kept."""
    row = content(golden, "train_step")["drop_path"]
    model = timm.create_model(
        "unireplknet_t",
        drop_path_rate=row["drop_path_rate"],
        **arguments("UniRepLKNet", manifest(shared, row["manifest"])["kwargs"]),
    )
    widekernel.load_checkpoint(model, official_file(shared, tmp_path, row["manifest"], row["seed"]))
    model = model.double().train()
    for name, rate, kept in row["masks"]:
        stage, block = map(int, name.split(".")[1:3])
        drop = model.stages[stage].blocks[block].drop_path
        assert drop.drop_prob == pytest.approx(rate)
        mask = torch.tensor(kept, dtype=torch.float64).view(-1, 1, 1, 1) / (1 - rate)
        drop.forward = lambda x, mask=mask: x * mask
    assert isinstance(model.stages[0].blocks[0].drop_path, nn.Identity)
    x = images(shared, row["seed"], row["input_shape"]).double()
    with torch.no_grad():
        y = model(x)
    assert_close(y, np.load(golden / "unireplknet_train_step.npz")["drop_path.logits_train_f64"], 1e-10, 1e-12)


@pytest.mark.parametrize("name", ["unireplknet_a", "unireplknet_t"])
def test_layer_decay(name: str, golden: Path) -> None:
    """Scale and weight decay of every parameter; the response norms decay because they have four axes officially."""
    expected = content(golden, "layer_decay")[name]
    model = on_meta(name)
    config = OptimizerConfig(layer_decay=expected["decay"], layer_groups="convnext12", decay_response_norms=True)
    assert_same_groups(model, config, expected["params"], "")


def assert_same_groups(model: nn.Module, config: OptimizerConfig, rows: list[Any], prefix: str) -> None:
    layout = layouts_of(model)[0]
    with warnings.catch_warnings(action="ignore"):
        groups = create_optimizer(model, config).param_groups
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    ours = {prefix + layout.to_official(key)[0]: of[id(parameter)] for key, parameter in model.named_parameters()}
    assert {key for key, *_ in rows if not key.startswith("decode_head.")} == ours.keys()
    for key, _, scale, decays in rows:
        if key in ours:
            assert ours[key]["lr_scale"] == pytest.approx(scale, rel=1e-12), key
            assert (ours[key]["weight_decay"] > 0) == decays, key


def test_layer_decay_of_backbones(golden: Path) -> None:
    rows = [row for row in content(golden, "layer_decay")["downstream"] if row["dw_scale"] == 1]
    assert rows
    for row in rows:
        with torch.device("meta"):
            args = arguments("UniRepLKNet", row["kwargs"])
            pyramid = build_pyramid(row["model"], {key: args[key] for key in args if key != "num_classes"})
        network = nn.Module()
        network.backbone = pyramid
        config = OptimizerConfig(
            layer_decay=row["decay_rate"], layer_groups=f"layer_wise{row['num_layers']}", decay_response_norms=True
        )
        assert_same_groups(network, config, row["params"], "")


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[pytest.mark.slow] if size in ("s", "b", "l", "xl") else []) for size in SIZES]
)
def test_parameters_and_operations(size: str, golden: Path) -> None:
    """Both forms equal the official count, and the folded one the published table."""
    rows = [row for row in content(golden, "params_flops")["rows"] if row["model"].startswith(f"unireplknet_{size} (")]
    assert rows
    model = on_meta(f"unireplknet_{size}")
    for side in {row["resolution"] for row in rows}:
        cost = complexity(model, (3, side, side))
        for row in rows:
            if row["resolution"] != side:
                continue
            merged = "merged" in row["model"]
            assert (cost.folded if merged else cost.training).params == row["params"]
            if merged:
                assert cost.folded.macs == row["macs_conv_linear"]
                assert is_published(cost.folded.params / 1e6, row["published_params"], "M")
                assert is_published(cost.folded.macs / 1e9, row["published_flops"], "G")
            else:
                assert cost.training.macs == cost.published_macs == row["macs_conv_linear"]


def is_published(value: float, printed: str | None, unit: str) -> bool:
    """Return whether the published table prints this value: rounded or, where it says 98M and 218M, cut off."""
    if printed is None:
        return True
    digits = len(printed.removesuffix(unit).partition(".")[2])
    return abs(value - float(printed.removesuffix(unit))) < 10.0**-digits


def test_kernels_and_rates(golden: Path) -> None:
    """Kernel size and drop-path rate of every block, widths and the inner widths of squeeze-excite and MLP."""
    for name, row in content(golden, "facts")["variants"].items():
        model = on_meta(name, drop_path_rate=row["drop_path_rate"])
        assert model.cfg.block_kernels() == row["kernel_sizes"]
        assert (list(model.cfg.depths), list(model.cfg.dims)) == (row["depths"], row["dims"])
        blocks = [block for stage in model.stages for block in stage.blocks]
        assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == pytest.approx(row["drop_path_rates"])
        firsts = [stage.blocks[0] for stage in model.stages]
        assert [block.se.fc1.out_channels for block in firsts] == row["se_internal"]
        assert [block.mlp.fc1.out_features for block in firsts] == row["ffn_hidden"]
