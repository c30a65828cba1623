"""Parameters and multiply-accumulates: published and hand-counted numbers; counting changes nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import widekernel
from tests.conftest import shared_folder
from tests.models.zoo import ALIKE, NANO, assert_same_state, create, on_meta, snapshot, tables_drawn_once
from widekernel.analysis.complexity import Complexity, Cost, complexity
from widekernel.cli.main import main
from widekernel.data import DataConfig, Preprocessing
from widekernel.errors import ShapeError
from widekernel.layers import LargeKernel, Rectangles
from widekernel.models import list_models
from widekernel.tasks.assembly import pretrained_cfg
from widekernel.tasks.saved import SavedModel, save_model
from widekernel.transforms.compaction import compact

ROADMAP = [name for name in list_models("roadmap_*") if name != "roadmap_nano"]


def _rows(file: str) -> list[dict[str, Any]]:
    folder = shared_folder()
    return json.loads((folder / "parity" / "golden" / file).read_text())["rows"] if folder else []


def _published() -> list[Any]:
    """Return the published rows; all but the first of each family are slow."""
    rows, seen = [], Counter[str]()
    for row in _rows("params_flops.json"):
        family = re.split(r"[-_ ]", row["model"])[0]
        seen[family] += 1
        marks = [pytest.mark.slow] if seen[family] > 1 else []
        rows.append(pytest.param(row, id=f"{row['model']}-{row['resolution']}", marks=marks))
    return rows


def _network(row: dict[str, Any]) -> nn.Module:
    """Create the network that a row of the published numbers describes, without memory for its weights."""
    model = row["model"]
    if model.startswith("torchvision "):
        with torch.device("meta"):
            return getattr(torchvision.models, model.split()[1])()
    if match := re.match(r"RepLKNet-(31B|31L|XL)", model):
        return on_meta(f"replknet_{match.group(1).lower()}")
    if model.startswith("ShiftWise_v2"):
        size, ghost, branches = re.match(r"ShiftWise_v2_(\w+) ghost (\S+) \((.*)\)", model).groups()
        return on_meta(f"shiftwise_{size}", ghost_ratio=float(ghost), paths=1 if branches == "merged" else 2)
    if not model.startswith("SLaK"):
        return on_meta(model)
    name, rest = model.split(" ", 1)
    *sizes, small = (int(number) for number in re.search(r"\d+(-\d+){4}", rest).group().split("-"))
    width = re.search(r"w(\d\.\d)", rest)
    arguments: dict[str, Any] = {"kernel_sizes": tuple(sizes), "width_factor": float(width.group(1)) if width else 1.0}
    if "7-7-7-7-100" in rest:
        return on_meta(name.lower(), decomposed=False, small_kernel=0, **arguments)
    if "not decomposed" in rest:
        arguments["decomposed"] = False
    return on_meta(name.lower(), small_kernel=small, **arguments)


def _merge_large_kernels(model: nn.Module) -> nn.Module:
    """Fold only the large kernels, as the authors' merge does."""
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, LargeKernel)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.folded())
    return model


@pytest.mark.parametrize("row", _published())
def test_published_numbers(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # No row is about the folded form, which would take half of the time.
    monkeypatch.setattr("widekernel.analysis.complexity.fold", lambda model: nn.Identity())
    model = _network(row)
    if "merged form" in row["model"]:
        model = _merge_large_kernels(model)
    counted = complexity(model, (3, row["resolution"], row["resolution"]))
    assert counted.training.params == row["params"]
    assert counted.published_macs == row["macs_conv_linear"]


def test_there_is_a_test_for_every_row(shared: Any) -> None:
    assert len(_published()) == 44
    assert len(_rows("roadmap.json")) == len(ROADMAP) == 14


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if number % 4 else []) for number, name in enumerate(ROADMAP)]
)
def test_roadmap_costs(name: str, shared: Any) -> None:
    row = _rows("roadmap.json")[int(name[8:10])]
    model = on_meta(name)
    counted = complexity(model)
    assert counted.training.macs == counted.published_macs == row["macs"]
    assert counted.training.params == row["params_of_the_reference_build"]
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert sum(layer.weight.numel() for layer in layers) == row["conv_and_linear_weights"]


