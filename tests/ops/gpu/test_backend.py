"""What the GPU backend says of problems, and that it finds a configuration for any of them; no kernel runs."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.backends import BRANCHES, SUM_OF_BRANCHES
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.ops import dispatch, explanation
from widekernel.ops.backends import triton
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.gpu import config_choice, cost_model, launch, machine, tuning_tables
from widekernel.ops.gpu.kernel_configs import (
    CONFIG_TYPES,
    Chip,
    DirectNchw,
    DirectNhwc,
    DirectNhwcGrad,
    Flat,
    FlatGrad,
    KernelConfig,
    Toeplitz,
    ToeplitzGrad,
    config_from_entry,
)
from widekernel.ops.gpu.launch_geometry import itemsize
from widekernel.ops.problem import DIRECT, Problem

TRITON = TritonBackend()

SUM, WEIGHT_GRAD = "depthwise_sum", "depthwise_weight_grad"
ALL = [SUM, BRANCHES, SUM_OF_BRANCHES, WEIGHT_GRAD]
CHIPS = {
    "sm_80": Chip((8, 0), 108, 163 * 1024),
    "sm_86": Chip((8, 6), 84, 99 * 1024),
    "sm_90": Chip((9, 0), 132, 227 * 1024),
    "sm_100": Chip((10, 0), 148, 227 * 1024),
    "sm_120": Chip((12, 0), 188, 99 * 1024),
}


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was measured."""
    monkeypatch.setenv(tuning_tables.VARIABLE, "0")
    monkeypatch.setattr(tuning_tables, "SHIPPED", Path("there is none"))


