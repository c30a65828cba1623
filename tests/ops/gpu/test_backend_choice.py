"""Choices of the GPU backend: the problems that it takes by default, and how it computes them; no kernel runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.gpu.pretended_gpu import ALL, CHIPS, SUM, WEIGHT_GRAD, problem
from widekernel.ops import explanation
from widekernel.ops.backends.triton import TritonBackend
from widekernel.ops.gpu import config_choice, cost_model, machine, tuning_tables

TRITON = TritonBackend()

pytestmark = pytest.mark.usefixtures("no_tables")


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("op", ALL)
def test_large_kernels_run_on_it_by_default(op: str) -> None:
    kernels = [(31, 31)] if op == WEIGHT_GRAD else [(31, 31), (5, 51)]
    of = problem(*kernels, op=op)
    assert TRITON.reasons_against(of) == []
    if op in (SUM, WEIGHT_GRAD):
        explained = explanation.explain_problem(of)
    else:
        (explained,) = explanation.explain_branches(of)
    assert explained.backend == "triton"
    assert explained.reasons["portable"] in (["triton comes first"], [f"it does not implement {op}"])
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
    # PyTorch has no kernel for several at once.
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
def test_gpu_properties_are_read_once() -> None:
    assert machine.chip() == CHIPS["sm_90"]
    assert machine.chip() is machine.chip()


@pytest.mark.usefixtures("h200")
def test_measurements_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
