"""`widekernel weights`: the list, one entry, and the download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.weights.conftest import url
from tests.weights.server import Server, status
from widekernel.cli.main import main
from widekernel.weights import list_checkpoints

NAME = "replknet_31b.in1k_224"


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[str, str]:
    assert main(["weights", *arguments]) == 0
    return capsys.readouterr()


def fail(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["weights", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_list(capsys: pytest.CaptureFixture) -> None:
    out, err = run(capsys)
    assert err == ""
    names = [line.split()[1] for line in out.splitlines() if line.startswith("│")]
    assert names == [each.name for each in list_checkpoints()]
    (line,) = [line for line in out.splitlines() if "replknet_xl.megdata73m_ft_in1k_320" in line]
    for text in ("MegData-73M → ImageNet-1K", " 320 ", "87.8 top-1", " 335 ", "MIT", "download.openmmlab.com, Google Drive"):
        assert text in line


def test_filters(capsys: pytest.CaptureFixture) -> None:
    out, _ = run(capsys, "--model", "slak*", "--task", "segmentation", "--json")
    assert [each["name"] for each in json.loads(out)] == [
        f"slak_{size}.in1k_ft_ade20k_upernet_512" for size in ("tiny", "small", "base")
    ]
    out, _ = run(capsys, "--model", "*.in22k_ft_in1k_384", "--json")
    assert {each["name"].partition(".")[0] for each in json.loads(out)} >= {"replknet_31b", "replknet_31l"}


def test_one(capsys: pytest.CaptureFixture) -> None:
    out, _ = run(capsys, "slak_tiny.k31_e120_in1k_224")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["name"] == "slak_tiny.k31_e120_in1k_224"
    assert lines["arguments"] == "kernel_sizes=[31, 29, 27, 13]"
    assert lines["here"] == "no"
    assert lines["use"] == "timm.create_model('slak_tiny.k31_e120_in1k_224', pretrained=True)"
    assert "https://surfdrive.surf.nl/" in lines["from"]


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("convnext_tiny.fb_in1k", "timm.create_model('convnext_tiny.fb_in1k', pretrained=True) (timm's own tag)"),
        (
            "convnext_base.fb_in1k_384",
            "widekernel.load_checkpoint(timm.create_model('convnext_base'), 'convnext_base.fb_in1k_384')",
        ),
        (
            "slak_tiny.in1k_ft_coco_cascade_1x",
            "widekernel eval slak_tiny.in1k_ft_coco_cascade_1x --data.root FOLDER",
        ),
        ("unireplknet_a.in1k_224", "timm.create_model('unireplknet_a.in1k_224', pretrained=True)"),
    ],
)
def test_how_to_use_it(name: str, use: str, capsys: pytest.CaptureFixture) -> None:
    assert f"use            {use}\n" in run(capsys, name)[0]


def test_networks_of_other_tasks(capsys: pytest.CaptureFixture) -> None:
    """Their recipe describes the whole network; their backbone is also that of a classifier."""
    name = "slak_tiny.in1k_ft_ade20k_upernet_512"
    lines = dict(line.split(maxsplit=1) for line in run(capsys, name)[0].splitlines())
    assert (lines["recipe"], lines["results"]) == ("slak_tiny_ade20k_160k_512", "47.6 mIoU")
    assert lines["backbone"] == f"widekernel.load_checkpoint(timm.create_model('slak_tiny'), {name!r})"
    assert json.loads(run(capsys, name, "--json")[0])["recipe"] == "slak_tiny_ade20k_160k_512"


def test_json(capsys: pytest.CaptureFixture) -> None:
    shown = json.loads(run(capsys, NAME, "--json")[0])
    assert shown["metrics"] == {"top1": 83.5}
    assert shown["sources"][1] | {"id": "1azQUiCxK9feYVkkrPqwVPBtNsTzDrX7S", "kind": "google_drive"} == shown["sources"][1]
    assert shown["file"] is None


def test_fetch(server: Server, publish: Any, cache: Path, capsys: pytest.CaptureFixture) -> None:
    publish(url(server))
    out, err = run(capsys, NAME, "--fetch")
    assert out == f"{cache / NAME}.pth\n"
    assert err == "Fetching from 127.0.0.1.\n"
    assert run(capsys, NAME, "--fetch") == (out, "")
    assert json.loads(run(capsys, NAME, "--fetch", "--json")[0])["file"] == str(cache / f"{NAME}.pth")
    listed = run(capsys, "--model", NAME)[0]
    assert "yes" in listed.splitlines()[3]


def test_fetch_in_a_terminal(
    server: Server,
    publish: Any,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    publish(url(server))
    out, err = run(capsys, NAME, "--fetch")
    assert out.endswith(".pth\n")
    assert "━" in err


def test_a_failed_fetch(server: Server, publish: Any, cache: Path, capsys: pytest.CaptureFixture) -> None:
    publish(url(server))
    server.always = status(404)
    err = fail(capsys, NAME, "--fetch")
    assert "127.0.0.1: the server answers 404 Not Found.\n" in err
    assert f"error: {NAME} cannot be fetched:\n" in err
    assert f"save it as {cache / NAME}.pth" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fetch"], "--fetch downloads the weights that you name: add NAME"),
        ([NAME, "--task", "detection"], "is named already: leave them out"),
        (["replknet_31b.in1k_225"], "Did you mean 'replknet_31b.in1k_224'?"),
        (["--model", "slak_tinny"], "match 'slak_tinny'. Did you mean 'slak_tiny'?"),
        (["--task", "detektion"], "task"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert message in fail(capsys, *arguments)
