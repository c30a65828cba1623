"""Published networks for segmentation and detection by name: built by their recipe, fetched, loaded and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import widekernel
from tests.data.scenes import CLASSES, SHAPES
from tests.tasks.dense_settings import write_scenes
from tests.weights.conftest import url
from tests.weights.server import Server, cut, status
from widekernel.cli.main import main
from widekernel.errors import CheckpointError
from widekernel.recipes import load_recipe
from widekernel.recipes.networks import build_published
from widekernel.tasks.network_config import DetectorConfig, SegmenterConfig
from widekernel.tasks.networks import build_detector, build_segmenter
from widekernel.weights import find_checkpoint

SLAK, CONVNEXT = "slak_tiny.in1k_ft_ade20k_upernet_512", "convnext_tiny.in1k_ft_coco_cascade"
SMALL: dict[str, dict[str, Any]] = {
    SLAK: {
        "args": {
            "depths": [1, 1, 1, 1],
            "dims": [8, 8, 16, 16],
            "kernel_sizes": [9, 7, 5, 9],
            "small_kernel": 3,
            "width_factor": 1.0,
        },
        "channels": 16,
        "auxiliary_channels": 8,
    },
    CONVNEXT: {"args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, "channels": 32, "fc_channels": 32},
}
DATA = {
    SLAK: ["--data.format=folder", "--data.image_scale=[128, 96]"],
    CONVNEXT: ["--data.format=coco_json", "--data.images=pictures", "--data.image_scale=[128, 96]"],
}
FOLDER = {SLAK: "folder", CONVNEXT: "coco"}
RECIPE = {SLAK: "slak_tiny_ade20k_160k_512", CONVNEXT: "convnext_tiny_coco_36e_800_cascade"}
RESULT = {SLAK: "miou", CONVNEXT: "box_ap"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def options(name: str, scenes: Path) -> list[str]:
    """Return the options that make a published network small, and evaluate it on generated scenes."""
    small = dict(SMALL[name])
    args = small.pop("args")
    given = {**small, **{f"args.{key}": value for key, value in args.items()}}
    network = [f"--model.{key}={json.dumps(value)}" for key, value in given.items()]
    return [*network, f"--data.root={scenes / FOLDER[name]}", *DATA[name], "--data.workers=0", "--device=cpu", "--json"]


def small_network(name: str) -> nn.Module:
    """Build the small form of a published network, with weights that are all different."""
    settings = {key: value for key, value in load_recipe(RECIPE[name]).settings["model"].items() if key != "weights"}
    settings |= {**SMALL[name], "args": {**settings["args"], **SMALL[name]["args"]}}
    if name == SLAK:
        network: nn.Module = build_segmenter(SegmenterConfig(**settings), len(CLASSES))
    else:
        network = build_detector(DetectorConfig(**settings), len(SHAPES), masks=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def published_file(network: nn.Module, folder: Path) -> Path:
    """Write weights as the authors' training scripts would."""
    state = torch.load(widekernel.save_checkpoint(network, folder / "plain.pth", layout="official"), weights_only=True)
    file = folder / "published.pth"
    torch.save({"meta": {"iter": 160000}, "state_dict": state.get("state_dict", state.get("model")), "optimizer": {}}, file)
    return file


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    code = main(["eval", *arguments])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out), shown.err


@pytest.mark.parametrize("name", [SLAK, pytest.param(CONVNEXT, marks=pytest.mark.slow)])
def test_evaluation_by_name(
    name: str,
    scenes: Path,
    server: Server,
    publish: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = published_file(small_network(name), tmp_path)
    server.content = file.read_bytes()
    server.plan = [status(503), cut(5000)]
    publish(url(server), like=name)
    given = options(name, scenes)
    found, messages = evaluated(capsys, name, *given)
    assert f"{name}.pth" in messages and f"layout {find_checkpoint(name).layout}" in messages
    by_path, _ = evaluated(capsys, str(file), "--recipe", RECIPE[name], *given)
    assert found == by_path and found[RESULT[name]] is not None
    requests = len(server.requests)
    assert requests >= 3
    evaluated(capsys, name, "--task", find_checkpoint(name).task, *given)
    assert len(server.requests) == requests


def test_prediction_by_name(
    server: Server, publish: Callable[..., Any], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content = published_file(small_network(SLAK), tmp_path).read_bytes()
    publish(url(server), like=SLAK)
    given = [option for option in options(SLAK, scenes) if not option.startswith("--data.root")]
    picture = min((scenes / "folder" / "val" / "images").iterdir())
    classes = f"--data.classes={scenes / 'folder' / 'classes.json'}"
    output = tmp_path / "predictions"
    assert main(["predict", SLAK, str(picture), *given, classes, "--output", str(output)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["classes"]) <= set(CLASSES) and sum(found["classes"].values()) == pytest.approx(1)
    assert (output / "classes" / f"{picture.stem}.png").is_file()


def test_loading_by_name(server: Server, publish: Callable[..., Any], tmp_path: Path) -> None:
    ours = small_network(SLAK)
    server.content = published_file(ours, tmp_path).read_bytes()
    publish(url(server), like=SLAK)
    other = small_network(SLAK)
    report = widekernel.load_checkpoint(other, SLAK)
    assert (report.container, report.layout) == ("state_dict", "SLaK")
    assert not (report.missing or report.ignored or report.dropped)
    state = other.state_dict()
    assert all(torch.equal(state[key], value) for key, value in ours.state_dict().items())


def test_a_server_without_the_file(
    server: Server, publish: Callable[..., Any], scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(url(server), like=SLAK)
    server.always = status(404)
    assert main(["eval", SLAK, *options(SLAK, scenes)]) != 0
    error = capsys.readouterr().err
    assert f"{SLAK} cannot be fetched" in error and "404" in error


def test_networks_are_built_by_their_recipes() -> None:
    with torch.device("meta"):
        fcos: Any = build_published("replknet_31b.in1k_ft_coco_fcos")
        segmenter: Any = build_published("replknet_31b.in1k_ft_cityscapes_upernet_769")
    assert type(fcos).__name__ == "Fcos" and sum(each.numel() for each in fcos.parameters()) == 87_165_658
    assert segmenter.options.align_corners and segmenter.options.num_classes == 19


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("replknet_31b.in1k_224", "is a classifier: create it with timm.create_model"),
        ("slak_tiny.in1k_ft_ade20k_upernet", "Did you mean 'slak_tiny.in1k_ft_ade20k_upernet_512'"),
    ],
)
def test_names_without_such_a_network(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build_published(name)
