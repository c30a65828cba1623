"""Exported programs of PyTorch, which need no further package; and errors that concern every format."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from torch import nn

from tests.models.zoo import alive, assert_near, images, on_meta
from widekernel import accelerate
from widekernel.errors import ConfigError, WidekernelError
from widekernel.export import ExportError, ExportSettings, export, format_named
from widekernel.export.images import noise_images
from widekernel.export.torch_program import TorchProgramFormat
from widekernel.ops.cpu import library as native
from widekernel.tasks.named_network import load_named
from widekernel.tasks.saved import SavedModel
from widekernel.transforms import FusedBlock, to_torch
from widekernel.transforms.acceleration.fusion.packing import missing

PROGRAM = "torch-export"
ALONE = """
import json, sys, torch
extra = {"widekernel.json": ""}
network = torch.export.load(sys.argv[1], extra_files=extra).module()
with torch.no_grad():
    torch.save(network(torch.load(sys.argv[2])), sys.argv[3])
print(json.loads(json.loads(extra["widekernel.json"])["class_names"]))
assert "widekernel" not in sys.modules and "timm" not in sys.modules
"""


@pytest.fixture(scope="module")
def saved() -> SavedModel:
    _, described = load_named("slak_nano")
    return replace(described, class_names=("first", "second"))


@pytest.fixture(scope="module")
def exported(saved: SavedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("program") / "new" / "network.pt2"
    settings = ExportSettings(PROGRAM, dynamic_batch=True, dynamic_size=True)
    export(alive("slak_nano"), path, settings, saved, noise_images(3, 3, 64))
    return path


@pytest.mark.slow
def test_a_program_runs_without_widekernel(exported: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = alive("slak_nano"), images(96, 3)
    torch.save(x, tmp_path / "x.pt")
    arguments = [sys.executable, "-c", ALONE, str(exported), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run(arguments, check=True, cwd=tmp_path, capture_output=True, text=True)
    with torch.no_grad():
        assert_near(torch.load(tmp_path / "y.pt"), model(x))
    assert done.stdout.strip() == "['first', 'second']"


def test_the_report_is_beside_the_file(exported: Path) -> None:
    report = json.loads(exported.with_name("network.pt2.json").read_text())
    assert report["files"] == {"network.pt2": exported.stat().st_size}
    assert report["form"] == "folded"
    assert report["settings"]["format"] == PROGRAM
    assert 0 < report["comparison"]["max_difference"] < 1e-5
    assert report["comparison"]["agreement"] == 1.0
    assert report["source"] == "seeded noise"
    assert set(report["probes"]) == {"3×3×64×64", "3×3×64×128"}
    assert set(report["milliseconds"]) == {"widekernel", "PyTorch"}
    assert sorted(path.name for path in exported.parent.iterdir()) == ["network.pt2", "network.pt2.json"]
    description = format_named(PROGRAM).description(exported)
    assert description == report["description"]
    assert json.loads(description["preprocessing"])["input_size"] == 64


def test_a_file_that_computes_something_else_is_not_kept(saved: SavedModel, tmp_path: Path) -> None:
    def load(self: TorchProgramFormat, path: Path, threads: int) -> object:
        run = original(self, path, threads)
        return lambda batch: 1.01 * run(batch)

    original = TorchProgramFormat.load
    path = tmp_path / "network.pt2"
    path.write_text("precious")
    model = alive("slak_nano")
    with (
        mock.patch.object(TorchProgramFormat, "load", load),
        pytest.raises(ExportError, match=r"up to 0\.01 .*at most 0.0001"),
    ):
        export(model, path, ExportSettings(PROGRAM), saved, noise_images(1, 3, 64))
    assert [file.name for file in tmp_path.iterdir()] == ["network.pt2"]
    assert path.read_text() == "precious"


def test_a_network_of_one_size_only_is_refused_for_any_size(saved: SavedModel, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    settings = ExportSettings(PROGRAM, dynamic_size=True)
    with pytest.raises(ExportError, match=r"fails on images of 64×128 pixels .*without --dynamic_size"):
        export(model, tmp_path / "network.pt2", settings, saved, noise_images(1, 3, 64))
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    """A network whose computation depends on the contents of the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else -x.mean((2, 3))