# Some figures of the tables above, for machines without those tables.
@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("slak_tiny", 50_703_838, 8_704_776_370),
        pytest.param("replknet_31b", 79_864_168, 15_431_298_048, marks=pytest.mark.slow),
        ("shiftwise_tiny", 31_790_260, 5_335_558_264),
        pytest.param("convnext_isotropic_small", 22_308_712, 4_286_367_744, marks=pytest.mark.slow),
        pytest.param("roadmap_13_convnext_t", 28_589_128, 4_455_531_264, marks=pytest.mark.slow),
    ],
)
def test_defaults_cost_what_the_papers_report(name: str, params: int, macs: int) -> None:
    counted = complexity(on_meta(name))
    assert (counted.training.params, counted.published_macs) == (params, macs)


# ---- By hand


def countable() -> nn.Sequential:
    """Make a network: 3 -> 4 channels by 3x3; 7x7 and 3x3 depthwise with batch norms; 1x1 to 6; pooled; 5 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        LargeKernel(Rectangles(4, [(7, 7), (3, 3)]), [nn.BatchNorm2d(4), nn.BatchNorm2d(4)]),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def test_a_network_counted_by_hand() -> None:
    """At 8x8."""
    model = countable()
    pixels = 64
    around = 4 * 3 * 9 * pixels + 4 * 6 * pixels + 6 * 5
    weights_around = (4 * 3 * 9 + 4) + 4 * 6 + (6 * 5 + 5)
    training = Cost(
        params=weights_around + 4 * (49 + 9) + 2 * 2 * 4,
        macs=around + 4 * (49 + 9) * pixels,
        activations=4 * pixels + 2 * 4 * pixels + 6 * pixels + 5,
    )
    folded = Cost(
        params=weights_around + 4 * 49 + 4,
        macs=around + 4 * 49 * pixels,
        activations=4 * pixels + 4 * pixels + 6 * pixels + 5,
    )
    counted = complexity(model, (3, 8, 8))
    assert counted == Complexity((3, 8, 8), training, folded, training.macs, nonzero=training, realized=folded)


def test_tiles_cost_less_than_published() -> None:
    """The authors convolve with every padded tile; here the tiles are assembled into a strip first."""
    counted = complexity(create("slak_reg_nano"), (3, 64, 64))
    assert counted.published_macs > counted.training.macs
    assert (
        complexity(create("slak_nano"), (3, 64, 64)).published_macs
        == complexity(create("slak_nano"), (3, 64, 64)).training.macs
    )


@cache
def counted_at_64(name: str) -> Complexity:
    """Count a network, whatever its random weights are."""
    return complexity(create(name), (3, 64, 64))


@pytest.mark.parametrize(
    "name",
    [
        *[pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in NANO],
        "roadmap_00_resnet50_small",
        *[pytest.param(name, marks=pytest.mark.slow) for name in ("slak_nano_square", "shiftwise_nano_without_ghosts")],
    ],
)
def test_cost_grows_with_the_image(name: str) -> None:
    model = create(name)
    small, large = counted_at_64(name), complexity(model, (3, 128, 128))
    assert small.training.params == large.training.params == sum(p.numel() for p in model.parameters())
    assert large.training.macs > 3 * small.training.macs
    assert large.training.activations > 3 * small.training.activations
    assert small.folded.macs <= small.training.macs
    assert small.folded.activations <= small.training.activations


@pytest.mark.parametrize("name", NANO)
def test_folded_column_is_the_cost_of_the_folded_network(name: str) -> None:
    folded = widekernel.fold(create(name))
    counted = counted_at_64(name).folded
    assert counted.params == sum(parameter.numel() for parameter in folded.parameters())
    assert counted == complexity(folded, (3, 64, 64)).training


def test_rows() -> None:
    counted = complexity(create("slak_nano"), (3, 64, 64))
    assert [row[0] for row in counted.rows()] == ["training", "folded"]
    assert counted.rows()[1][1:] == (counted.folded.params, counted.folded.macs, counted.folded.activations)


# ---- Counting changes nothing


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_model_stays_unchanged(training: bool) -> None:
    model = create("slak_nano").train(training)
    # A network in training mode with a frozen batch norm.
    frozen = model.stages[0].blocks[0].mixer.norms[0].eval()
    model.head.fc.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    before, parameters = snapshot(model), [id(parameter) for parameter in model.parameters()]
    state = torch.get_rng_state()
    complexity(model, (3, 64, 64))
    assert_same_state(model.state_dict(), before)
    assert [module.training for module in model.modules()] == modes
    assert not frozen.training
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert not model.head.fc.weight.requires_grad
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_model_stays_unchanged_after_an_error() -> None:
    model = create("slak_nano").train()
    with pytest.raises(ShapeError):
        complexity(model, (3, 16, 16))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((224, 224), r"input_size \(224, 224\) must be three positive numbers: channels, height, width"),
        ((1, 3, 224, 224), "must be three positive numbers"),
        ((3, 0, 224), "must be three positive numbers"),
        ((3, -1, 224), "must be three positive numbers"),
        ((3, 16, 64), r"the image is 16x64 but the network's stride is 32"),
        ((4, 64, 64), "the input has 4 channels but the network takes 3"),
    ],
)
def test_wrong_sizes(size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        complexity(create("slak_nano"), size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_precision_does_not_matter(dtype: torch.dtype) -> None:
    expected = complexity(create("slak_nano"), (3, 64, 64))
    assert complexity(create("slak_nano").to(dtype), (3, 64, 64)) == expected


def test_networks_with_and_without_weights_count_alike() -> None:
    with tables_drawn_once():
        real = timm.create_model("shiftwise_nano")
    assert complexity(real, (3, 64, 64)) == complexity(on_meta("shiftwise_nano"), (3, 64, 64))


# ---- Zeros: dense, non-zero, realized


def test_zeros_counted_by_hand() -> None:
    """The network above: half of the large kernel's channels are dead, other zeros are scattered."""
    model = countable()
    with torch.no_grad():
        model[0].weight[0] = 0
        for kernel in model[1].source.kernels:
            kernel.zero_()
        model[1].source.kernels[1][:2] = 1
        model[2].weight[:, 0] = 0
        model[5].weight[:, :3] = 0
        model[5].bias.zero_()
    counted, pixels = complexity(model, (3, 8, 8)), 64
    assert counted.dense is counted.training
    assert counted.nonzero.params == counted.dense.params - 27 - 4 * 49 - 2 * 9 - 6 - 15
    assert counted.nonzero.macs == counted.dense.macs - pixels * (27 + 4 * 49 + 2 * 9 + 6) - 15
    assert counted.nonzero.activations == counted.dense.activations
    # The 7x7 is removed; the 3x3 stays in all channels, as gathering two of them would not pay.
    assert counted.realized.macs == counted.folded.macs - pixels * 4 * (49 - 9)
    assert counted.realized.params == counted.folded.params - 4 * (49 - 9)


