"""Loading of the native library, reasons why it may be missing, and agreement of Python with the C header."""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from tests.ops.cpu.compiling import NATIVE, compiled, compiler
from widekernel import ops
from widekernel.errors import ArgumentError, WidekernelError
from widekernel.ops.cpu import library
from widekernel.ops.cpu.library import Library
from widekernel.ops.cpu.openmp import openmp_runtime

# A library with every function and nothing behind them; VERSION and the instruction sets are up to the test.
HOLLOW = """
#include "widekernel.h"
#include <initializer_list>
#include <string.h>
static const char *isa = "avx2";
int32_t wk_abi(void) { return VERSION; }
const char *wk_isa(void) { return isa; }
int32_t wk_use_isa(const char *name) {
    for (const char *known : {"avx2", "portable"}) if (!strcmp(name, known)) { isa = known; return WK_OK; }
    return WK_BAD_ARGUMENT;
}
int32_t wk_lanes(void) { return strcmp(isa, "avx2") ? 4 : 8; }
const char *wk_processor(void) { return "other"; }
int32_t wk_bind_openmp(const char *) { return 0; }
int32_t wk_depthwise_sum(const wk_sum *) { return WK_BAD_ARGUMENT; }
int32_t wk_depthwise_weight_grad(const wk_weight_grad *) { return WK_OUT_OF_MEMORY; }
int32_t wk_depthwise_sum_at(const wk_sum *, const void *, void *, const float *const *, const float *, const float *,
                            int32_t, const wk_partial *) { return WK_BAD_ARGUMENT; }
int32_t wk_depthwise_branches_at(const wk_sum *, const void *const *, void *const *, const float *const *) { return WK_OK; }
int32_t wk_depthwise_weight_grad_at(const wk_weight_grad *, const void *, const void *, float *) { return WK_BAD_ARGUMENT; }
void wk_sum_workspace(const wk_sum *, int64_t *, int64_t *) {}
const char *wk_sum_form(const wk_sum *) { return ""; }
void wk_weight_grad_workspace(const wk_weight_grad *, int64_t *, int64_t *) {}
int32_t wk_pointwise_pack(const wk_pointwise_weights *, wk_pointwise **) { return WK_BAD_ARGUMENT; }
void wk_pointwise_free(wk_pointwise *) {}
int32_t wk_pointwise_run(const wk_pointwise *, const wk_pointwise_call *) { return WK_BAD_ARGUMENT; }
int32_t wk_pointwise_run_at(const wk_pointwise *, const wk_pointwise_call *, const void *, const float *, const void *,
                            void *) { return WK_BAD_ARGUMENT; }
int32_t wk_gate_run(const wk_gate *) { return WK_BAD_ARGUMENT; }
int32_t wk_gate_run_at(const wk_gate *, const void *, float *) { return WK_BAD_ARGUMENT; }
int32_t wk_depthwise_conv_run(const wk_depthwise_conv *) { return WK_BAD_ARGUMENT; }
int32_t wk_depthwise_conv_run_at(const wk_depthwise_conv *, const void *, void *) { return WK_BAD_ARGUMENT; }
int32_t wk_run_steps(const wk_step *, int32_t, void *const *) { return WK_BAD_ARGUMENT; }
int32_t wk_samples_equal(const wk_samples *, int32_t, const float *) { return 0; }
int32_t wk_pointwise_weight_grad(const wk_pointwise_grad *) { return WK_BAD_ARGUMENT; }
int32_t wk_batch_norm_run(const wk_batch_norm *) { return WK_BAD_ARGUMENT; }
void wk_pointwise_workspace(const wk_pointwise *, int32_t, int64_t *, int64_t *) {}
const char *wk_error_text(int32_t error) { return error == WK_OUT_OF_MEMORY ? "no memory" : "wrong sizes"; }
double wk_fma_peak(int32_t, double) { return 0; }
const char *wk_why_no_products(int32_t type) { return type == WK_FLOAT32 ? nullptr : "it is hollow"; }
double wk_product_peak(int32_t, int32_t, double) { return 0; }
"""


