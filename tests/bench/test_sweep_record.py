"""The file of a sweep: what it keeps, what it survives, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.sweep_rows import unit_rows
from widekernel.bench import PASSES, Case, Machine
from widekernel.bench.sweep import Record, conditions_of
from widekernel.errors import ArgumentError

CASE = Case("some", 2, 5, 9, 9, (13, 3))
CONDITIONS = {"CPU": "A processor", "threads": 2, "seconds": 0.1}


def written(path: Path, units: int = 3) -> Record:
    record = Record.begin_or_continue(path, CONDITIONS, ["a fact, with a comma"])
    for direction in PASSES[:units]:
        record.append(unit_rows(CASE, direction, openvino_ms=None, remark='"quoted", a line'))
    return record


def test_what_is_written_is_read(tmp_path: Path) -> None:
    record = written(tmp_path / "s.csv")
    read = Record.read(tmp_path / "s.csv")
    assert read.rows == record.rows and len(read.rows) == 6
    assert (read.conditions, read.facts) == (CONDITIONS, ["a fact, with a comma"])


def test_unknown_times_stay_unknown(tmp_path: Path) -> None:
    record = Record.begin_or_continue(tmp_path / "s.csv", CONDITIONS, [])
    record.append(unit_rows(CASE, PASSES[0], nchw=math.nan, onnxruntime_ms=2.5))
    for row in Record.read(tmp_path / "s.csv").rows:
        assert math.isnan(row.torch_nchw_ms) and row.onnxruntime_ms == 2.5 and row.openvino_ms is None


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the content of a file of three units."""
    path = tmp_path_factory.mktemp("sweep") / "s.csv"
    written(path)
    return path.read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_was_cut_off_whole_units_are_kept(content: bytes, data: st.DataObject) -> None:
    lines = content.splitlines(keepends=True)
    head = len(b"".join(lines[:2]))
    length = data.draw(st.integers(head, len(content)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.csv"
        path.write_bytes(content[:length])
        rows = Record.read(path).rows
    whole = sum(len(b"".join(lines[: 4 + 2 * unit])) <= length for unit in range(3))
    assert [row.direction for row in rows] == [direction for direction in PASSES[:whole] for _ in range(2)]


@pytest.mark.parametrize("missing", [1, 60, 180])
def test_a_file_that_was_cut_off_is_continued(tmp_path: Path, content: bytes, missing: int) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes(content)
    rows = Record.read(path).rows
    path.write_bytes(content[:-missing])
    continued = Record.begin_or_continue(path, CONDITIONS, [])
    assert continued.rows == rows[:4]
    continued.append(rows[4:])
    assert path.read_bytes() == content


@pytest.mark.parametrize("change", [{"threads": 1}, {"CPU": "Another"}, {"seconds": 0.2}, {"new": "setting"}])
def test_other_conditions_are_refused(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "s.csv"
    written(path)
    content, (name, value) = path.read_bytes(), next(iter(change.items()))
    message = f"{name} was {CONDITIONS.get(name, 'not stated')}, now {value}.*restore these conditions, or give another"
    with pytest.raises(ArgumentError, match=message):
        Record.begin_or_continue(path, CONDITIONS | change, [])
    assert path.read_bytes() == content


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "# {}\na,b\n", "# not JSON\na\n", '# {"format": 0}\ncase\n'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.csv"
    path.write_text(text)
    with pytest.raises(ArgumentError, match="is not a file of this version's"):
        Record.begin_or_continue(path, CONDITIONS, [])
    assert path.read_text() == text


def test_damaged_lines_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    written(path)
    lines = path.read_text().splitlines()
    lines[4] = lines[4].replace(",2,5,", ",2,five,", 1)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ArgumentError, match=r"line 5 of .* is damaged .*delete it"):
        Record.read(path)
    with pytest.raises(ArgumentError, match="cannot be read"):
        Record.read(tmp_path / "none.csv")


def test_conditions_name_machine_software_and_settings(machine: Machine) -> None:
    found = conditions_of(machine, seed=3)
    assert found["CPU"] == "A processor" and found["threads"] == 1 and found["PyTorch"] == "2" and found["seed"] == 3
    assert {"library digest", "operator digest", "native library", "OMP_WAIT_POLICY"} <= set(found)
    assert conditions_of(dataclasses.replace(machine, threads=8), seed=3) != found
