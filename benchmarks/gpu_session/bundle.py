"""Download the wheels that a Python on a machine without a network may lack: the program behind `make offline-bundle`.

    python -m benchmarks.gpu_session.bundle FOLDER [--python 3.12] [--platform x86_64] [--given torch==2.11.0 …]

Packages named by --given are left out, with all their dependencies. pip resolves the others for that Python and those
versions, and downloads them. Needs a network, pip 23.3 or newer and `packaging`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.wheels import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

GIVEN = ("torch==2.11.0", "torchvision==0.26.0", "triton==3.6.0", "numpy==2.5.*")
# For `make test-gpu OFFLINE=1`; the other packages of the development group check source code.
ALSO = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
LARGEST = 60 * 2**20
"""Largest size of the folder, in bytes."""
# pip compares these literally: every version of the C library that manylinux wheels are built for, down to the oldest.
_GLIBC = (*range(40, 16, -1), 12, 5)


def platforms(machine: str) -> list[str]:
    """Return the platforms whose wheels run on Linux on this type of machine, the newest first."""
    older = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    names = [
        [f"manylinux_2_{minor}_{machine}", *([f"{older[minor]}_{machine}"] if minor in older else [])] for minor in _GLIBC
    ]
    return [name for both in names for name in both]


def ours(also: Sequence[str] = ALSO) -> list[str]:
    """Return the dependencies of our package, and those of its development group that `also` names."""
    text = (ROOT / "pyproject.toml").read_text()
    core = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    dev = re.search(r"^dev = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert core, "pyproject.toml has no dependencies"
    assert dev, "pyproject.toml has no development group"
    needed = re.findall(r'"([^"]+)"', core.group(1))
    return needed + [line for line in re.findall(r'"([^"]+)"', dev.group(1)) if Requirement(line).name in also]


def wanted(report: Mapping[str, Any], roots: Sequence[str], given: Sequence[str]) -> list[str]:
    """Return NAME==VERSION for all that the roots need, without the given packages and their dependencies.

    Args:
        report: pip's report of an installation for the other Python.
        roots: requirements.
        given: requirements that are already installed there.
    """
    found = {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in report["install"]}
    environment = {key: str(value) for key, value in report["environment"].items()}
    there = set(_reached(found, environment, given, frozenset()))
    chosen = _reached(found, environment, roots, frozenset(there))
    return sorted(f"{name}=={found[name]['version']}" for name in chosen)


def _reached(
    found: Mapping[str, Any], environment: Mapping[str, str], lines: Sequence[str], there: frozenset[str]
) -> set[str]:
    """Return the names of all packages that requirements pull in, without following those in `there`."""

    def needs(lines: Sequence[str], extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
        for requirement in map(Requirement, lines):
            applies = requirement.marker is None or any(
                requirement.marker.evaluate({**environment, "extra": extra}) for extra in extras | {""}
            )
            name = canonicalize_name(requirement.name)
            if applies and name in found and name not in there:
                yield name, frozenset(requirement.extras)

    reached: set[tuple[str, frozenset[str]]] = set()
    waiting = list(needs(lines, frozenset()))
    while waiting:
        each = waiting.pop()
        if each not in reached:
            reached.add(each)
            waiting += needs(found[each[0]].get("requires_dist", []), each[1])
    return {name for name, _ in reached}


def pip(*arguments: str) -> None:
    """Run pip.

    Raises:
        CalledProcessError: if it fails.
    """
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def fill(folder: Path, python: str, machine: str, given: Sequence[str]) -> int:
    """Fill a folder with wheels; return its size in bytes."""
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [part for name in platforms(machine) for part in ("--platform", name)]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        resolve = ["--quiet", "--dry-run", "--ignore-installed", "--report", str(report), "--target", scratch]
        pip("install", *resolve, *target, *ours(), *given)
        chosen = wanted(json.loads(report.read_text()), ours(), given)
    pip("download", "--quiet", "--no-deps", "--dest", str(folder), *target, *chosen)
    return sum(path.stat().st_size for path in folder.glob("*.whl"))


def main(arguments: Sequence[str]) -> int:
    """Fill the folder and print a summary of its contents."""
    parser = argparse.ArgumentParser(prog="bundle", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the Python on the other machine; default 3.12")
    parser.add_argument("--platform", default="x86_64", help="its processor: x86_64 (the default) or aarch64")
    parser.add_argument("--given", nargs="*", default=list(GIVEN), help=f"packages that it has; default {' '.join(GIVEN)}")
    options = parser.parse_args(arguments)
    size = fill(options.folder, options.python, options.platform, options.given)
    print(f"{options.folder}: {len(list(options.folder.glob('*.whl')))} wheels, {size / 2**20:.1f} MB")
    if size > LARGEST:
        print(f"error: that is more than {LARGEST / 2**20:.0f} MB: name more packages with --given", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
