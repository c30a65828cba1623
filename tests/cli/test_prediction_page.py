"""The page on predictions: its trainings parse, and the smallest one learns as much as the page says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from tests.data.write_scenes import write

from widekernel.cli.main import main
from widekernel.cli.train import parse_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "prediction.md"
SMALLEST, LEAST_MIOU = "upernet_slak_nano", 80.0


def trainings() -> dict[str, list[str]]:
    """Return the arguments of each `widekernel train` on the page, by the name of its run."""
    text = re.sub(r"\\\n\s*", "", PAGE.read_text())
    lines = [shlex.split(line) for line in text.splitlines() if line.strip().startswith("widekernel train")]
    return {line[line.index("--output") + 1]: line[2:] for line in lines}


@pytest.mark.parametrize("name", trainings())
def test_the_trainings_parse(name: str) -> None:
    config = parse_config(trainings()[name])
    assert config.seed == 0 and config.model.name in name and config.model.weights is None


def test_there_are_four() -> None:
    assert len(trainings()) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_smallest_training(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "scenes")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *trainings()[SMALLEST]]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["eval", SMALLEST, "--data.workers", "0", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["miou"] >= LEAST_MIOU and found["images"] == 64
    assert min(line["iou"] for line in found["classes"]) > 60
