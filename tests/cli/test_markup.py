"""Text from the user is never interpreted as console markup."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import widekernel.cli
from widekernel.cli import console
from widekernel.cli.main import main
from widekernel.data import Preprocessing
from widekernel.engine.metrics import Metric
from widekernel.engine.reporter import RunLength
from widekernel.tasks.assembly import build_model
from widekernel.tasks.saved import SavedModel, save_model

TEXTS = ("run[exp]", "x [/c]", "[red]y", "a[b", "\\[z]", ":smile: [link=x]")
FILES = sorted(Path(widekernel.cli.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [console.result_console, console.progress_console, console.table_console])
def test_text_is_not_read_as_markup(make, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("column", title=text, caption=text)
    table.add_row(text)
    page = make()
    page.width = 200
    page.print(text)
    page.print(table)
    seen = capsys.readouterr()
    assert (seen.out + seen.err).count(text) == 4


@pytest.mark.parametrize("text", TEXTS)
def test_progress_bars_do_not_read_markup(text: str) -> None:
    page = Console(width=200, file=io.StringIO(), markup=False, emoji=False, force_terminal=True)
    reporter = console.ConsoleReporter(page)
    reporter.start_training(RunLength(10, 5), 0)
    reporter.step(1, {f"train_loss_{text}": 1.0})
    reporter.start_evaluation(3, text)
    reporter.message(text)
    reporter.evaluation(5, (Metric("name", text, text),), {"name": 0.5})
    plain = Console(width=200, file=io.StringIO(), markup=False, emoji=False)
    for part in reporter._progress.get_renderables():
        plain.print(part)
    reporter._progress.stop()
    assert page.file.getvalue().count(text) >= 3
    assert plain.file.getvalue().count(text) == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_consoles_are_created_in_one_place(file: Path) -> None:
    """A console, text column or text created elsewhere might read a user's text as markup."""
    tree = ast.parse(file.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "") for node in calls}
    assert "from_markup" not in names and "render" not in names
    options = [keyword for call in calls for keyword in call.keywords if keyword.arg == "markup"]
    assert not any(getattr(option.value, "value", True) for option in options)
    if file.name != "console.py":
        assert not names & {"Console", "TextColumn", "Progress"}
        assert "rich.print" not in file.read_text()


@pytest.mark.parametrize("folder", ["run[exp]", "x [/c]"])
def test_complexity_of_a_file_in_a_folder_named_like_markup(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    path = tmp_path / folder / "m.safetensors"
    preprocessing = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    saved = SavedModel("test_resnet", {"in_chans": 1}, "training", 3, (), preprocessing)
    save_model(build_model("test_resnet", 3, {"in_chans": 1}), path, saved)
    assert main(["complexity", str(path)]) == 0
    assert f"{path} at (1, 32, 32)" in capsys.readouterr().out
