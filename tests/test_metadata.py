"""Metadata of the project: version and dependencies."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

import widekernel

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
# Distributions that are called differently from their package.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "typing_extensions": "typing-extensions",
}
# Installed by PyTorch where it can use it; imported only to launch kernels.
WITH_TORCH = {"triton"}


def test_version_citation_and_changelog_agree() -> None:
    stated = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE).group(1)
    assert widekernel.__version__ == stated
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == stated
    released = re.findall(r"^## (\S+) — (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    versions = [tuple(map(int, version.split("."))) for version, _ in released]
    assert versions[0] == tuple(map(int, stated.split(".")))
    assert versions == sorted(set(versions), reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in released[1:]), (
        "only the newest version may be unreleased"
    )


def declared(section: str) -> set[str]:
    """Return the distributions in a list of requirements of pyproject.toml, in lower case."""
    text = re.search(rf"^{section} = \[(.*?)\]( *#.*)?$", PROJECT, re.MULTILINE | re.DOTALL).group(1)
    return {name.lower() for name in re.findall(r'"([A-Za-z0-9-]+)', text)}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the top-level packages from elsewhere that the nodes import, as names of distributions."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    foreign = found - set(sys.stdlib_module_names) - {"widekernel", "widekernel_command"}
    return {DISTRIBUTIONS.get(name, name) for name in foreign}


def test_every_import_is_declared() -> None:
    """Imports inside functions may be declared in an extra, all others must be in the dependencies."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "src").rglob("*.py")]
    at_once = imported(node for tree in trees for node in tree.body) - WITH_TORCH
    ever = imported(node for tree in trees for node in ast.walk(tree))
    assert {"torch", "numpy", "pyyaml", "pillow", "typing-extensions"} <= at_once <= declared("dependencies")
    names = ("demo", "detection", "tensorboard", "wandb", "slurm", "weights", "report", "export")
    extras = {name for extra in names for name in declared(extra)}
    assert ever - WITH_TORCH <= declared("dependencies") | extras
    assert ever >= WITH_TORCH, "no longer imported"