@pytest.mark.parametrize("name", [*NANO, "slak_nano_square", "slak_pw_nano_truncated"])
@pytest.mark.filterwarnings("ignore:these layers were not folded")
def test_columns_agree_without_zeros(name: str) -> None:
    counted = counted_at_64(name)
    assert counted.nonzero == counted.dense
    assert counted.realized == counted.folded


@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "slak_reg_nano", "slak_pw_nano_truncated"])
@pytest.mark.filterwarnings("ignore:these layers were not folded")
def test_scattered_zeros_save_no_computation(name: str) -> None:
    model = create(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand(parameter.shape) >= 0.4
    counted = complexity(model, (3, 64, 64))
    assert 0.58 < counted.nonzero.macs / counted.dense.macs < 0.62
    assert 0.58 < counted.nonzero.params / counted.dense.params < 0.64
    assert counted.realized == counted.folded


def test_dead_kernels_are_removed_in_the_realized_column() -> None:
    model = create("shiftwise_nano")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LargeKernel):
                for tiles in module.source.tiles:
                    tiles.zero_()
    counted = complexity(model, (3, 64, 64))
    assert counted.realized.macs < counted.folded.macs
    assert counted.nonzero.macs < counted.dense.macs
    assert counted.realized.params < counted.folded.params


def test_folded_and_compacted_networks_are_counted_too() -> None:
    model = create("slak_nano")
    with torch.no_grad():
        for kernel in model.stages[0].blocks[0].mixer.source.kernels:
            kernel.zero_()
    counted = complexity(model, (3, 64, 64))
    folded, small = (complexity(form(model), (3, 64, 64)) for form in (widekernel.fold, compact))
    assert folded.dense == counted.folded
    assert folded.nonzero.macs == folded.dense.macs - 16 * 2 * 31 * 3 * 16 * 16
    assert small.dense == small.nonzero == counted.realized == folded.realized


