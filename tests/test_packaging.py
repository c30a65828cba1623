"""Contents of installations: wheels with and without a compiler, source archives and editable installations."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.ops.cpu.compiling import compiler

ROOT = Path(__file__).resolve().parent.parent
NATIVE = "widekernel/ops/cpu/_native"
SHOW = """
import widekernel
from widekernel.ops.cpu.library import load
print(widekernel.__file__, load().path, load().reason, sep="|")
"""
CHANGED = "a text that only the test has put here"


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the present environment, without the variables that lead to this installation."""
    outer = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "WIDEKERNEL_LIBRARY")}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env={**outer, **environment}, check=False
    )


def succeed(*command: object, cwd: Path, **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    done = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    files = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    if done.returncode or "pyproject.toml" not in files:
        pytest.skip("needs a git checkout")
    return files


@pytest.fixture
def checkout(tracked: list[str], tmp_path: Path) -> Path:
    """Copy the checkout as others would clone it."""
    folder = tmp_path / "checkout"
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with pip and the build system from the package index."""
    folder = tmp_path_factory.mktemp("builder")
    succeed(sys.executable, "-m", "venv", folder, cwd=folder)
    requires = re.search(r"^requires = \[\"(.+)\"\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    python = folder / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--quiet", requires, "cmake", "ninja", cwd=folder)
    if done.returncode:
        pytest.skip(f"the build system cannot be fetched: {done.stderr[-200:]}")
    return python


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Return the Python of an environment that shares everything with this one except widekernel."""
    folder = tmp_path / "target"
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path)
    python = folder / "bin" / "python"
    packages = Path(succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # Path files in a folder that a path file added are not read, so neither is an editable installation of widekernel.
    shared = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "shared.pth").write_text("\n".join(shared))
    return python


