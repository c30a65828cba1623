"""The reasons of the GPU backend against problems; no kernel runs."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace

import pytest
import torch

from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES
from tests.ops.gpu.pretended_gpu import ALL, CHIPS, LARGE, SUM, WEIGHT_GRAD, pretend, problem
from widekernel import ops
from widekernel.ops import dispatch
from widekernel.ops.backends import triton
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.gpu import launch, machine
from widekernel.ops.gpu.kernel_configs import (
    Chip,
)
from widekernel.ops.problem import DIRECT, Problem

TRITON = TritonBackend()

pytestmark = pytest.mark.usefixtures("no_tables")


@pytest.fixture
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(triton.INTERPRETER, "1")


def refused(of: Problem) -> str:
    """Return the only reason against a problem, after checking that a call by name states it too."""
    (reason,) = TRITON.reasons_against(of)
    assert not TRITON.can_run(of)
    with pytest.raises(ops.NoBackendError) as error:
        dispatch.select(of, "triton")
    assert str(error.value) == f"triton cannot compute {of}: {reason}"
    return reason


@pytest.mark.usefixtures("_interpreter")
@pytest.mark.parametrize("op", ALL)
def test_on_a_cpu_it_runs_only_when_asked_for(op: str) -> None:
    of = problem((31, 31), op=op, device="cpu")
    assert TRITON.can_run(of)
    assert TRITON.reasons_against(of) == [
        "on a CPU it runs in Triton's interpreter, only when asked for with backend='triton'"
    ]


@pytest.mark.usefixtures("_interpreter")
def test_on_a_cpu_another_backend_is_chosen() -> None:
    x, kernel = torch.zeros(1, 2, 8, 8), torch.zeros(2, 1, 5, 5)
    for explained in ops.explain(x, [kernel]):
        assert explained.backend != "triton"
        assert "backend='triton'" in explained.reasons["triton"][0]
    assert {explained.backend for explained in ops.explain(x, [kernel], backend="triton")} == {"triton"}


def test_on_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(triton.INTERPRETER, raising=False)
    assert refused(replace(LARGE, device="cpu")) == "it runs on NVIDIA GPUs, not on cpu"


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
@pytest.mark.usefixtures("h200", "_interpreter")
def test_other_devices(device: str) -> None:
    assert refused(replace(LARGE, device=device)) == f"it runs on NVIDIA GPUs, not on {device}"


@pytest.mark.usefixtures("h200")
def test_types() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert TRITON.reasons_against(replace(LARGE, dtype=dtype)) == []
    reason = refused(replace(LARGE, dtype=torch.float64))
    assert reason == "it computes float32, bfloat16 and float16, not torch.float64"


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("op", [SUM, BRANCHES, SUM_OF_BRANCHES])
def test_number_of_kernels(op: str) -> None:
    assert TRITON.can_run(problem(*[(5, 11)] * 16, op=op))
    assert refused(problem(*[(5, 11)] * 17, op=op)) == "it adds up at most 16 kernels, not 17"


@pytest.mark.usefixtures("h200")
def test_the_direct_algorithm() -> None:
    assert "'direct' excludes" in refused(replace(LARGE, algorithm=DIRECT))
    assert "'direct' excludes" in refused(problem((3, 31), op=WEIGHT_GRAD, algorithm=DIRECT))
    for channels_last, kernel in [(False, (5, 5)), (True, (9, 9))]:
        of = problem(kernel, algorithm=DIRECT, channels_last=channels_last)
        assert TRITON.reasons_against(of) == []
        assert TRITON.describe(of).startswith("direct")
        of = replace(of, op=WEIGHT_GRAD)
        assert TRITON.reasons_against(of) == []
        assert TRITON.describe(of).startswith("direct weight gradient")


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("op", [BRANCHES, SUM_OF_BRANCHES])
def test_small_branches_of_channels_last_images(op: str) -> None:
    of = problem((9, 9), (3, 3), op=op, channels_last=True)
    assert refused(of) == "small kernels on channels_last images are computed one by one"
    assert TRITON.can_run(problem((9, 10), (3, 3), op=op, channels_last=True))


@pytest.mark.usefixtures("h200")
def test_very_large_channels_last_images() -> None:
    of = problem((7, 7), shape=(1, 512, 2048, 2048), channels_last=True)
    assert refused(of) == "it computes channels_last images of fewer than 2**31 numbers"
    assert TRITON.can_run(replace(of, shape=(2048, 512, 32, 32)))
    assert TRITON.can_run(replace(of, channels_last=False))


@pytest.mark.usefixtures("h200")
def test_all_obstacles_are_listed() -> None:
    of = problem(*[(31, 31)] * 17, device="cpu", dtype=torch.float64)
    assert len(TRITON.reasons_against(of)) >= 2


@pytest.mark.usefixtures("h200")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert refused(LARGE) == "Triton is not installed: pip install triton"
    monkeypatch.setenv(triton.INTERPRETER, "1")
    assert refused(replace(LARGE, device="cpu")) == "Triton is not installed: pip install triton"


@pytest.mark.usefixtures("h200")
def test_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert refused(LARGE) == "it is written for NVIDIA GPUs and has never been tested on AMD GPUs"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    assert refused(LARGE) == "PyTorch finds no GPU"


def test_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Chip((7, 5), 40, 64 * 1024), "Tesla T4")
    assert refused(LARGE) == "it needs compute capability 8.0 or newer, and Tesla T4 has 7.5"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutCompiler:
        @property
        def active(self) -> None:
            raise RuntimeError("Failed to find C compiler.")

    asked = launch.obstacle
    pretend(monkeypatch, CHIPS["sm_90"])
    monkeypatch.setattr(launch, "obstacle", asked)
    monkeypatch.setattr(launch.driver, "driver", WithoutCompiler())
    launch.driver.obstacle.cache_clear()
    try:
        reason = refused(LARGE)
        with pytest.raises(dispatch.NoBackendError, match="Failed to find C compiler"):
            dispatch.select(LARGE, "triton")
        assert dispatch.select(LARGE).name == "portable"
    finally:
        launch.driver.obstacle.cache_clear()
    assert reason == (
        "Triton cannot build its kernel launcher (RuntimeError: Failed to find C compiler.): it needs a C compiler (gcc, "
        "clang or the one that the variable CC names), Python's header files, and the driver's libcuda.so.1"
    )


WARNINGS = {
    "Triton": "PyTorch's convolutions, many times slower: Triton is not installed: pip install triton",
    "compiler": "PyTorch's convolutions, many times slower: Triton cannot build .* needs a C compiler",
}


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("missing", WARNINGS)
def test_missing_software_is_reported_once(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "Triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    else:
        text = "Triton cannot build its kernel launcher (RuntimeError: no gcc): it needs a C compiler"
        monkeypatch.setattr(launch, "obstacle", lambda: text)
    monkeypatch.setattr(machine, "_warned", False)
    with pytest.warns(RuntimeWarning, match=WARNINGS[missing]):
        assert dispatch.select(LARGE).name == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for of in (LARGE, problem((5, 5)), problem((31, 31), op=WEIGHT_GRAD)):
            assert dispatch.select(of).name == "portable"


@pytest.mark.parametrize("machine_has", ["no GPU", "an old GPU", "an AMD GPU", "all it needs"])
def test_nothing_is_reported_where_no_software_is_missing(monkeypatch: pytest.MonkeyPatch, machine_has: str) -> None:
    old = Chip((7, 5), 40, 64 * 1024)
    chips = {"no GPU": None, "an old GPU": old, "an AMD GPU": CHIPS["sm_90"], "all it needs": CHIPS["sm_90"]}
    machine._chip_of.cache_clear()
    pretend(monkeypatch, chips[machine_has])
    if machine_has == "an AMD GPU":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(machine, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TRITON.reasons_against(LARGE)
        TRITON.reasons_against(replace(LARGE, device="cpu"))
    assert not machine._warned
    machine._chip_of.cache_clear()
