"""The page of commands: each of our lines parses, and every command and option of the five READMEs is on it."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.command_lines import check_line, parser_of

from widekernel.cli.parsing import known_keys, parse
from widekernel.models.isotropic import IsotropicConfig
from widekernel.models.roadmap import RoadmapConfig
from widekernel.models.shiftwise import ShiftWiseConfig
from widekernel.models.slak import SLaKConfig
from widekernel.models.unireplknet import UniRepLKNetConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "commands.md"
SECTIONS = {
    "SLaK": "Scaling up Kernels Beyond 51",
    "Shift-wise convolution": "# shift-wise conv",
    "RepLKNet": "# RepLKNet-pytorch",
    "ConvNeXt": "# A ConvNet for the 2020s",
}
"""Section of the page for each README, and words that only this README has."""
MASKS = "# Inducing Semi-Structured Sparsity"
PROGRAMS = ("python ", "bash ", "conda ", "pip ", "git ", "cd ", "./", "export ", "torchrun ")
Row = tuple[str, str]


def sections() -> dict[str, list[list[Row]]]:
    """Return the tables of each section of the page, as rows of two cells."""
    found: dict[str, list[list[Row]]] = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        rows = [[tuple(re.split(r"(?<!\\) \| ", line.strip("| \n"))) for line in table.splitlines()[2:]] for table in tables]
        found[title] = rows  # type: ignore[assignment]
    return found


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def our_lines() -> list[str]:
    lines = [line for line in spans(PAGE.read_text()) if line.startswith("widekernel ")]
    return list(dict.fromkeys(lines))


def our_options() -> list[str]:
    """Return the options of `train` that the tables of options name, with their values."""
    cells = [ours for title in ("Options of main.py", "Options of train_sparse.py") for _, ours in sections()[title][0]]
    return list(dict.fromkeys(span for cell in cells for span in spans(cell) if span.startswith("--")))


@pytest.mark.parametrize("line", our_lines())
def test_our_lines_parse(line: str) -> None:
    check_line(line)


def test_our_options_parse() -> None:
    parser = parser_of("train")
    given = [shlex.split(options) for options in our_options()]
    parse(parser, [word for words in given if len(words) > 1 for word in words])
    named = {words[0].removeprefix("--") for words in given}
    free = {name for name in named if name.startswith("model.args.")}
    assert named - free <= known_keys(parser)
    _check_arguments(free)


def _check_arguments(names: set[str]) -> None:
    """Raise unless some network takes each of the arguments of models that the page names."""
    configs = SLaKConfig, RoadmapConfig, ShiftWiseConfig, IsotropicConfig, UniRepLKNetConfig
    known = {field.name for config in configs for field in dataclasses.fields(config)} | {"drop_path_rate", "ls_init_value"}
    assert {name.removeprefix("model.args.") for name in names} <= known


def test_every_row_has_a_counterpart_or_a_reason() -> None:
    for title, tables in sections().items():
        for row in (row for table in tables for row in table):
            assert len(row) == 2 and all(cell.strip() for cell in row), (title, row)
            reason = len(re.sub(r"`[^`]+`", "", row[1]).split()) >= 4
            assert reason or any(span.startswith(("widekernel ", "--", "pip ", "python3 ")) for span in spans(row[1])), row


# -- against the READMEs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readmes(shared: Path) -> list[str]:
    texts = [file.read_text() for file in sorted((shared / "seeds").glob("*.txt"))]
    assert len(texts) == 5
    return [re.sub(r"\\\s*\n", " ", text) for text in texts]


def readme_with(words: str, readmes: list[str]) -> str:
    return next(text for text in readmes if words in text)


def commands_in(readme: str) -> Iterator[str]:
    """Yield the command lines of a README, with single spaces: its lines and spans of code that begin with a program."""
    inside = re.sub(r"```+", "\n", readme)
    for line in inside.splitlines():
        command = " ".join(line.split())
        if command.startswith(PROGRAMS) or command == "./setup.py install --user":
            yield command


def end_of_match(span: str, command: str) -> int:
    """Return where in a command the last part of a span ends, -1 unless all parts occur in their order."""
    end = 0
    for part in filter(None, (part.strip() for part in span.split("…"))):
        at = command.find(part, end)
        if at < 0:
            return -1
        end = at + len(part)
    return end


def row_for(command: str, rows: list[Row]) -> Row | None:
    """Return the row that describes a command to its furthest option; `None` if none does."""
    ends = [(end_of_match(span, command), len(span), row) for row in rows for span in spans(row[0])]
    end, _, row = max(ends, key=lambda found: found[:2])
    return row if end > 0 else None


def test_every_command_of_the_readmes(readmes: list[str]) -> None:
    page, counted, reasons = sections(), 0, 0
    setup = page["Installation"][0]
    for title, words in SECTIONS.items():
        readme, rows, used = readme_with(words, readmes), page[title][0], []
        for command in dict.fromkeys(commands_in(readme)):
            row = row_for(command, rows) or row_for(command, setup)
            assert row is not None, f"{title}: {command}"
            counted += 1
            if row in rows:
                assert row not in used, f"{title}: {row[0]} stands for two commands, one of them {command}"
                used.append(row)
                reasons += not any(span.startswith("widekernel ") for span in spans(row[1]))
        for row in rows:  # what a README says outside a command is on the page, too
            assert row in used or all(span in " ".join(readme.split()) for span in spans(row[0])), row
    assert not [command for command in commands_in(readme_with(MASKS, readmes)) if "train_sparse" in command]
    print(f"{counted} commands, of which {reasons} have a reason instead of a counterpart; none is missing")


def test_every_option_of_the_readmes(readmes: list[str]) -> None:
    page = sections()
    known = {span for left, _ in page["Options of main.py"][0] for span in spans(left)}
    found = set()
    for words in SECTIONS.values():
        for command in commands_in(readme_with(words, readmes)):
            if command.startswith("python ") and ".py" in command:
                found |= set(re.findall(r"(?<![\w-])(--\w+|-u)(?![\w-])", command))
        prose = re.findall(r"`+ ?(--\w+)", readme_with(words, readmes))
        found |= set(prose)
    found -= {"--user"}
    assert found <= known, f"not on the page: {sorted(found - known)}"

    help_text = readme_with(MASKS, readmes).partition("\noptions:\n")[2].partition("```")[0]
    entries = re.findall(r"^  (-.*?)(?:  |$)", help_text, re.MULTILINE)
    official = {name for entry in entries for name in re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", entry)}
    ours = {span for left, _ in page["Options of train_sparse.py"][0] for span in spans(left)}
    assert ours == official
    print(f"{len(known)} options of main.py, {len(ours)} of train_sparse.py; none is missing")
