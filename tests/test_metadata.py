"""What the project says of itself: version and dependencies."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import yaml

import widekernel

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "typing_extensions": "typing-extensions"}
# Imported where they are there, or by those who have them.
OPTIONAL = {"triton", "sklearn", "onnxruntime", "openvino", "onnx", "datasets", "torch_tensorrt", "accelerate", "lightning"}


def test_one_version() -> None:
    stated = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE).group(1)
    assert widekernel.__version__ == stated
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == stated


def test_every_import_is_declared() -> None:
    listed = re.search(r"^dependencies = \[(.*?)^\]", PROJECT, re.MULTILINE | re.DOTALL).group(1)
    declared = {name.lower() for name in re.findall(r'^\s*"([A-Za-z0-9-]+)', listed, re.MULTILINE)}
    found = set()
    for file in Path(widekernel.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    foreign = found - set(sys.stdlib_module_names) - {"widekernel", "widekernel_command"} - OPTIONAL
    assert {"torch", "numpy", "yaml", "PIL", "typing_extensions"} <= foreign
    assert {DISTRIBUTIONS.get(name, name) for name in foreign} <= declared