def pretend(monkeypatch: pytest.MonkeyPatch, chip: Chip | None, name: str = "NVIDIA H200") -> None:
    """Have PyTorch find that GPU, or none."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv(triton.INTERPRETER, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: chip is not None)
    if chip is None:
        return
    properties = SimpleNamespace(
        major=chip.capability[0],
        minor=chip.capability[1],
        multi_processor_count=chip.processors,
        shared_memory_per_block_optin=chip.shared_bytes,
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: chip.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(launch, "obstacle", lambda: "")
    monkeypatch.setattr(machine, "_warned", True)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    machine._chip_of.cache_clear()
    pretend(monkeypatch, CHIPS["sm_90"])
    yield
    machine._chip_of.cache_clear()


@pytest.fixture
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(triton.INTERPRETER, "1")


def problem(*kernels: tuple[int, int], op: str = SUM, **others: Any) -> Problem:
    anchors = tuple((kh // 2, kw // 2) for kh, kw in kernels)
    return replace(Problem(op, "cuda", torch.float32, (32, 64, 56, 56), kernels, anchors), **others)


LARGE = problem((31, 31))


def refused(of: Problem) -> str:
    """Give the only reason against a problem, which a call by name gives too."""
    (reason,) = TRITON.reasons_against(of)
    assert not TRITON.can_run(of)
    with pytest.raises(ops.NoBackendError) as error:
        dispatch.select(of, "triton")
    assert str(error.value) == f"triton cannot compute {of}: {reason}"
    return reason


# ---- Reasons against


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
    assert refused(LARGE) == "it is written for NVIDIA GPUs and was never tried on AMD's"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    assert refused(LARGE) == "PyTorch finds no GPU"


def test_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Chip((7, 5), 40, 64 * 1024), "Tesla T4")
    assert refused(LARGE) == "it needs compute capability 8.0 or newer, and Tesla T4 has 7.5"


def test_where_nothing_can_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
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
        "Triton cannot build what launches kernels (RuntimeError: Failed to find C compiler.): it needs a C compiler, gcc "
        "or clang or what the variable CC names, Python's header files, and the driver's libcuda.so.1"
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
        text = "Triton cannot build what launches kernels (RuntimeError: no gcc): it needs a C compiler"
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


# ---- What it would do


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("op", ALL)
def test_large_kernels_run_on_it_unasked(op: str) -> None:
    kernels = [(31, 31)] if op == WEIGHT_GRAD else [(31, 31), (5, 51)]
    of = problem(*kernels, op=op)
    assert TRITON.reasons_against(of) == []
    if op in (SUM, WEIGHT_GRAD):
        explained = explanation.explain_problem(of)
    else:
        (explained,) = explanation.explain_branches(of)
    assert explained.backend == "triton"
    assert explained.reasons["portable"] in (["triton comes first"], [f"it has no {op}"])
    assert explained.details == TRITON.describe(of)
    assert explained.details.endswith("; estimated, not measured")
    assert f"  runs on: triton ({explained.details})" in str(explained)


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_few_taps_are_left_to_pytorch_until_measured(channels_last: bool) -> None:
    of = problem((3, 3), channels_last=channels_last)
    explained = explanation.explain_problem(of)
    assert explained.backend == "portable"
    assert explained.reasons["triton"] == [
        "PyTorch's kernels for 9 taps are bound by memory already (an estimate; `widekernel tune` measures)"
    ]
    assert TRITON.can_run(of)
    assert explanation.explain_problem(of, "triton").backend == "triton"
    assert explanation.explain_problem(problem((5, 5), channels_last=channels_last)).backend == "triton"
    # Several at once are more than PyTorch has a kernel for.
    assert explanation.explain_problem(problem((3, 3), (3, 3), channels_last=channels_last)).backend == "triton"


@pytest.mark.usefixtures("h200")
def test_the_gradient_of_one_tap_is_left_to_pytorch() -> None:
    assert explanation.explain_problem(problem((1, 1), op=WEIGHT_GRAD)).backend == "portable"
    assert explanation.explain_problem(problem((3, 3), op=WEIGHT_GRAD)).backend == "triton"


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("op", ALL)
def test_nothing_to_compute(op: str) -> None:
    of = problem((31, 31), op=op, shape=(0, 64, 56, 56))
    assert TRITON.reasons_against(of) == []
    assert TRITON.describe(of) == "nothing to compute"
    assert callable(TRITON.prepare(of))


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("op", [SUM, WEIGHT_GRAD])
def test_tf32_is_another_problem(op: str) -> None:
    exact, rounded = (problem((31, 31), op=op, tf32=allowed) for allowed in (False, True))
    assert tuning_tables.table_key(exact) != tuning_tables.table_key(rounded)
    assert "TF32 allowed" in str(explanation.explain_problem(rounded)) and "TF32" not in str(
        explanation.explain_problem(exact)
    )
    times = [
        cost_model.estimated_cycles(of, config_choice.ranked_configs(of, CHIPS["sm_90"])[0], CHIPS["sm_90"])
        for of in (exact, rounded)
    ]
    assert times[1] < times[0]
    precisions = [TRITON.prepare(of)._run._launch.options["PRECISION"] for of in (exact, rounded)]
    assert precisions == ["tf32x3", "tf32"]


@pytest.mark.usefixtures("h200")
def test_the_gpu_is_asked_once() -> None:
    assert machine.chip() == CHIPS["sm_90"]
    assert machine.chip() is machine.chip()


@pytest.mark.usefixtures("h200")
def test_what_was_measured_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few, many = problem((3, 3)), problem((31, 31))
    last = {of: config_choice.ranked_configs(of, CHIPS["sm_90"])[-1] for of in (few, many)}
    times = {few: (10.0, 20.0), many: (20.0, 10.0)}
    entries = {
        tuning_tables.table_key(of): {"config": last[of].to_entry(), "us": ours, "pytorch_us": theirs}
        for of, (ours, theirs) in times.items()
    }
    path = tmp_path / "tuned.json"
    tuning_tables.write(path, {"NVIDIA H200": entries})
    monkeypatch.setenv(tuning_tables.VARIABLE, str(path))
    assert explanation.explain_problem(few).backend == "triton"
    assert TRITON.describe(few).startswith(str(last[few]))
    explained = explanation.explain_problem(many)
    assert explained.backend == "portable"
    assert explained.reasons["triton"] == ["PyTorch takes 10 µs where this backend takes 20 µs (measured)"]
    assert explanation.explain_problem(many, "triton").details.startswith(str(last[many]))


# ---- Configurations for anything


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    op = draw(st.sampled_from(ALL))
    side, extent = st.integers(1, 75), st.integers(1, 130)
    kernels = draw(st.lists(st.tuples(side, side), min_size=1, max_size=1 if op == WEIGHT_GRAD else 4))
    anchors = [(draw(st.integers(0, kh - 1)), draw(st.integers(0, kw - 1))) for kh, kw in kernels]
    shape = draw(st.integers(1, 256)), draw(st.integers(1, 600)), draw(extent), draw(extent)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tf32 = dtype == torch.float32 and draw(st.booleans())
    return Problem(op, "cuda", dtype, shape, tuple(kernels), tuple(anchors), draw(st.booleans()), None, tf32)


def shared_bytes(of: Problem, config: KernelConfig) -> int:
    """What the blocks of a product and the accumulators that are gathered take."""
    each = itemsize(of.dtype)
    if isinstance(config, Toeplitz):
        sides = config.rows * config.columns + config.images * config.row_blocks
        return sides * config.depth * config.stages * each
    if isinstance(config, Flat):
        return (config.pixels + 2 * config.images) * config.pixels * each
    if isinstance(config, FlatGrad):
        return max(2 * config.pixels * config.images * each, config.pixels**2 * 4)
    if isinstance(config, ToeplitzGrad):
        rows = config.kernel_rows * config.inputs
        return max((rows + config.outputs) * config.depth * config.stages * each, rows * config.outputs * 4)
    assert isinstance(config, (DirectNchw, DirectNhwc, DirectNhwcGrad)), "say what the blocks of this one take"
    return 0


def product_of(config: KernelConfig) -> tuple[int, int, int] | None:
    """M, N and K."""
    if isinstance(config, Toeplitz):
        return config.rows * config.columns, config.images * config.row_blocks, config.depth
    if isinstance(config, Flat):
        return config.pixels, config.images, config.pixels
    if isinstance(config, FlatGrad):
        return config.pixels, config.pixels, config.images
    if isinstance(config, ToeplitzGrad):
        return config.kernel_rows * config.inputs, config.outputs, config.depth
    return None


def check(of: Problem, chip: Chip) -> None:
    listed = config_choice.ranked_configs(of, chip)
    assert listed, f"no configuration for {of} on {chip.name}"
    assert len(set(listed)) == len(listed)
    costs = [cost_model.estimated_cycles(of, config, chip) for config in listed]
    assert costs == sorted(costs) and all(0 < each < math.inf for each in costs)
    for config in listed:
        assert shared_bytes(of, config) <= chip.shared_bytes
        # What has a default is a switch.
        sizes = [field.name for field in fields(config) if field.default is MISSING and field.name != "stages"]
        numbers = [getattr(config, name) for name in sizes]
        assert all(number > 0 and number & (number - 1) == 0 for number in numbers), f"{config}: blocks are powers of two"
        product = product_of(config)
        assert product is None or min(product) >= 16, f"{config}: tensor cores multiply 16 by 16 at least"


@given(problems(), st.sampled_from(sorted(CHIPS)))
@settings(max_examples=150, deadline=None)
def test_every_problem_has_configurations_that_fit(of: Problem, name: str) -> None:
    check(of, CHIPS[name])


EXTENTS = [1, 2, 3, 4, 5, 8, 9, 16, 130]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("op", [SUM, BRANCHES, WEIGHT_GRAD])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (9, 9), (75, 75), (1, 75), (75, 1)], ids=lambda k: f"{k[0]}x{k[1]}")
def test_maps_of_a_few_rows_or_columns(kernel: tuple[int, int], op: str, channels_last: bool) -> None:
    for height in EXTENTS:
        for width in EXTENTS if height < 130 else EXTENTS[:-1]:
            of = problem(kernel, op=op, shape=(2, 3, height, width), channels_last=channels_last)
            for name in ("sm_86", "sm_90"):
                assert config_choice.ranked_configs(of, CHIPS[name]), f"no configuration for {of} on {name}"


@given(problems(), st.sampled_from(sorted(CHIPS)), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_the_ranking_depends_on_nothing_but_the_problem(of: Problem, name: str, random: Any) -> None:
    chip = CHIPS[name]
    first = config_choice.ranked_configs(of, chip)
    found = list(first)
    random.shuffle(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_choice, "candidates", lambda *args: found)
        assert config_choice.ranked_configs(of, chip) == first


# ---- Entries of tables


EVERY_KIND = [kind(**{field.name: 16 << i for i, field in enumerate(fields(kind))}) for kind in CONFIG_TYPES.values()]


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
def test_configurations_and_their_entries(config: KernelConfig) -> None:
    entry = config.to_entry()
    assert config_from_entry(entry) == config
    assert config_from_entry(json.loads(json.dumps(entry))) == config
    assert entry["method"] == config.method
    assert str(config).startswith(f"{config.method} (warps {config.warps}, stages {config.stages}, ")


FLAT = Flat(4, 2, pixels=64, images=16).to_entry()
BAD = {
    "no-method": ({name: number for name, number in FLAT.items() if name != "method"}, "there is no method None"),
    "unknown-method": (
        FLAT | {"method": "winograd"},
        "there is no method 'winograd': it must be one of toeplitz, flat",
    ),
    "missing": (
        {name: number for name, number in FLAT.items() if name != "images"},
        "flat has .*whole numbers images",
    ),
    "one-more": (FLAT | {"depth": 16}, "flat has .*'depth': 16.*: it needs .* images, pixels, stages, warps"),
    "zero": (FLAT | {"images": 0}, "positive whole numbers"),
    "negative": (FLAT | {"warps": -4}, "positive whole numbers"),
    "half": (FLAT | {"pixels": 64.5}, "positive whole numbers"),
    "words": (FLAT | {"pixels": "64"}, "positive whole numbers"),
    "nothing": (FLAT | {"pixels": None}, "positive whole numbers"),
    "transposed-back": (EVERY_KIND[0].to_entry() | {"transposed": -1}, "positive whole numbers"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_entries(bad: str) -> None:
    entry, message = BAD[bad]
    with pytest.raises(ArgumentError, match=message):
        config_from_entry(entry)