@pytest.fixture
def hollow(tmp_path: Path) -> Path:
    return compiled(tmp_path / "hollow.so", f"#define VERSION {library.ABI}\n{HOLLOW}")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Restore the state after the import: nothing is loaded, and no warning was given."""
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.delenv("WIDEKERNEL_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(library, "_warned", False)
    return monkeypatch


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """Return a copy of the installed library, with separate state."""
    installed = library.load()
    if installed.reason is not None:
        pytest.skip(installed.reason)
    return Path(shutil.copy(installed.path, tmp_path))


def opened(path: Path | str, **environment: str) -> Library:
    return library.open_library({"WIDEKERNEL_LIBRARY": str(path), **environment})


def test_a_compiler_gives_a_native_library() -> None:
    """After a failed build, the installation is silently pure Python; the tests should notice this."""
    loaded = library.load()
    if compiler() is None or not loaded.wanted:
        pytest.skip("no compiler, or switched off")
    assert loaded.reason is None


def test_the_installed_library(native: Path) -> None:
    loaded = opened(native)
    assert loaded.reason is None
    assert loaded.path == native
    assert loaded.isa == loaded.isas[0]
    assert loaded.isas[-1] == "portable"
    assert set(loaded.isas) <= set(library.ISAS)
    assert loaded.lanes == loaded.calls.wk_lanes() in (4, 8, 16)
    assert loaded.threads_available == (openmp_runtime() is not None)


def test_every_instruction_set_can_be_forced(native: Path) -> None:
    for isa in opened(native).isas:
        loaded = opened(native, WIDEKERNEL_ISA=isa)
        assert (loaded.reason, loaded.isa, loaded.calls.wk_isa().decode()) == (None, isa, isa)
        assert loaded.calls.wk_fma_peak(1, 0.001) > 0


def test_an_instruction_set_that_is_missing(hollow: Path) -> None:
    loaded = opened(hollow, WIDEKERNEL_ISA="avx512")
    assert loaded.reason.startswith("WIDEKERNEL_ISA=avx512: ")
    assert "avx2, portable" in loaded.reason
    assert loaded.wanted
    assert loaded.calls is None


def test_changing_the_instruction_set(hollow: Path) -> None:
    loaded = opened(hollow)
    assert (loaded.isas, loaded.isa, loaded.lanes, loaded.openmp) == (("avx2", "portable"), "avx2", 8, None)
    loaded.use_isa("portable")
    assert (loaded.isa, loaded.lanes) == ("portable", 4)
    with pytest.raises(ArgumentError, match=r"'neon': .* avx2, portable; choose"):
        loaded.use_isa("neon")
    assert loaded.isa == "portable"
    with pytest.raises(ArgumentError, match="no instruction set can be chosen: none here"):
        Library("none here").use_isa("avx2")


def test_errors_of_calls(hollow: Path) -> None:
    loaded = opened(hollow)
    loaded.check(library.OK)
    with pytest.raises(ArgumentError, match="wrong sizes"):
        loaded.check(loaded.calls.wk_depthwise_sum(ctypes.byref(library.Sum())))
    with pytest.raises(MemoryError, match="no memory") as raised:
        loaded.check(loaded.calls.wk_depthwise_weight_grad(ctypes.byref(library.WeightGrad())))
    assert isinstance(raised.value, WidekernelError)


def test_a_library_that_is_switched_off() -> None:
    for value in ("0", "off"):
        loaded = library.open_library({"WIDEKERNEL_NATIVE": value})
        assert f"switched off by WIDEKERNEL_NATIVE={value}" in loaded.reason
        assert not loaded.wanted
        assert not loaded.threads_available


def test_a_library_that_was_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    loaded = library.open_library({})
    assert f"was not built ({tmp_path} has none); install a C++17 compiler" in loaded.reason
    assert "WIDEKERNEL_REQUIRE_NATIVE=1 pip install --force-reinstall --no-deps --no-cache-dir widekernel" in loaded.reason
    assert loaded.wanted


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert opened(tmp_path / "no.so").reason == f"WIDEKERNEL_LIBRARY={tmp_path / 'no.so'} is not a file: correct or unset it"


def test_a_file_that_cannot_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "text.so"
    file.write_text("not a library")
    assert re.match(rf"{file} cannot be loaded \(.*\); reinstall", opened(file).reason)


def test_a_library_with_another_interface(tmp_path: Path) -> None:
    file = compiled(tmp_path / "other.so", f"#define VERSION {library.ABI + 1}\n{HOLLOW}")
    wanted = f"{file} has interface version {library.ABI + 1}, but this version of widekernel needs {library.ABI}; reinstall"
    assert opened(file).reason.startswith(wanted)


def test_a_file_that_is_another_library(tmp_path: Path) -> None:
    file = compiled(tmp_path / "foreign.so", 'extern "C" int foreign() { return 1; }\n')
    assert "is not the native library of widekernel (" in opened(file).reason
    file = compiled(tmp_path / "partial.so", f'extern "C" int wk_abi() {{ return {library.ABI}; }}\n')
    assert "wk_isa" in opened(file).reason


def test_loaded_once_by_many_threads(unloaded: pytest.MonkeyPatch) -> None:
    opened_by: list[int] = []

    def slowly(_: object) -> Library:
        opened_by.append(threading.get_ident())
        time.sleep(0.05)
        return Library("for the test")

    unloaded.setattr(library, "open_library", slowly)
    seen: list[Library] = []
    threads = [threading.Thread(target=lambda: seen.append(library.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened_by) == 1
    assert len(seen) == 8
    assert all(one is seen[0] for one in seen)


def test_one_warning_if_missing(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setattr(library, "open_library", lambda _: Library("there is no compiler"))
    with pytest.warns(RuntimeWarning, match="PyTorch's convolutions.*: there is no compiler"):
        library.warn_once_if_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.warn_once_if_missing()


@pytest.mark.parametrize("answer", [Library("switched off", wanted=False), Library()], ids=["switched off", "present"])
def test_no_warning(unloaded: pytest.MonkeyPatch, answer: Library) -> None:
    unloaded.setattr(library, "open_library", lambda _: answer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.warn_once_if_missing()


@pytest.mark.parametrize("value", ["1", "yes", "ON"])
@pytest.mark.parametrize("wanted", [True, False], ids=["missing", "switched off"])
def test_a_required_library_that_is_missing_raises(unloaded: pytest.MonkeyPatch, wanted: bool, value: str) -> None:
    unloaded.setattr(library, "open_library", lambda _: Library("there is no compiler", wanted=wanted))
    unloaded.setenv("WIDEKERNEL_REQUIRE_NATIVE", value)
    x, kernel = torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 3, 3)
    for _ in range(2):
        with pytest.raises(library.NativeMissingError, match=f"REQUIRE_NATIVE is '{value}'.* but there is no compiler"):
            ops.explain(x, [kernel])
    with ops.trace() as ran:
        ops.depthwise_sum(x, [kernel], backend="portable")
    assert ran.backends() == ["portable"], "what another backend was asked for needs no library"


@pytest.mark.parametrize("value", ["", "0", "no", "False"])
def test_a_missing_library_that_is_not_required(unloaded: pytest.MonkeyPatch, value: str) -> None:
    unloaded.setattr(library, "open_library", lambda _: Library("there is no compiler", wanted=False))
    unloaded.setenv("WIDEKERNEL_REQUIRE_NATIVE", value)
    assert ops.explain(torch.zeros(1, 2, 4, 4), [torch.zeros(2, 1, 3, 3)])[0].backend != "native"


def test_a_required_library_that_is_there(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setattr(library, "open_library", lambda _: Library())
    unloaded.setenv("WIDEKERNEL_REQUIRE_NATIVE", "1")
    library.warn_once_if_missing()


def runtimes() -> list[str]:
    with Path("/proc/self/maps").open() as maps:
        names = {line.split()[-1] for line in maps if "omp" in line.rpartition("/")[2]}
    return sorted(name for name in names if name.startswith("/"))


PROGRAM = f"""
import json
from pathlib import Path
from widekernel.ops.cpu import library
{inspect.getsource(runtimes)}
before = runtimes()
lazy = library._loaded is None
loaded = library.load()
print(json.dumps([lazy, before, runtimes(), loaded.reason, loaded.isa, loaded.openmp]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_adds_no_runtime(native: Path, unloaded: pytest.MonkeyPatch) -> None:
    """The variables are read from the environment."""
    unloaded.setenv("WIDEKERNEL_ISA", "portable")
    unloaded.setenv("WIDEKERNEL_LIBRARY", str(native))
    before = runtimes()
    loaded = library.load()
    assert runtimes() == before
    assert (loaded.reason, loaded.isa, loaded.path) == (None, "portable", native)
    assert loaded.openmp is None or os.path.realpath(loaded.openmp) in before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_new_process(native: Path) -> None:
    """The variables are read from the environment, and loading adds no OpenMP runtime."""
    environment = {**os.environ, "WIDEKERNEL_ISA": "portable", "WIDEKERNEL_LIBRARY": str(native)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    lazy, before, after, reason, isa, openmp = json.loads(done.stdout.splitlines()[-1])
    assert lazy
    assert before == after
    assert (reason, isa) == (None, "portable")
    assert openmp is None or os.path.realpath(openmp) in before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
def test_a_preloaded_runtime_is_the_one_that_is_used(native: Path, tmp_path: Path) -> None:
    """Some vendors recommend preloading a runtime. PyTorch's operators then run on it, and so must ours."""
    if openmp_runtime() is None:
        pytest.skip("PyTorch has no OpenMP runtime")
    other = shutil.copy(openmp_runtime(), tmp_path / "libother_omp.so")
    environment = {**os.environ, "LD_PRELOAD": str(other), "WIDEKERNEL_LIBRARY": str(native)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout.splitlines()[-1])[-1] == str(other)


def c_structures() -> dict[str, type[ctypes.Structure]]:
    return {
        "wk_tensor": library.Tensor,
        "wk_pass": library.Pass,
        "wk_rect": library.Rect,
        "wk_partial": library.Partial,
        "wk_sum": library.Sum,
        "wk_weight_grad": library.WeightGrad,
        "wk_pointwise_weights": library.PointwiseWeights,
        "wk_pointwise_call": library.PointwiseCall,
        "wk_gate": library.Gate,
        "wk_depthwise_conv": library.DepthwiseConv,
        "wk_patch": library.PatchGeometry,
        "wk_place": library.Place,
        "wk_step": library.Step,
        "wk_samples": library.Samples,
        "wk_pointwise_grad": library.PointwiseGrad,
        "wk_batch_norm": library.BatchNorm,
    }


def test_structures_are_laid_out_as_in_c(tmp_path: Path) -> None:
    lines, wanted = [], []
    for name, structure in c_structures().items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        wanted.append(ctypes.sizeof(structure))
        for field, *_ in structure._fields_:
            member = getattr(structure, field)
            lines.append(f'printf("%zu\\n%zu\\n", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));')
            wanted += [member.offset, member.size]
    text = "#include <stddef.h>\n#include <stdio.h>\n#include <widekernel.h>\nint main() {\n" + "\n".join(lines) + "\n}\n"
    program = compiled(tmp_path / "layout", text, options=())
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()] == wanted


@pytest.mark.skipif(not NATIVE.is_dir(), reason="needs the native sources")
def test_constants_and_functions_are_those_of_the_header() -> None:
    header = (NATIVE / "include" / "widekernel.h").read_text()
    constants = {name: int(value) for name, value in re.findall(r"\bWK_(\w+) = (\d+)", header)}
    assert len(constants) == 19
    assert constants == {name: getattr(library, name) for name in constants}
    defined = dict(re.findall(r"#define WK_(\w+) (\d+)", header))
    assert defined == {name: str(getattr(library, name)) for name in ("ABI", "MOST_PASSES", "MOST_RECTS")}
    assert set(re.findall(r"\b(wk_\w+)\(", header)) == set(library._SIGNATURES)
    for members, name in re.findall(r"typedef struct \{([^}]*)\} (\w+);", header, re.DOTALL):
        fields = re.findall(r"(\w+)\s*[,;]", re.sub(r"//.*", "", members))
        assert fields == [field for field, *_ in c_structures()[name]._fields_]


def test_the_runtime_is_loaded_already() -> None:
    runtime = openmp_runtime()
    if not torch.backends.openmp.is_available():
        pytest.skip("this PyTorch was built without OpenMP")
    assert runtime is not None
    ctypes.CDLL(runtime, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
