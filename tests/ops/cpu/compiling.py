"""Compiling small C++ sources against the native headers; tests that need it are skipped where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[3] / "native"


def compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def compiled(target: Path, *sources: str | Path, options: tuple[str, ...] = ("-shared", "-fPIC")) -> Path:
    """Compile source files, or texts, to `target`."""
    program = compiler()
    if program is None or not NATIVE.is_dir():
        pytest.skip("needs a C++ compiler and the native sources")
    files = []
    for number, source in enumerate(sources):
        if isinstance(source, str):
            file = target.with_name(f"{target.stem}_{number}.cpp")
            file.write_text(source)
            files.append(file)
        else:
            files.append(source)
    includes = [f"-I{NATIVE / folder}" for folder in ("include", "src")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command = [program, *flags, *options, *includes, *files, "-o", target, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target
