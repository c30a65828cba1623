"""The command `export`, in the format that needs no further package."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.models.zoo import alive

from widekernel.cli.main import main

PROGRAM = ["--format", "torch-export"]


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("widekernel.export.exporting.LATENCY_SECONDS", 0.02)


def pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def test_weights_of_another_file_are_exported_and_compared_on_images(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(alive("slak_nano").state_dict(), "weights.pth")
    data = pictures(Path("data"))
    assert main(["export", "slak_nano=weights.pth", *PROGRAM, "--data", str(data), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(Path("slak_nano.pt2.json").read_text())
    assert (report["source"], report["comparison"]["images"], report["form"]) == ("data", 3, "folded")
    assert report["comparison"]["max_difference"] < 1e-5
    assert torch.export.load("slak_nano.pt2").module()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.slow
def test_a_network_that_is_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--fold", "false", "--half", "--batch_size", "2", "--input_size", "96", "--images", "3", "--output", "a.pt2"]
    assert main(["export", "slak_nano", *PROGRAM, *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a.pt2" in said and "training form, float16" in said and "3 images: seeded noise" in said
    assert "latency of 2 images" in said and "report: a.pt2.json" in said
    assert torch.export.load("a.pt2").module()(torch.zeros(2, 3, 96, 96)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "tensorflow"], "format 'tensorflow' is unknown"),
        ([*PROGRAM, "--output", "a.onnx"], "'a.onnx', but torch-export exports are .pt2 files"),
        ([*PROGRAM, "--output", "there.pt2"], "there.pt2 exists. Choose another --output, or add --overwrite"),
        ([*PROGRAM, "--output", "folder.pt2"], "'folder.pt2', which is a folder"),
        ([*PROGRAM, "--output", "there.pt2/a.pt2"], "which is a file. Choose a folder"),
        ([*PROGRAM, "--data", "folder.pt2"], "holds no images"),
        ([*PROGRAM, "--data", "nowhere"], "nowhere does not exist"),
        ([*PROGRAM, "--input_size", "16"], "the image is 16x16 but the network's stride is 32"),
        ([*PROGRAM, "--images", "0"], "images is 0, but must be positive"),
        ([*PROGRAM, "--int8"], "--int8 does not exist for the format torch-export"),
        ([*PROGRAM, "--half", "--int8"], "two precisions"),
        ([*PROGRAM, "--kernels", "wide"], "kernels 'wide' is unknown"),
        ([], "format"),
    ],
)
def test_wrong_input_is_an_error(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there.pt2").write_text("")
    Path("folder.pt2").mkdir()
    assert main(["export", "slak_nano", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("slak_nano.pt2").exists()


def test_unknown_networks_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "slak_nanno", *PROGRAM]) == 2
    assert "not a registered model" in capsys.readouterr().err
    assert main(["export", "runs/none", *PROGRAM]) == 2
    assert "runs/none does not exist" in capsys.readouterr().err


def test_networks_that_cannot_be_loaded_or_run_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.pth").write_text("garbage")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("{}")
    for source, message in [
        ("broken.pth", "write NAME=broken.pth"),
        ("slak_nano=broken.pth", "is not a checkpoint"),
        ("run", "has no training states yet"),
    ]:
        assert main(["export", source, *PROGRAM]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", "test_vit", *PROGRAM, "--input_size", "100", "--images", "1"]) == 2
    assert "fails on images of 100×100 pixels" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    Path("locked").mkdir(mode=0o500)
    assert main(["export", "slak_nano", *PROGRAM, "--output", "locked/a.pt2"]) == 2
    assert "cannot be written" in capsys.readouterr().err
