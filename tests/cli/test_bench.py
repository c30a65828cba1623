"""`widekernel bench` from the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tests.analysis.benchmark.conftest import hasty, spoil  # noqa: F401 - fixtures

from widekernel import ops
from widekernel.cli.main import main

pytestmark = pytest.mark.usefixtures("hasty")

TINY = ["ops", "--shape", "1,4,8,8", "--kernel", "5x5", "--rounds", "1", "--threads", "1"]


def bench(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["bench", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_operators_to_console_and_files(tmp_path: Path, capsys) -> None:
    files = {kind: tmp_path / name for kind, name in (("csv", "t.csv"), ("markdown", "t.md"), ("plot", "t.png"))}
    options = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    with ops.trace() as ran:
        code, out, _ = bench(capsys, *TINY, *options)
    assert code == 0 and "1x4x8x8 5x5" in out and "FMA peak" in out
    shapes = {problem.shape for _, problem in ran.calls}
    assert (1, 4, 8, 8) in shapes and len(shapes) > 3, "the operator is checked on other shapes"
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row["direction"] for row in rows} == {"forward", "input gradient", "weight gradient"}
    page = files["markdown"].read_text()
    assert "`widekernel bench ops --shape 1,4,8,8 --kernel 5x5 --rounds 1 --threads 1`" in page
    assert "1 threads used" in page and str(tmp_path) not in page
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_passes_and_backend(tmp_path: Path, capsys) -> None:
    path = tmp_path / "t.csv"
    code, out, _ = bench(capsys, *TINY, "--passes", "weight,forward", "--backend", "portable", "--csv", str(path))
    assert code == 0 and "input gradient" not in out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["direction"] for row in rows] == ["forward"] * 2 + ["weight gradient"] * 2
    assert {row["backend"] for row in rows} == {"portable"}


def test_networks(tmp_path: Path, capsys) -> None:
    options = ["--batch", "2", "--size", "32", "--modes", "infer", "--rounds", "1"]
    code, out, _ = bench(
        capsys, "models", "replknet_nano", *options, "--csv", str(tmp_path / "m.csv"), "--markdown", str(tmp_path / "m.md")
    )
    assert code == 0 and "ours, folded" in out and "train" not in out
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and {(row["batch"], row["size"], row["model"]) for row in rows} == {("2", "32", "replknet_nano")}
    assert "`widekernel bench models replknet_nano --batch 2 --size 32" in (tmp_path / "m.md").read_text()


def test_nothing_is_timed_when_the_operator_is_wrong(tmp_path: Path, capsys, spoil) -> None:  # noqa: F811
    spoil(lambda problem: True)
    for arguments in (TINY, ["models", "replknet_nano", "--size", "32"]):
        code, out, err = bench(capsys, *arguments, "--csv", str(tmp_path / "t.csv"))
        assert code == 2 and "Nothing is timed" in err and "wrong computes" in err and not out
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["op"], "cannot time 'op'. Did you mean 'ops'?"),
        (["ops", "--cases", "slack-1"], "no case 'slack-1'. Did you mean 'slak-1'?"),
        (["ops", "--shape", "1,2,3,4"], "needs both, --shape and --kernel"),
        (["ops", "--shape", "1,2,3", "--kernel", "3x3"], "must be four numbers"),
        ([*TINY, "--batch", "3"], "leave --cases and --batch out"),
        ([*TINY, "--passes", "forwards"], "passes has 'forwards'. Did you mean 'forward'?"),
        ([*TINY, "--backend", "portabel"], "backend is 'portabel', which does not exist. Did you mean 'portable'?"),
        ([*TINY, "--algorithm", "fast"], "unknown algorithm 'fast'"),
        ([*TINY[:-1], "0"], "threads is 0, but must be positive"),
        ([*TINY, "--seconds", "0"], "seconds is 0.0, but must be positive"),
        ([*TINY, "--csv", "times.txt"], "csv is 'times.txt', but must be a .csv file"),
        ([*TINY, "--plot", "no/such/folder.png"], "must be in a folder that exists"),
        ([*TINY, "--roundz", "3"], "no option --roundz. Did you mean '--rounds'?"),
        (["models", "slak_tinny"], "'slak_tinny', which is no registered model. Did you mean 'slak_tiny'?"),
        (["models", "slak_nano", "--modes", "fit"], "modes has 'fit'. It takes train, infer"),
        (["models", "slak_nano", "--size", "0"], "size is 0, but must be positive"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments: list[str], message: str, capsys) -> None:
    code, out, err = bench(capsys, *arguments)
    assert code == 2 and message in " ".join(err.split()) and not out


def test_help(capsys) -> None:
    assert bench(capsys, "--help")[0] == 0
    code, out, _ = bench(capsys)
    assert code == 2 and "{ops,models}" in out
