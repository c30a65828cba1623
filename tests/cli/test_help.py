"""Help and version: fast, and with a text for every option."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator

import jsonargparse
import pytest

from widekernel import __version__
from widekernel.cli import bench, bench_sweep, tune
from widekernel.cli.main import COMMANDS
from widekernel.ops.gpu import tuning_tables

HEAVY = ("torch", "timm", "torchvision", "matplotlib", "numpy", "PIL")
SHOW = """
import runpy, sys
from {module} import main
calls = {calls!r}
for call in calls:
    sys.argv[1:] = call
    try:
        main()
    except SystemExit:
        pass
print("loaded:", [name for name in {heavy!r} if name in sys.modules])
"""


def parsers() -> Iterator[tuple[str, jsonargparse.ArgumentParser]]:
    for command in COMMANDS:
        if command == "bench":
            yield "bench ops", bench._ops_parser()
            yield "bench branches", bench._branches_parser()
            yield "bench models", bench._models_parser()
            yield "bench sweep", bench_sweep.make_parser()
        else:
            yield command, importlib.import_module(f"widekernel.cli.{command.replace('-', '_')}").make_parser()


@pytest.mark.parametrize(("name", "parser"), list(parsers()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_option_has_help(name: str, parser: jsonargparse.ArgumentParser) -> None:
    """Explanations of settings come from docstrings, which jsonargparse reads with docstring-parser."""
    actions = [action for action in parser._actions if action.help != "==SUPPRESS=="]
    assert actions
    assert [action.dest for action in actions if not (action.help or "").strip()] == []
    titles = [group.title for group in parser._action_groups]
    assert [title for title in titles if "KernelConfig" in title or "class" in title] == []
    assert f"usage: widekernel {name}" in parser.format_help()


def test_help_and_version_import_nothing_heavy() -> None:
    calls = [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS), ["bench", "ops", "--help"]]
    code = SHOW.format(module="widekernel_command", calls=calls, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"widekernel {__version__}\n")
    assert "share of the target that is spread evenly over all classes" in " ".join(done.stdout.split())
    assert done.stdout.endswith("loaded: []\n")


def test_the_package_runs_as_a_program() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "widekernel", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"widekernel {__version__}\n"
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "widekernel.cli.main" in imported and not imported & set(HEAVY)


def test_the_help_of_tune_names_the_variable_that_is_read() -> None:
    assert tune.VARIABLE == tuning_tables.VARIABLE
