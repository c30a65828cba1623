"""The checks of a session: every kernel, type and pass; wrong results, hangs and crashes are distinguished."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_session import check, problems
from benchmarks.gpu_session.correctness import Run, Worker
from benchmarks.gpu_session.problems import DILATED_BLOCK, KINDS, PASSES, Job, jobs, layers, maximal
from benchmarks.gpu_session.stages import NETWORKS, TUNED_CANDIDATES

from tests.ops.gpu.helpers import DEVICE
from widekernel.ops.gpu import machine
from widekernel.ops.gpu.config_choice import choose_config
from widekernel.ops.gpu.kernel_configs import CONFIG_TYPES as KERNELS
from widekernel.ops.problem import Problem


@pytest.fixture(autouse=True, scope="module")
def _as_shipped() -> Iterator[None]:
    """Ignore this machine's table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WIDEKERNEL_TUNED", "0")
        yield


@pytest.fixture(scope="module")
def few() -> list[Job]:
    return jobs(DEVICE, machine.chip(), machine.device_name(), small=True)


def test_jobs_cover_every_kernel_type_and_pass(few: list[Job]) -> None:
    assert {(job.kind, job.direction) for job in few} == {(kind, of) for kind in KINDS for of in PASSES.values()}
    for kind in KINDS:
        assert {job.config.method for job in few if job.kind == kind} == set(KERNELS)
    in_use = [job.chosen for job in few]
    assert in_use == sorted(in_use, reverse=True), "what is in use comes first"
    assert len(set(few)) == len(few)
    for job in few[:20]:
        assert job.config == choose_config(job.problem, machine.chip(), machine.device_name()).config


def test_layers_are_those_that_are_tuned_and_folded() -> None:
    tuned = [layer for layer in layers() if layer.tuned]
    assert len(tuned) == 4 * len(NETWORKS) and problems.TRIED == TUNED_CANDIDATES
    folded = {}
    for layer in layers():
        chosen = maximal(layer.kernels, layer.dilations or (1,) * len(layer.kernels))
        folded[layer.name] = [layer.kernels[i] for i in chosen]
    assert folded["replknet-1"] == [(31, 31)] and folded["slak-1"] == [(51, 5), (5, 51)]
    assert folded["unireplknet-2"] == [(13, 13)]
    assert maximal([(3, 3), (3, 3)], [1, 1]) == [0]
    # A dilated kernel has room for no other one, and needs as much as its outer taps span.
    assert maximal([(3, 3), (5, 5)], [2, 1]) == [1] and maximal([(3, 3), (5, 5)], [3, 1]) == [0, 1]
    assert maximal([(7, 7), (3, 3)], [2, 1]) == [0, 1]


def test_jobs_cover_dilated_kernels_in_every_pass_and_by_every_kernel(few: list[Job]) -> None:
    dilated = [job for job in few if job.problem.dilated]
    assert {(job.kind, job.direction) for job in dilated} == {(kind, of) for kind in KINDS for of in PASSES.values()}
    assert {"toeplitz", "flat", "toeplitz weight gradient", "flat weight gradient"} <= {job.config.method for job in dilated}
    assert any(job.problem.dilations == tuple(d for _, d in DILATED_BLOCK) for job in dilated)


@pytest.mark.interpreted
def test_verdicts(few: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    job = next(job for job in few if job.config.method == "direct" and job.kind == "float32")
    row = check.run(job, torch.device(DEVICE), machine.chip())
    assert row["verdict"] == check.RIGHT and 0 <= row["error"] <= row["limit"] and set(row) == set(check.COLUMNS)
    real = check.kernel_call

    def corrupted(problem: Problem, *others):
        call = real(problem, *others)
        return lambda: call() + 0.1

    monkeypatch.setattr(check, "kernel_call", corrupted)
    assert check.run(job, torch.device(DEVICE), machine.chip())["verdict"].startswith("WRONG: differs from float64")
    monkeypatch.setattr(
        check, "kernel_call", lambda *given: lambda: torch.full(job.problem.shape, float("nan"), device=DEVICE)
    )
    assert check.run(job, torch.device(DEVICE), machine.chip())["verdict"].startswith("WRONG")
    broken = replace(job, config=replace(job.config, pixels=3))
    monkeypatch.setattr(check, "kernel_call", real)
    assert check.run(broken, torch.device(DEVICE), machine.chip())["verdict"].startswith("FAILED: ")


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    number = int(line)
    if number == 1:
        os._exit(9)
    if number == 2:
        time.sleep(600)
    row = dict.fromkeys(({columns}), 1) | dict(zip(("layer", "dtype", "pass", "config"), "abcd"))
    verdict = {{"verdict": "right" if number != 3 else "WRONG: by far", "ends": number == 4}}
    print(json.dumps(row | verdict), flush=True)
    if number == 4:  # after a fault, the process takes a while to end
        time.sleep(0.5)
        os._exit(1)
"""


def test_crashes_and_hangs_affect_no_other_job(few: list[Job], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_session.correctness.LONGEST_JOB", 2.0)
    command = [sys.executable, "-S", "-E", "-c", WORKER.format(columns=repr(check.COLUMNS)[1:-1])]
    running = Run(few[:6], tmp_path / "c.csv", 60.0)
    started = time.monotonic()
    running.all([Worker(command)])
    assert time.monotonic() - started < 40
    with (tmp_path / "c.csv").open(newline="") as file:
        verdicts = [row["verdict"] for row in csv.DictReader(file)]
    crashed, hung = "FAILED: its process ended with code 9", "FAILED: no answer within 2 s"
    assert verdicts == ["right", crashed, hung, "WRONG: by far", "right", "right"]
    assert running.verdicts == {"right": 3, "FAILED": 2, "WRONG": 1} and len(running.wrong) == 3


def test_no_job_starts_after_the_deadline(few: list[Job], tmp_path: Path) -> None:
    running = Run(few[:3], tmp_path / "c.csv", 0.0)
    running.all([Worker([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"])])
    assert not running.verdicts and (tmp_path / "c.csv").read_text().count("\n") == 1