def test_to_dict() -> None:
    counted = complexity(create("slak_nano"), (3, 64, 64))
    values = json.loads(json.dumps(counted.to_dict()))
    assert values["input_size"] == [3, 64, 64]
    assert list(values) == ["input_size", "published_macs", "dense", "nonzero", "folded", "realized"]
    assert values["realized"]["macs"] == counted.realized.macs


@pytest.mark.full
def test_published_figures_of_sparse_networks() -> None:
    """SLaK-T's 30 M / 5.0 G are its non-zero weights; 40 % zeros everywhere give 30.5 M / 5.22 G, of 50.7 M / 8.70 G."""
    model = timm.create_model("slak_tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 4):
                parameter *= torch.rand(parameter.shape, generator=generator) >= 0.4
    counted = complexity(model)
    assert round(counted.dense.params / 1e6, 1) == 50.7
    assert round(counted.dense.macs / 1e9, 2) == 8.70
    assert round(counted.nonzero.params / 1e6, 1) == 30.5
    assert round(counted.nonzero.macs / 1e9, 2) == 5.22
    assert counted.realized == counted.folded


# ---- The command


def _command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["complexity", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_command_prints_the_table_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _command(capsys, "slak_nano")
    assert code == 0
    for word in ("dense", "non-zero", "folded", "realized", "parameters (M)", "MACs (G)", "activations (M)"):
        assert word in out


@pytest.mark.parametrize("form", ["training", "folded"])
def test_command_reads_a_file_with_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Any) -> None:
    model = timm.create_model("slak_nano", num_classes=5)
    with torch.no_grad():
        for kernel in model.stages[0].blocks[0].mixer.source.kernels:
            kernel.zero_()
    preprocessing = Preprocessing.resolve(DataConfig(), pretrained_cfg(model))
    saved = SavedModel("slak_nano", {}, form, 5, (), preprocessing)
    model = widekernel.fold(model) if form == "folded" else model
    save_model(model, tmp_path / "net.safetensors", saved)
    code, out, _ = _command(capsys, str(tmp_path / "net.safetensors"), "--json")
    assert code == 0
    assert json.loads(out) == complexity(model, (3, 64, 64)).to_dict()
    assert json.loads(out)["realized"]["macs"] < json.loads(out)["folded"]["macs"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.pth"], "nothing.pth does not exist"),
        (["slak_nano", "--weights", "ema"], "must be a run folder or a checkpoint file for --weights"),
        (["slak_nano", "--state", "best"], "for --state"),
        (["slak_nona"], "'slak_nano'"),
    ],
)
def test_command_refuses_wrong_sources(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    code, _, err = _command(capsys, *arguments)
    assert code == 2
    assert words in " ".join(err.split())
