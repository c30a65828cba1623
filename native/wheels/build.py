"""Builds the wheels for every platform, with Zig's compiler and without a container.

    python native/wheels/build.py OUT [PLATFORM …]

The Python that runs this has the packages in requirements.txt; `make wheels` sets it up. Each wheel serves every version of
Python and of PyTorch. Wheels for Linux need nothing newer than glibc 2.28, which auditwheel checks.

The wheel for Windows has no native library. The kernels borrow the threads of PyTorch's OpenMP runtime, which on Windows
lacks the function that they use elsewhere, and on one thread they would often be slower than PyTorch's convolutions.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GLIBC = 28  # 2.28, as for PyTorch
LIBRARY = "widekernel/ops/cpu/_native"
BUILD = """
import sys
from scikit_build_core.build import build_wheel
settings = dict(item.split(":", 1) for item in sys.argv[2:])
print(build_wheel(sys.argv[1], settings))
"""


@dataclass(frozen=True)
class Platform:
    """A platform to build for.

    Attributes:
        tag: its name in the wheel.
        system: its name in CMake; empty for a wheel without the library.
        processor: its processor in CMake.
        target: its name in Zig.
        header: how the library's file starts: the processor at its place in the header of an ELF or Mach-O file.
    """

    tag: str
    system: str = ""
    processor: str = ""
    target: str = ""
    header: tuple[bytes, int, bytes] = (b"", 0, b"")


def _elf(machine: int) -> tuple[bytes, int, bytes]:
    return b"\x7fELF", 18, struct.pack("<H", machine)


def _mach_o(processor: int) -> tuple[bytes, int, bytes]:
    return struct.pack("<I", 0xFEEDFACF), 4, struct.pack("<I", 0x01000000 | processor)


PLATFORMS = {
    platform.tag: platform
    for platform in (
        Platform(f"manylinux_2_{GLIBC}_x86_64", "Linux", "x86_64", f"x86_64-linux-gnu.2.{GLIBC}", _elf(62)),
        Platform(f"manylinux_2_{GLIBC}_aarch64", "Linux", "aarch64", f"aarch64-linux-gnu.2.{GLIBC}", _elf(183)),
        Platform("macosx_11_0_arm64", "Darwin", "arm64", "aarch64-macos.11.0", _mach_o(12)),
        Platform("macosx_11_0_x86_64", "Darwin", "x86_64", "x86_64-macos.11.0", _mach_o(7)),
        Platform("win_amd64"),
    )
}


def build(platform: Platform, out: Path) -> Path:
    """Build the wheel for a platform, check it, and return its file in `out`."""
    environment = dict(os.environ, WIDEKERNEL_REQUIRE_NATIVE="1", PATH=_path())
    settings = [f"wheel.tags:py3-none-{platform.tag}", "wheel.build-tag:", "install.strip:false"]
    if platform.system:
        environment |= {
            "ZIG_PYTHON": sys.executable,
            "ZIG_SYSTEM": platform.system,
            "ZIG_PROCESSOR": platform.processor,
            "ZIG_TARGET": platform.target,
        }
        toolchain = Path(__file__).with_name("zig.cmake")
        settings.append(f"cmake.args:-G;Ninja;-DCMAKE_TOOLCHAIN_FILE={toolchain}")
    else:
        settings += ["wheel.cmake:false", "wheel.platlib:true"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", BUILD, folder, *settings]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
        (file,) = Path(folder).glob("*.whl")
        check(file, platform)
        out.mkdir(parents=True, exist_ok=True)
        return shutil.move(file, out / file.name)


def check(file: Path, platform: Platform) -> None:
    """Raise unless the wheel contains exactly one library, for the platform, or none if it should not."""
    start, place, processor = platform.header
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.startswith(LIBRARY)]
        if len(names) != bool(platform.system):
            raise SystemExit(f"{file.name} contains {names or 'no library'}")
        for name in names:
            data = archive.read(name)
            if not data.startswith(start) or data[place : place + len(processor)] != processor:
                raise SystemExit(f"{name} in {file.name} is not for {platform.target}")
    if platform.system == "Linux":
        command = [sys.executable, "-m", "auditwheel", "show", str(file)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        needed = re.search(r'is\s+consistent\s+with\s+the\s+following\s+platform\s+tag:\s+"manylinux_2_(\d+)_(\w+)"', shown)
        if needed is None or int(needed[1]) > GLIBC or needed[2] != platform.processor:
            raise SystemExit(f"{file.name} does not deserve its name:\n{shown}")


def _path() -> str:
    """Return the search path with the tools of this Python first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def main(arguments: list[str]) -> None:
    """Build the named platforms, or all."""
    if not arguments or (unknown := [name for name in arguments[1:] if name not in PLATFORMS]):
        usage = f"usage: build.py OUT [PLATFORM …], with platforms {', '.join(PLATFORMS)}"
        raise SystemExit(f"{usage}; not {unknown}" if arguments else usage)
    out = Path(arguments[0]).resolve()
    for name in arguments[1:] or PLATFORMS:
        for old in out.glob(f"widekernel-*-py3-none-{name}.whl"):
            old.unlink()
        file = build(PLATFORMS[name], out)
        with zipfile.ZipFile(file) as archive:
            libraries = {info.filename: info.file_size for info in archive.infolist() if info.filename.startswith(LIBRARY)}
            print(file, f"{len(archive.namelist())} files", libraries or "no library", sep="  ")


if __name__ == "__main__":
    main(sys.argv[1:])