def test_a_network_without_a_graph_is_refused(saved: SavedModel, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot be written as torch-export .*to_torch"):
        export(Branching(), tmp_path / "network.pt2", ExportSettings(PROGRAM), saved, noise_images(1, 3, 64))
    assert list(tmp_path.iterdir()) == []


def test_networks_with_several_outputs_are_refused(saved: SavedModel, tmp_path: Path) -> None:
    model = timm.create_model("slak_nano", features_only=True)
    with pytest.raises(ExportError, match="returns a list, but only networks with one output"):
        export(model, tmp_path / "network.pt2", ExportSettings(PROGRAM), saved, noise_images(1, 3, 64))


@pytest.mark.slow
def test_the_network_is_not_changed(saved: SavedModel, tmp_path: Path) -> None:
    model = alive("slak_nano").train()
    model.head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    export(model, tmp_path / "network.pt2", ExportSettings(PROGRAM, half=True), saved, noise_images(1, 3, 64))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_wrong_arguments_are_errors(saved: SavedModel, tmp_path: Path) -> None:
    images_of_noise = noise_images(1, 3, 64)
    with pytest.raises(ConfigError, match=r"network\.onnx', but torch-export exports are \.pt2 files"):
        export(alive("slak_nano"), tmp_path / "network.onnx", ExportSettings(PROGRAM), saved, images_of_noise)
    with pytest.raises(ConfigError, match="on meta, but it must be on the CPU"):
        export(on_meta("slak_nano"), tmp_path / "network.pt2", ExportSettings(PROGRAM), saved, images_of_noise)


def test_a_file_that_cannot_be_written_is_an_error(saved: SavedModel) -> None:
    with pytest.raises(WidekernelError, match=r"/proc/network\.pt2 cannot be written"):
        export(alive("slak_nano"), Path("/proc/network.pt2"), ExportSettings(PROGRAM), saved, noise_images(1, 3, 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "onxx"}, r"'onxx' is unknown: it must be one of .* Did you mean 'onnx'\?"),
        ({"format": PROGRAM, "kernels": "thin"}, "kernels 'thin' is unknown"),
        ({"format": PROGRAM, "batch": 0}, "batch is 0, but must be positive"),
        ({"format": PROGRAM, "half": True, "int8": True}, "two precisions"),
    ],
)
def test_wrong_settings_are_errors(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportSettings(**settings)


@pytest.mark.parametrize(("name", "packages"), [("onnx", "onnx, onnxscript, onnxruntime"), ("openvino", "openvino")])
def test_missing_packages_are_named(name: str, packages: str) -> None:
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(ConfigError) as caught:
        format_named(name).require_packages()
    assert packages in str(caught.value) and "pip install 'widekernel[export]'" in str(caught.value)


def test_programs_are_not_quantized() -> None:
    with pytest.raises(ConfigError, match=r"--int8 does not exist .*onnx or openvino"):
        format_named(PROGRAM).require_packages(int8=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_with_fused_blocks(saved: SavedModel, tmp_path: Path, precision: str) -> None:
    lacking = missing(precision)
    if precision != "float32" and lacking is not None:
        pytest.skip(lacking)
    torch.manual_seed(0)
    model, x = alive("slak_nano").eval(), images(64, 1)
    with torch.no_grad():
        _, report = accelerate(model, x, precision=precision)
    assert report.fused or native.load().reason is not None
    export(model, tmp_path / "network.pt2", ExportSettings(PROGRAM), saved, noise_images(3, 3, 64))
    program = torch.export.load(tmp_path / "network.pt2").module()
    with torch.no_grad():
        assert_near(program(x), to_torch(model)(x))
    assert len(report.fused) == sum(isinstance(module, FusedBlock) for module in model.modules())
