"""What the kinds of `widekernel bench` have in common: files to write, and tables on the console."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from widekernel.settings import require

if TYPE_CHECKING:
    from widekernel.bench.tables import Column

_FILES = {"csv": ".csv", "markdown": ".md", "plot": ".png"}
_TEXT_COLUMNS = {"case", "N×C×H×W, kernel", "pass", "layout", "backend", "algorithm", "model", "mode", "variant"}
_TEXT_COLUMNS |= {"N×C×H×W, kernels", "dtype", "floor is", "remark", "class", "runs on", "piece", "largest parts, ms"}


def files_of(values: dict[str, Any]) -> dict[str, Path]:
    """Return the files that options ask for, by option.

    Raises:
        ConfigError: if a name has the wrong ending, or its folder does not exist.
    """
    files = {}
    for option, suffix in _FILES.items():
        if values.get(option) is not None:
            path = Path(values[option])
            require(path.suffix == suffix, option, values[option], f"a {suffix} file")
            require(path.parent.is_dir(), option, values[option], "in a folder that exists")
            files[option] = path
    return files


def rich_table(title: str, columns: Sequence[Column], rows: Sequence[Any], facts: Sequence[str]) -> Table:
    """Return a table for the console, with the facts about the machine below it."""
    table = Table(title=title, caption="\n".join(facts), caption_justify="left")
    for header, _ in columns:
        table.add_column(header, justify="left" if header in _TEXT_COLUMNS else "right")
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    return table


def command_line(kind: str, arguments: Sequence[str]) -> str:
    """Return the command without the files that it writes, which are irrelevant to other readers."""
    kept, skip = [], False
    for argument in arguments:
        option = argument[2:].split("=", 1)[0] if argument.startswith("--") else ""
        if not skip and option not in _FILES:
            kept.append(argument)
        skip = option in _FILES and "=" not in argument
    return " ".join(["widekernel bench", kind, *kept])
