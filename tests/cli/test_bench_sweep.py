"""`widekernel bench sweep` from the command line."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.bench.conftest import hasty, spoil  # noqa: F401 - fixtures

from widekernel import ops
from widekernel.bench import Case, cases
from widekernel.bench.sweep import Record, measuring
from widekernel.cli.main import main

pytestmark = pytest.mark.usefixtures("hasty")

TINY = Case("tiny", 1, 3, 8, 8, (5, 5))


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep over a single case."""
    monkeypatch.setattr(cases, "swept_cases", lambda even: ([TINY], ["7 cases are left out"]))


def sweep(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["bench", "sweep", "--seconds", "0.0001", "--threads", "1", *arguments])
    said = capsys.readouterr()
    return code, said.out, " ".join(said.err.split())


def test_a_sweep_is_begun_continued_and_reported(tmp_path: Path, capsys, grid: None) -> None:
    path, page, picture = tmp_path / "s.csv", tmp_path / "s.md", tmp_path / "s.png"
    files = ["--csv", str(path), "--markdown", str(page), "--plot", str(picture)]
    with ops.trace() as ran:
        code, out, _ = sweep(capsys, *files)
    assert code == 0 and "6 of the 6 cells of the grid were measured (100.0 %)." in out and "7 cases are left out" in out
    assert TINY.shape in {problem.shape for _, problem in ran.calls}
    before = path.read_bytes()
    text = page.read_text()
    assert (
        "`widekernel bench sweep --threads 1 --dtype float32 --seed 0 --seconds 0.0001 --longest 0.3`" in text
        and str(tmp_path) not in text
    )
    assert "1 threads used" in text and "library digest" in text and "| 1x3x8x8 5x5 | weight gradient |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = before.decode().splitlines()
    assert len(list(csv.DictReader(lines[1:]))) == 6
    with ops.trace() as again:
        for more in ([], ["--minutes", "0"]):
            code, once_more, err = sweep(capsys, "--csv", str(path), *more)
            assert (code, once_more) == (0, out), err
    assert not again.calls and path.read_bytes() == before
    code, out, err = sweep(capsys, "--csv", str(path), "--longest", "2")
    assert code == 2 and "begun under other conditions: longest was 0.3, now 2.0" in err and not out


def test_after_an_interruption_the_rest_is_reported(tmp_path: Path, capsys, grid: None, monkeypatch) -> None:
    real, calls = measuring.measure_operators, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measuring, "measure_operators", interrupted)
    code, out, err = sweep(capsys, "--csv", str(tmp_path / "s.csv"))
    assert code == 130 and "2 of the 6 cells" in out and "Interrupted." in err and "holds 2 cells" in err
    assert len(Record.read(tmp_path / "s.csv").rows) == 2


def test_nothing_is_reported_if_the_operator_is_wrong(tmp_path: Path, capsys, grid: None, spoil) -> None:  # noqa: F811
    spoil(lambda problem: True)
    code, out, err = sweep(capsys, "--csv", str(tmp_path / "s.csv"), "--markdown", str(tmp_path / "s.md"))
    assert code == 2 and "Nothing is timed" in err and not out and not (tmp_path / "s.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "csv is None, but must be a .csv file"),
        (["--csv", "times.json"], "csv is 'times.json', but must be a .csv file"),
        (["--csv", "s.csv", "--minutes", "-1"], "minutes is -1.0, but must be positive, or 0 to report"),
        (["--csv", "s.csv", "--longest", "0"], "longest is 0.0, but must be positive"),
        (["--csv", "s.csv", "--dtype", "float61"], "dtype 'float61' is unknown"),
        (["--csv", "no-such-file.csv", "--minutes", "0"], "the sweep no-such-file.csv cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments: list[str], message: str, capsys) -> None:
    code, out, err = sweep(capsys, *arguments)
    assert code == 2 and message in err and not out


@pytest.mark.slow
def test_a_killed_sweep_is_continued(tmp_path: Path) -> None:
    """The real grid, with limits that let PyTorch take little time."""
    path = tmp_path / "s.csv"
    command = [sys.executable, "-m", "widekernel", "bench", "sweep", "--csv", str(path), "--longest", "0.02"]
    process = subprocess.Popen([*command, "--minutes", "5", "--seconds", "0.001"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = Record.read(path).rows
    assert len(kept) >= 4
    done = subprocess.run([*command, "--minutes", "0.02", "--seconds", "0.001"], capture_output=True, text=True, check=True)
    rows = Record.read(path).rows
    assert rows[: len(kept)] == kept and f"{len(rows)} of the " in done.stdout
