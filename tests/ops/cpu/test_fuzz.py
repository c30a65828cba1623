"""The program that compares a built library with the definition: without Python, so it also runs in emulators."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.ops.cpu.compiling import NATIVE, compiled
from tests.ops.cpu.test_library import HOLLOW
from widekernel.ops.cpu import library


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the compiled program."""
    return compiled(tmp_path_factory.mktemp("fuzz") / "fuzz", NATIVE / "tests" / "fuzz.cpp", options=())


@pytest.fixture
def installed() -> library.Library:
    loaded = library.load()
    if loaded.reason is not None:
        pytest.skip(loaded.reason)
    return loaded


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def test_the_installed_library_on_one_instruction_set(fuzz: Path, installed: library.Library) -> None:
    done = run(fuzz, installed.path, f"isa={installed.isas[0]}", "problems=20")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{installed.isas[0]}: 20 problems, largest error 0\.\d\d of what is allowed\n", done.stdout)


@pytest.mark.slow
def test_the_installed_library_on_every_instruction_set(fuzz: Path, installed: library.Library) -> None:
    done = run(
        fuzz, installed.path, "problems=2000", "seed=7", *([f"openmp={installed.openmp}"] if installed.openmp else [])
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+): 2000 problems", done.stdout, re.MULTILINE) == sorted(installed.isas, key=library.ISAS.index)


def test_a_library_that_computes_nothing_is_found_out(fuzz: Path, tmp_path: Path) -> None:
    text = HOLLOW.replace(
        "wk_depthwise_sum(const wk_sum *) { return WK_BAD_ARGUMENT", "wk_depthwise_sum(const wk_sum *) { return WK_OK"
    )
    assert text != HOLLOW
    nothing = compiled(tmp_path / "nothing.so", f"#define VERSION {library.ABI}\n{text}")
    done = run(fuzz, nothing)
    assert done.returncode == 1
    assert re.search(r"avx2, bfloat16, contiguous: 0 \+ 0 is rounded to -?nan instead of 0", done.stderr)
    refusing = compiled(tmp_path / "refusing.so", f"#define VERSION {library.ABI}\n{HOLLOW}")
    assert (run(fuzz, refusing).returncode, "refused, wrong sizes" in run(fuzz, refusing).stderr) == (1, True)


def test_what_cannot_be_tested(fuzz: Path, installed: library.Library, tmp_path: Path) -> None:
    other = compiled(tmp_path / "other.so", f"#define VERSION {library.ABI + 1}\n{HOLLOW}")
    for command, message in [
        ([], "usage: fuzz LIBRARY"),
        ([tmp_path / "none.so"], "none.so cannot be loaded: "),
        ([other], f"has interface version {library.ABI + 1}, this program {library.ABI}"),
        ([installed.path, "problems=-3"], "-3 is not a number"),
        ([installed.path, "threads=2"], "threads=2 is not an option"),
        ([installed.path, "isa=sse"], "lacks sse"),
        ([installed.path, f"openmp={tmp_path / 'none.so'}"], "provides no threads"),
    ]:
        done = run(fuzz, *command)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("target", "isa"), [("test-neon", "neon"), ("fuzz-avx512", "avx512")])
def test_other_processors(target: str, isa: str, tracked_copy: Path) -> None:
    """NEON in an emulator, and AVX-512 compiled for AVX2."""
    done = subprocess.run(["make", target, "PROBLEMS=100"], cwd=tracked_copy, capture_output=True, text=True, check=False)
    if "needs these Debian packages" in done.stdout:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{isa}: 100 problems" in done.stdout
    assert "warning" not in done.stdout + done.stderr


@pytest.fixture
def tracked_copy(tmp_path: Path) -> Path:
    """Copy what the target of make needs, so that its build folder is not that of the checkout."""
    if shutil.which("make") is None or not NATIVE.is_dir():
        pytest.skip("needs make and the native sources")
    shutil.copytree(NATIVE, tmp_path / "native", ignore=shutil.ignore_patterns("editable"))
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path
