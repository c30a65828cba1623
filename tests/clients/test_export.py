"""Exports to ONNX and OpenVINO, and of every family in every format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.zoo import NANO, alive
from widekernel.cli.main import main
from widekernel.export import ExportSettings, export, format_named
from widekernel.export.images import noise_images
from widekernel.tasks.named_network import load_named
from widekernel.tasks.saved import save_model

pytestmark = pytest.mark.clients
ENGINES = pytest.mark.parametrize("kind", ["onnx", "openvino"])


def require(kind: str, int8: bool = False) -> None:
    """Skip the test if a package is missing."""
    form = format_named(kind)
    for module in (*form.packages, *((form.int8_packages or {}) if int8 else ())):
        pytest.importorskip(module)


@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch-export"])
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "training"])
@pytest.mark.parametrize("name", NANO)
def test_every_family(name: str, fold: bool, kind: str, tmp_path: Path) -> None:
    """The export itself raises if outputs differ by more than 1e-4; for small networks, far less is enough."""
    require(kind)
    _, saved = load_named(name)
    form = format_named(kind)
    settings = ExportSettings(kind, fold=fold, dynamic_batch=True, dynamic_size=True)
    path = tmp_path / f"network{form.suffix}"
    report = export(alive(name), path, settings, saved, noise_images(3, 3, 64))
    # An isotropic network has nothing to fold.
    assert report.form == ("folded" if fold and name != "convnext_isotropic_nano" else "training")
    assert max(report.comparison.max_difference, *report.probes.values()) < 1e-5
    assert report.comparison.agreement == 1.0
    assert form.description(path) == report.description
    assert set(report.files) == {file for file in tmp_path.iterdir() if file.suffix != ".json"}


@ENGINES
@pytest.mark.parametrize("kernels", ["strips", "dense"])
def test_both_forms_of_kernels(kind: str, kernels: str, tmp_path: Path) -> None:
    require(kind)
    _, saved = load_named("slak_nano")
    settings = ExportSettings(kind, kernels=kernels, batch=2)
    report = export(alive("slak_nano"), tmp_path / f"a{format_named(kind).suffix}", settings, saved, noise_images(3, 3, 64))
    assert report.comparison.max_difference < 1e-5
    assert set(report.kernels) == {kernels}


@ENGINES
def test_channels_are_padded_for_onnxruntime_only(kind: str, tmp_path: Path) -> None:
    require(kind)
    _, saved = load_named("slak_nano")
    model = alive("slak_nano", width_factor=1.3)
    report = export(model, tmp_path / f"a{format_named(kind).suffix}", ExportSettings(kind), saved, noise_images(3, 3, 64))
    assert report.comparison.max_difference < 1e-5
    assert ("padded channels" in report.kernels) == (kind == "onnx")


@ENGINES
def test_half_precision(kind: str, tmp_path: Path) -> None:
    require(kind)
    _, saved = load_named("shiftwise_nano")
    sizes = {}
    for half in (False, True):
        path = tmp_path / f"half_{half}{format_named(kind).suffix}"
        settings = ExportSettings(kind, half=half)
        report = export(alive("shiftwise_nano"), path, settings, saved, noise_images(3, 3, 64))
        sizes[half] = sum(file.stat().st_size for file in report.files)
        assert (1e-5 < report.comparison.max_difference < 1e-2) == half
    assert sizes[True] < 0.7 * sizes[False]


@ENGINES
def test_quantization_with_a_calibration_set(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require(kind, int8=True)
    suffix, folder = format_named(kind).suffix, tmp_path / "data"
    for number in range(24):
        name = folder / ("bright" if number % 2 else "dark") / f"{number}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise // 2 + 120 * (number % 2)).save(name)
    _, saved = load_named("slak_nano")
    model = alive("slak_nano", num_classes=2)
    described = type(saved)("slak_nano", {}, "training", 2, ("bright", "dark"), saved.preprocessing)
    save_model(model, tmp_path / "model.safetensors", described)
    options = ["--format", kind, "--data", str(folder), "--images", "8", "--calibration_images", "16"]
    source = str(tmp_path / "model.safetensors")
    sizes = {}
    for precision in ([], ["--int8"]):
        output = tmp_path / f"network{len(precision)}{suffix}"
        assert main(["export", source, *options, *precision, "--output", str(output), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        sizes[len(precision)] = sum(report["files"].values())
        assert len(report["comparison"]["accuracy"]) == 2
    assert sizes[1] < 0.5 * sizes[0]
    assert (report["calibration_images"], report["shared_images"]) == (16, 0)
    assert 1e-5 < report["comparison"]["max_difference"] < 0.3
    assert report["comparison"]["agreement"] >= 0.5
    assert json.loads(report["description"]["class_names"]) == ["bright", "dark"]


@ENGINES
def test_quantization_needs_images(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    require(kind, int8=True)
    assert main(["export", "slak_nano", "--format", kind, "--int8"]) == 2
    assert "--int8 needs images to calibrate with" in capsys.readouterr().err


def test_an_existing_file_of_weights_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("openvino")
    (tmp_path / "a.bin").write_text("precious")
    assert main(["export", "slak_nano", "--format", "openvino", "--output", str(tmp_path / "a.xml")]) == 2
    assert "a.bin exists" in capsys.readouterr().err


def test_onnx_files_hold_the_description(tmp_path: Path) -> None:
    require("onnx")
    import onnxruntime

    _, saved = load_named("slak_nano")
    path = tmp_path / "a.onnx"
    export(alive("slak_nano"), path, ExportSettings("onnx", dynamic_batch=True), saved, noise_images(2, 3, 64))
    session = onnxruntime.InferenceSession(str(path))
    assert [given.name for given in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]
    assert [given.name for given in session.get_outputs()] == ["logits"]
    stored = session.get_modelmeta().custom_metadata_map
    assert json.loads(stored["preprocessing"])["input_size"] == 64
    assert stored["model"] == "slak_nano"
    assert torch.from_numpy(session.run(None, {"image": np.zeros((5, 3, 64, 64), np.float32)})[0]).shape == (5, 1000)
