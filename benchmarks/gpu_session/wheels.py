"""Unpack the packages that a Python lacks from a folder of wheels; wheels are archives, so no pip or network is needed.

python3 -m benchmarks.gpu_session.wheels WHEELS FOLDER        # then PYTHONPATH=FOLDER
"""

from __future__ import annotations

import re
import sys
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Wheel:
    """A wheel file and the fields of its name."""

    path: Path
    name: str
    version: str
    python: str
    abi: str

    @classmethod
    def of(cls, path: Path) -> Wheel:
        """Parse the name of a file.

        Raises:
            ValueError: if it is not the name of a wheel.
        """
        parts = path.stem.split("-")
        if path.suffix != ".whl" or len(parts) not in (5, 6):
            raise ValueError(f"{path} is not named like a wheel: NAME-VERSION-PYTHON-ABI-PLATFORM.whl")
        return cls(path, normalized(parts[0]), parts[1], parts[-3], parts[-2])

    def fits(self, version: tuple[int, int]) -> bool:
        """Return whether the wheel is for that version of Python; the folder is for a single platform."""
        tags = self.python.split(".")
        if "py3" in tags or f"cp{version[0]}{version[1]}" in tags:
            return True
        oldest = [int(tag[3:]) for tag in tags if re.fullmatch(r"cp3\d+", tag)]
        return "abi3" in self.abi.split(".") and bool(oldest) and version[0] == 3 and min(oldest) <= version[1]


def normalized(name: str) -> str:
    """Return the name of a package in the form in which names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    """Return the release part of a version, for comparison."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def minima(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, str]:
    """Return the oldest accepted version of every package for which our package states one."""
    return {
        normalized(name): least for name, least in re.findall(r'"([\w.-]+)(?:\[[^\]]*\])?>=([\d.]+)', pyproject.read_text())
    }


def is_needed(wheel: Wheel, least: dict[str, str]) -> bool:
    """Return whether this Python lacks the package, or has an older one than ours needs."""
    try:
        present = metadata.version(wheel.name)
    except metadata.PackageNotFoundError:
        return True
    return numbers(present) < numbers(least.get(wheel.name, "0"))


def unpack(folder: Path, target: Path) -> tuple[list[str], list[str]]:
    """Unpack the packages that this Python lacks.

    Returns:
        the unpacked packages, and the needed wheels that are for another Python, as NAME VERSION.

    Raises:
        ValueError: if there is no such folder, or a file in it is not a wheel.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder of wheels: fill it with `make offline-bundle` on a machine with a network"
        )
    least, unpacked, foreign = minima(), [], []
    for path in sorted(folder.glob("*.whl")):
        wheel = Wheel.of(path)
        if not is_needed(wheel, least):
            continue
        name = f"{wheel.name} {wheel.version}"
        if not wheel.fits(sys.version_info[:2]):
            foreign.append(f"{name} (for {wheel.python})")
            continue
        with zipfile.ZipFile(path) as archive:
            archive.extractall(target)
        unpacked.append(name)
    return unpacked, foreign


def main(arguments: list[str]) -> int:
    """Unpack the packages and print their names."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        unpacked, foreign = unpack(Path(arguments[0]), Path(arguments[1]))
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"unpacked: {', '.join(unpacked) or 'nothing, this Python has all packages'}")
    if foreign:
        print(f"for another Python than {sys.version.split()[0]}: {', '.join(foreign)}", file=sys.stderr)
    return 2 if foreign else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
