"""The file of a sweep: a CSV file that grows by one unit at a time and says under which conditions it was measured.

Its first line is a comment with the conditions in JSON, its second one has the names of the columns.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import widekernel.ops
from widekernel.bench.machine import Machine
from widekernel.bench.rows import SweepRow
from widekernel.bench.tables import csv_columns, csv_lines
from widekernel.errors import ArgumentError
from widekernel.files import explained, sha256_of, write_file
from widekernel.ops.cpu import library
from widekernel.ops.problem import LAYOUTS

_COMMENT = "# "
_FORMAT = 1
_SHOWN = 16  # digits of a digest
_COMPARED = ("Python", "PyTorch", "widekernel")
_TYPES = get_type_hints(SweepRow)


def conditions_of(machine: Machine, **settings: Any) -> dict[str, Any]:
    """Return what all rows of a file must have in common: the machine, the software and the settings."""
    loaded = library.load()
    return {
        "CPU": machine.cpu,
        "cores": machine.cores,
        "threads": machine.threads,
        "PyTorch uses": machine.capability,
        "native library": machine.native,
        **{name: version for name, version in machine.versions.items() if name in _COMPARED},
        "library digest": "none" if loaded.path is None else sha256_of(loaded.path)[:_SHOWN],
        "operator digest": _digest_of(Path(widekernel.ops.__file__).parent),
        "OMP_WAIT_POLICY": machine.waiting,
        "freed memory": machine.freed,
        **settings,
    }


class Record:
    """The rows of a sweep, in memory and in a file.

    Attributes:
        path: the file.
        conditions: under which conditions its rows were measured.
        facts: lines that describe the machine.
        rows: the rows, both of every unit.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any], facts: Sequence[str], rows: Sequence[SweepRow]) -> None:
        self.path, self.conditions, self.facts, self.rows = path, dict(conditions), list(facts), list(rows)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a file. A unit that was cut off while it was written is ignored.

        Raises:
            ArgumentError: if it is not the file of a sweep.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"the sweep {path} cannot be read: {error}") from error
        lines = text[: text.rfind("\n") + 1].splitlines()
        head = _head_of(lines[0]) if len(lines) > 1 else None
        if head is None or next(csv.reader(lines[1:2])) != list(csv_columns(SweepRow)):
            raise ArgumentError(f"{path} is not a file of this version's `widekernel bench sweep`: give another --csv")
        rows = []
        for number, cells in enumerate(csv.DictReader(lines[1:]), 3):
            try:
                rows.append(_row_of(cells))
            except (KeyError, TypeError, ValueError) as error:
                raise ArgumentError(
                    f"line {number} of {path} is damaged ({error}): delete it, or give another --csv"
                ) from error
        return cls(path, head["conditions"], head["facts"], _whole_units(rows))

    @classmethod
    def begin_or_continue(cls, path: Path, conditions: Mapping[str, Any], facts: Sequence[str]) -> Record:
        """Begin a file, or continue one that was begun under the same conditions.

        Raises:
            ArgumentError: if the file is something else, or was begun under other conditions.
            WidekernelError: if it cannot be written.
        """
        record = cls.read(path) if path.exists() else cls(path, conditions, facts, [])
        found = record.conditions
        differing = [
            f"{name} was {found.get(name, 'not stated')}, now {conditions.get(name, 'not stated')}"
            for name in dict.fromkeys([*conditions, *found])
            if found.get(name) != conditions.get(name)
        ]
        if differing:
            raise ArgumentError(
                f"{path} was begun under other conditions: {'; '.join(differing)}. Times from both would not be comparable: "
                "restore these conditions, or give another --csv"
            )
        # Also removes what was cut off.
        write_file(path, record._text().encode())
        return record

    def append(self, rows: Sequence[SweepRow]) -> None:
        """Add the rows of one unit, and force them to disk.

        Raises:
            WidekernelError: if the file cannot be written.
        """
        with explained(self.path), self.path.open("ab", buffering=0) as file:
            file.write("".join(csv_lines(row, header=False) for row in rows).encode())
            os.fsync(file.fileno())
        self.rows += rows

    def _text(self) -> str:
        head = json.dumps({"format": _FORMAT, "conditions": self.conditions, "facts": self.facts}, ensure_ascii=False)
        names = ",".join(csv_columns(SweepRow))
        return f"{_COMMENT}{head}\n{names}\n" + "".join(csv_lines(row, header=False) for row in self.rows)


def _head_of(line: str) -> dict[str, Any] | None:
    try:
        head = json.loads(line.removeprefix(_COMMENT)) if line.startswith(_COMMENT) else None
    except ValueError:
        return None
    return head if isinstance(head, dict) and head.get("format") == _FORMAT else None


def _row_of(cells: Mapping[str, str]) -> SweepRow:
    return SweepRow(**{name: _value(_TYPES[name], cells[column]) for column, name in csv_columns(SweepRow).items()})


def _value(kind: Any, text: str) -> Any:
    """Convert a cell: an empty one is None if the field may be None, and NaN if it is a number."""
    if kind in (int, str):
        return kind(text)
    if text == "":
        return math.nan if kind is float else None
    return float(text)


def _whole_units(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Return the rows without those of units of which a row is missing."""
    units: dict[tuple[str, str], dict[str, SweepRow]] = {}
    for row in rows:
        units.setdefault((row.shape, row.direction), {}).setdefault(row.layout, row)
    return [row for unit in units.values() if len(unit) == len(LAYOUTS) for row in unit.values()]


def _digest_of(folder: Path) -> str:
    """Return a digest of the Python code in a folder, which chooses backends and algorithms."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()[:_SHOWN]
