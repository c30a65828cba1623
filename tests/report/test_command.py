"""The command `report`: options and errors."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from widekernel.cli.main import main
from widekernel.report.collecting import Report

pytest.importorskip("jinja2")
FAST = ["--time", "false", "--erf_images", "1", "--erf_size", "32"]


def test_page_of_a_run(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = tmp_path / "new" / "report.html", tmp_path / "data" / "report.json"
    assert main(["report", str(run_folder), "--output", str(page), "--json", str(data), *FAST]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(str(page)) and str(data) in said.out and "accuracy ..." in said.err
    found = json.loads(data.read_text())
    assert set(found) == {field.name for field in fields(Report)}
    assert found["label"] == run_folder.name and found["accuracy"]["images"] > 0
    assert "Timing was turned off" in found["speed"]["missing"]
    assert found["field"]["scores"] == {"shape": [32, 32]}
    assert "Timing was turned off" in page.read_text()
    assert main(["report", str(run_folder), "--output", str(page), *FAST]) == 2
    assert "exists. Choose another --output, or add --overwrite" in capsys.readouterr().err
    assert main(["report", str(run_folder), "--output", str(page), "--overwrite", "--weights", "ema", *FAST]) == 0
    assert "averaged weights come from a run" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slak_nani"], "'slak_nano'"),
        (["runs/none"], "runs/none does not exist"),
        (["BROKEN.pth"], "write NAME="),
        (["RUN"], "has no training states yet"),
        (["slak_nano", "--data", "BROKEN.tar"], "is not a readable, uncompressed tar archive"),
        (["slak_nano", "--compare", "slak_nani"], "'slak_nano'"),
        (["slak_nano", "--data", "MISSING"], "MISSING does not exist"),
        (["slak_nano", "--output", "FILE/report.html"], "is a file"),
        (["slak_nano", "--output", "FOLDER"], "which is a folder"),
        (["slak_nano", "--output", "report.pdf"], "a report is an .html file"),
        (["slak_nano", "--json", "report.html"], "the data of a report are a .json file"),
        (["slak_nano", "--json", "FILE/report.json"], "--json"),
        (["slak_nano", "--output", "LOCKED/report.html"], "cannot be written"),
        (["slak_nano", "--weights", "ema"], "one set of weights"),
        (["slak_nano", "--batch_sizes", "[0]"], "batch_sizes is [0]"),
        (["slak_nano", "--erf_images", "0"], "erf_images is 0"),
        (["slak_nano", "--tim", "false"], "--time"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    (tmp_path / "run").mkdir()
    for name in ("broken.pth", "broken.tar", "run/config.yaml"):
        (tmp_path / name).write_text("seed: 0" if name == "run/config.yaml" else "garbage")
    if "LOCKED/report.html" in arguments:
        # Permissions do not stop an administrator, who may be running the tests.
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    named = {word: tmp_path / word.lower() for word in ("BROKEN.pth", "BROKEN.tar", "RUN")}
    named |= {"FILE/report.html": tmp_path / "file" / "report.html", "FOLDER": tmp_path, "MISSING": tmp_path / "MISSING"}
    named["FILE/report.json"] = tmp_path / "file" / "report.json"
    named["LOCKED/report.html"] = tmp_path / "locked" / "report.html"
    assert main(["report", *(str(named.get(word, word)) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_without_jinja2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", "slak_nano", "--output", str(tmp_path / "report.html")]) == 2
    assert "pip install 'widekernel[report]'" in capsys.readouterr().err
