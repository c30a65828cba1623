"""Paths with parts that a shell would expand, and with parts that it would not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_help import parsers
from tests.data.trees import pack, plant

from widekernel.cli.main import main
from widekernel.cli.paths import PATHS
from widekernel.cli.train import parse_config
from widekernel.data import DataConfig, open_split
from widekernel.data.paths import expand_path
from widekernel.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH_X", "/scratch/x y")
    monkeypatch.delenv("SCRTCH_X", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_expansion_of_home_and_variables(home: Path) -> None:
    assert expand_path("k", "~") == str(home)
    assert expand_path("k", "~/runs/a") == f"{home}/runs/a"
    assert expand_path("k", "$SCRATCH_X/[a] b") == "/scratch/x y/[a] b"
    assert expand_path("k", "a/${SCRATCH_X}b") == "a//scratch/x yb"
    for text in ("a~", "./~/b", "~nobody-of-that-name/x", "cost$", "$1", "%s", "{y}", "a[b"):
        assert expand_path("k", text) == text


def test_an_existing_name_is_not_expanded(home: Path) -> None:
    (home / "$SCRATCH_X").mkdir()
    (home / "~").mkdir()
    assert expand_path("k", "$SCRATCH_X") == "$SCRATCH_X"
    assert expand_path("k", "~") == "~"


def test_an_unset_variable_is_named(home: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"output is '\$SCRTCH_X/a', but the variable SCRTCH_X is not set\. Set and"
    ) as error:
        expand_path("output", "$SCRTCH_X/a")
    assert "SCRATCH_X" not in str(error.value)  # other variables are not revealed
    for config, key in (
        (DataConfig(root="$SCRTCH_X"), "data.root"),
        (DataConfig(root="$SCRTCH_X", name="torch/cifar10"), "data.root"),
        (DataConfig(root=".", train_split="${SCRTCH_X}/train"), "data.train_split"),
    ):
        with pytest.raises(ConfigError, match=f"{key} is .* the variable SCRTCH_X is not set"):
            open_split(config, "train")


@pytest.mark.parametrize("name", ["$SCRTCH_X", "~", "$SCRATCH_X"])
@pytest.mark.parametrize("ending", ["", ".tar"])
def test_an_existing_split_is_not_expanded(name: str, ending: str, home: Path) -> None:
    plant(home / "tree", ["cat/1.png", "dog/1.png"])
    (home / "root").mkdir()
    place = home / "root" / f"{name}{ending}"
    if ending:
        pack(home / "tree", place)
    else:
        (home / "tree").rename(place)
    assert open_split(DataConfig(root="~/root", train_split=name), "train").class_names == ("cat", "dog")


def test_a_split_with_a_variable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(home / "tree", ["cat/1.png", "dog/1.png"])
    monkeypatch.setenv("PART_X", "tree")
    for config in (DataConfig(root="~", train_split="$PART_X"), DataConfig(train_split="~/${PART_X}")):
        assert len(open_split(config, "train")) == 2


def test_files_and_options_are_expanded_alike(home: Path) -> None:
    (home / "c.yaml").write_text("data:\n  root: ~/images\nmodel:\n  weights: ${SCRATCH_X}/w.pth\noutput: $HOME/run\n")
    config = parse_config(["--config=~/c.yaml"])
    assert (config.data.root, config.model.weights) == (f"{home}/images", "/scratch/x y/w.pth")
    assert config.output == f"{home}/run"
    config = parse_config(["--output=~/[a]", "--data.root", "$HOME/d", "--model.args.pattern", "~/x"])
    assert (config.output, config.data.root) == (f"{home}/[a]", f"{home}/d")
    assert config.model.args == {"pattern": "~/x"}


def test_every_option_that_is_a_path_is_expanded() -> None:
    """Every option whose help text speaks of a file or folder is expanded."""
    words = ("file to", "file for", "file of", "file with", " file:", "folder,", "folder;", "run folder", "folder that")
    for command, parser in parsers():
        for action in parser._actions:
            text = f" {action.help}"
            is_split = action.dest.endswith("_split") or action.dest == "state"
            is_text = any(word in text for word in words) and not is_split and action.nargs != 0
            is_config = "Path to a configuration file" in text
            if is_text and not is_config and action.dest not in PATHS:
                pytest.fail(f"{command}: {action.dest} ({action.help})")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="file systems there take UTF-8 only")
def test_file_names_that_are_not_text_are_printed_as_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "widekernel", "eval", os.fsencode(tmp_path) + b"/caf\xe9[/b]"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"/caf\xe9[/b] does not exist" in done.stderr and b"Traceback" not in done.stderr


def test_a_duplicate_key_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "c.yaml").write_text("optimizer:\n  lr: 1e-3\n  eps: 1e-8\n  lr: 2e-3\n")
    assert main(["train", "--config", "c.yaml"]) == 2
    assert "'lr' occurs twice in one section, again in line 4" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", " adam"])
def test_a_section_without_settings_is_refused(value: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "c.yaml").write_text(f"optimizer:{value}\n")
    assert main(["train", "--config", "c.yaml"]) == 2
    assert (
        f"optimizer is {(value.strip() or None)!r}, but must hold settings: betas, bias_weight_decay, clip_grad"
        in capsys.readouterr().err
    )


def test_an_empty_file_sets_nothing(home: Path) -> None:
    (home / "c.yaml").write_text("# nothing yet\n")
    assert parse_config(["--config", "c.yaml"]) == parse_config([])