def pip(builder: Path, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{builder.parent}{os.pathsep}{os.environ['PATH']}"
    return run(builder, "-m", "pip", *arguments, "--no-build-isolation", "--no-deps", cwd=cwd, PATH=path, **environment)


def wheel(builder: Path, checkout: Path, **environment: str) -> tuple[str, set[str]]:
    """Build a wheel, and return its name and its files without the metadata."""
    done = pip(builder, "wheel", "--wheel-dir", checkout / "dist", ".", cwd=checkout, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return file.name, {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with the tools of `make wheels`."""
    folder = tmp_path_factory.mktemp("wheel-tools")
    succeed(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--quiet", "-r", ROOT / "native" / "wheels" / "requirements.txt", cwd=folder)
    if done.returncode:
        pytest.skip(f"the tools cannot be fetched: {done.stderr[-200:]}")
    return python


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


def package_files(tracked: list[str]) -> set[str]:
    return {name.removeprefix("src/") for name in tracked if name.startswith("src/")}


@pytest.mark.slow
def test_wheel(builder: Path, checkout: Path, tracked: list[str]) -> None:
    """A wheel holds every file of the package and the library, nothing else, and serves all versions of Python."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    name, files = wheel(builder, checkout, WIDEKERNEL_REQUIRE_NATIVE="1")
    libraries = {file for file in files if file.startswith(NATIVE)}
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert len(libraries) == 1
    assert files - libraries == package_files(tracked)
    assert {"widekernel/py.typed", "widekernel/recipes/demo/slak_nano_digits.yaml"} <= files


@pytest.mark.slow
def test_wheel_without_a_compiler(builder: Path, checkout: Path, tracked: list[str], target: Path) -> None:
    """It is pure Python for every platform, without a library that an earlier editable installation may have left."""
    leftover = checkout / "src" / f"{NATIVE}.so"
    leftover.write_text("old")
    name, files = wheel(builder, checkout, CXX="/nonexistent")
    assert name.endswith("-0nocompiler-py3-none-any.whl"), "whoever sees the file should know"
    assert files == package_files(tracked)
    done = run(builder, "-m", "pip", "--python", target, "install", "--no-deps", checkout / "dist" / name, cwd=checkout)
    assert done.returncode == 0, done.stderr
    file, path, reason = succeed(target, "-c", SHOW, cwd=checkout.parent).strip().split("|")
    assert Path(file).is_relative_to(target.parent.parent)
    assert path == "None"
    assert "was not built" in reason


@pytest.mark.slow
def test_a_wheel_built_without_a_compiler_has_its_own_place_in_pips_cache(
    builder: Path, checkout: Path, target: Path
) -> None:
    """A second installation by name silently reuses the wheel; the way out is the one that the warning names."""
    succeed(builder, "-c", "from scikit_build_core.build import build_sdist; build_sdist('dist')", cwd=checkout)
    (checkout / "empty").mkdir()
    lent = next((builder.parent.parent / "lib").glob("python*/site-packages"))
    environment = {"PIP_CACHE_DIR": str(checkout / "cache"), "CXX": "/nonexistent", "PYTHONPATH": str(lent)}

    def install(*options: str, **more: str) -> subprocess.CompletedProcess[str]:
        from_there = ["--no-index", "--find-links", checkout / "dist", "--force-reinstall", *options, "widekernel"]
        command = ("--python", target, "install", *from_there)
        return pip(builder, *command, cwd=checkout / "empty", **environment, **more)

    assert install().returncode == 0
    assert install(WIDEKERNEL_REQUIRE_NATIVE="1").returncode == 0, "if pip builds anew, the warning may say less"
    anew = install("--no-cache-dir", WIDEKERNEL_REQUIRE_NATIVE="1")
    assert anew.returncode != 0 and "/nonexistent" in anew.stdout + anew.stderr
    used = "import torch; from widekernel import ops; ops.depthwise_sum(torch.zeros(1, 2, 4, 4), [torch.zeros(2, 1, 3, 3)])"
    done = run(target, "-c", used, cwd=checkout.parent, WIDEKERNEL_REQUIRE_NATIVE="1")
    assert done.returncode != 0 and "NativeMissingError" in done.stderr and "--no-cache-dir" in done.stderr


@pytest.mark.slow
def test_a_missing_compiler_is_an_error_if_the_library_is_required(builder: Path, checkout: Path) -> None:
    done = pip(builder, "wheel", ".", cwd=checkout, CXX="/nonexistent", WIDEKERNEL_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "/nonexistent" in done.stdout + done.stderr


@pytest.mark.slow
def test_source_archive(builder: Path, checkout: Path, tracked: list[str]) -> None:
    """It contains the files tracked by git, and nothing that a build leaves in the checkout."""
    for name in ("src/widekernel/ops/cpu/_native.so", "native/editable/CMakeCache.txt", "native/editable/native/a.o"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("left over")
    succeed(builder, "-c", "from scikit_build_core.build import build_sdist; build_sdist('dist')", cwd=checkout)
    (file,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(file) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert files - {"PKG-INFO"} == set(tracked)


@pytest.mark.slow
def test_editable(builder: Path, checkout: Path, target: Path) -> None:
    """Python files come from the checkout, changed C++ files are compiled again, and a failing build leaves no library."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler")

    def install(**environment: str) -> tuple[str, str, str]:
        path = f"{builder.parent}{os.pathsep}{os.environ['PATH']}"
        command = [
            builder,
            "-m",
            "pip",
            "--python",
            target,
            "install",
            "--no-build-isolation",
            "--no-deps",
            "--editable",
            ".",
        ]
        # The target uses the build system of the builder, since it has no pip to fetch its own.
        lent = next((builder.parent.parent / "lib").glob("python*/site-packages"))
        succeed(*command, cwd=checkout, PATH=path, PYTHONPATH=str(lent), **environment)
        return tuple(succeed(target, "-c", SHOW, cwd=checkout.parent).strip().split("|"))

    package = checkout / "src" / "widekernel"
    file, path, reason = install(WIDEKERNEL_REQUIRE_NATIVE="1")
    assert (Path(file), reason) == (package / "__init__.py", "None")
    assert Path(path).parent == package / "ops" / "cpu"
    first = Path(path).read_bytes()
    source = checkout / "native" / "src" / "threads.cpp"
    text = source.read_text()
    source.write_text(
        f'{text}\nextern "C" __attribute__((visibility("default"))) const char *added() {{ return "{CHANGED}"; }}\n'
    )
    _, path, reason = install(WIDEKERNEL_REQUIRE_NATIVE="1")
    assert reason == "None"
    assert CHANGED.encode() not in first
    assert CHANGED.encode() in Path(path).read_bytes()
    source.write_text("no C++")
    file, path, reason = install()
    assert (Path(file), path) == (package / "__init__.py", "None")
    assert "was not built" in reason


LINUX = "manylinux_2_28_x86_64"
RUN_WITHOUT_COMPILER = """
import shutil, torch
from widekernel import ops
assert not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cmake"))
x, kernel = torch.randn(2, 16, 30, 30), torch.randn(16, 1, 21, 21)
with ops.trace() as calls:
    y = ops.depthwise_sum(x, [kernel])
want = torch.nn.functional.conv2d(x.double(), kernel.double(), padding=10, groups=16)
print(calls.backends(), ops.explain(x, [kernel])[0].backend, bool((y - want).abs().max() < 1e-4 * want.abs().max()), sep="|")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="runs a wheel for Linux on x86-64")
def test_a_published_wheel_runs_without_a_compiler(
    wheel_tools: Path, checkout: Path, tracked: list[str], target: Path
) -> None:
    """`make wheels` for this platform; and for Windows, whose wheel is pure Python."""
    script = checkout / "native" / "wheels" / "build.py"
    succeed(wheel_tools, script, checkout / "dist", LINUX, "win_amd64", cwd=checkout)
    (wheel,) = (checkout / "dist").glob(f"widekernel-*-py3-none-{LINUX}.whl")
    (pure,) = (checkout / "dist").glob("widekernel-*-py3-none-win_amd64.whl")
    assert files_of(pure) == package_files(tracked)
    assert files_of(wheel) == package_files(tracked) | {f"{NATIVE}.so"}
    succeed(wheel_tools, "-m", "pip", "--python", target, "install", "--no-deps", wheel, cwd=checkout)
    without = {"PATH": str(target.parent), "WIDEKERNEL_REQUIRE_NATIVE": "1"}
    assert succeed(target, "-c", RUN_WITHOUT_COMPILER, cwd=checkout.parent, **without).strip() == "['native']|native|True"


@pytest.mark.slow
def test_platforms_that_no_wheel_is_built_for(wheel_tools: Path, checkout: Path) -> None:
    done = run(wheel_tools, checkout / "native" / "wheels" / "build.py", "dist", "sunos", cwd=checkout)
    assert done.returncode == 1
    assert "manylinux_2_28_aarch64" in done.stderr and "not ['sunos']" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("tag", "wrong"), [(LINUX, "manylinux_2_28_aarch64"), (LINUX, "win_amd64"), ("win_amd64", LINUX)])
def test_a_wheel_for_another_platform_is_refused(wheel_tools: Path, checkout: Path, tag: str, wrong: str) -> None:
    """A library of the wrong processor, one too many, and one that is missing."""
    file = checkout / f"widekernel-0-py3-none-{wrong}.whl"
    with zipfile.ZipFile(file, "w") as archive:
        if tag == LINUX:
            archive.writestr(f"{NATIVE}.so", b"\x7fELF" + bytes(14) + b"\x3e\x00")
    script = (
        "import pathlib, sys; sys.path.insert(0, 'native/wheels'); import build; "
        "build.check(pathlib.Path(sys.argv[1]), build.PLATFORMS[sys.argv[2]])"
    )
    done = run(wheel_tools, "-c", script, file, wrong, cwd=checkout)
    assert done.returncode == 1
    assert ("is not for aarch64" if "aarch64" in wrong else "contains") in done.stderr
