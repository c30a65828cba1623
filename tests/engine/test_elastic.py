"""A run does not depend on the number of processes, nor on changes of that number when it is resumed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.elastic_program import BATCH, KILLS, KINDS, RESUMED, STEPS, STOPS
from tests.engine.tiny import states_equal, without_timings
from torch import Tensor

from widekernel.engine.metrics_log import read_metrics
from widekernel.engine.processes import Processes
from widekernel.tasks.classification.evaluation import Accuracy

TOLERANCE = 1e-5
ROOT = Path(__file__).parents[2]
RUNS = ["sparse changing", "sparse 1", "sparse 2", "group norm 1", "group norm 2", "tracks 1", "tracks 2"]
SLOW_RUNS = ["batch norm changing", "batch norm 1", "batch norm 2", "group norm changing", "group norm 1", "group norm 2"]


def run(folder: Path, *names: str) -> Path:
    """Perform the runs of `elastic_program` with these names, and return the folder with their files."""
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.engine.elastic_program", str(folder), *names]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=400)
    codes = json.loads((folder / "report.json").read_text())
    assert codes.keys() == set(names)
    for name, parts in codes.items():
        sizes = [2, 1, 2] if "changing" in name else [int(name[-1])]
        logs = [log.read_text()[-2000:] for log in (folder / "logs").glob(f"{name}*")]
        assert [len(part) for part in parts] == sizes and not any(parts[-1]), (parts, logs)
        assert all(-9 in part and 0 not in part for part in parts[:-1]), (parts, logs)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("elastic"), *RUNS)


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("elastic"), *SLOW_RUNS)


def final_state(run_folder: Path) -> dict[str, Any]:
    return torch.load(run_folder / f"checkpoints/step-{STEPS:08d}.pt", weights_only=True)


def seen(path: Path) -> dict[tuple[int, int], tuple[list[str], float]]:
    """Return the images, in order, and the loss of each step, by step and number of processes."""
    rows: dict[tuple[int, int], dict[int, dict]] = {}
    for part in path.parent.glob(f"{path.name}.seen.*"):
        for row in map(json.loads, part.read_text().splitlines()):
            rows.setdefault((row["step"], row["processes"]), {})[row["first"]] = row
    found = {}
    for place, passes in rows.items():
        ordered = [passes[first] for first in sorted(passes)]
        found[place] = (
            [image for row in ordered for image in row["images"]],
            math.fsum(row["loss"] for row in ordered) / len(ordered),
        )
    return found


def assert_close(one: Any, other: Any, place: str = "") -> None:
    """Compare nested containers: real numbers to the tolerance, relative to the largest in a tensor; the rest exactly."""
    if isinstance(other, Tensor) and other.is_floating_point():
        assert one.shape == other.shape, place
        if other.numel():
            difference = (one.double() - other.double()).abs().max().item()
            assert difference <= TOLERANCE * other.double().abs().max().item(), (place, difference)
    elif isinstance(other, dict):
        assert one.keys() == other.keys(), place
        for key, value in other.items():
            assert_close(one[key], value, f"{place}/{key}")
    elif isinstance(other, list):
        assert len(one) == len(other), place
        for number, value in enumerate(other):
            assert_close(one[number], value, f"{place}/{number}")
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=TOLERANCE), place
    else:
        assert states_equal(one, other), (place, one, other)


def assert_same_run(one: Path, other: Path) -> None:
    """Compare rows of metrics, weights, average, optimizer and masks of two runs."""
    rows = [without_timings(read_metrics(path / "metrics.jsonl")) for path in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert [row["lr"] for row in rows[0]] == [row["lr"] for row in rows[1]]
    assert_close(*rows)
    states = [final_state(path) for path in (one, other)]
    for part in ("model", "ema", "optimizer", "sparsity", "skipped", "progress"):
        assert_close(states[0][part], states[1][part], part)


def assert_same_steps(one: Path, other: Path) -> None:
    """Compare images and losses of every step, also of those that were repeated."""
    expected = {step: value for (step, _), value in seen(other).items()}
    found = seen(one)
    assert len(expected) == STEPS == len({step for step, _ in found})
    for (step, processes), (images, loss) in found.items():
        assert len(images) == BATCH and images == expected[step][0], (step, processes)
        assert loss == pytest.approx(expected[step][1], rel=TOLERANCE), (step, processes)


@pytest.mark.parametrize("kind", ["sparse", "group norm"])
def test_two_processes_train_like_one(folder: Path, kind: str) -> None:
    assert_same_steps(folder / f"{kind} 2", folder / f"{kind} 1")
    assert_same_run(folder / f"{kind} 2", folder / f"{kind} 1")


@pytest.mark.slow
def test_two_processes_train_like_one_without_sparsity(slow_folder: Path) -> None:
    assert_same_steps(slow_folder / "batch norm 2", slow_folder / "batch norm 1")
    assert_same_run(slow_folder / "batch norm 2", slow_folder / "batch norm 1")


def assert_changes_do_not_matter(folder: Path, kind: str) -> None:
    name = f"{kind} changing"
    alone, together = ({step for step, processes in seen(folder / name) if processes == size} for size in (1, 2))
    first, second = min(alone), min(together - set(range(STOPS[0])))
    assert first in RESUMED[0] and second in RESUMED[1]
    assert alone == set(range(first, STOPS[1])) and together == {*range(STOPS[0]), *range(second, STEPS)}
    for size in (1, 2):
        assert_same_steps(folder / name, folder / f"{kind} {size}")
        assert_same_run(folder / name, folder / f"{kind} {size}")


def test_the_number_of_processes_may_change_on_resuming(folder: Path) -> None:
    assert_changes_do_not_matter(folder, "sparse")
    masks = final_state(folder / "sparse changing")["sparsity"]["state"]["masks"]
    assert masks and not all(mask.all() for mask in masks.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batch norm", "group norm"])
def test_the_number_of_processes_of_dense_runs_may_change(slow_folder: Path, kind: str) -> None:
    assert_changes_do_not_matter(slow_folder, kind)


@pytest.mark.parametrize("kind", ["sparse", "group norm"])
def test_held_out_images_that_cannot_be_shared_equally_count_once(folder: Path, kind: str) -> None:
    rows = [read_metrics(folder / f"{kind} {size}" / "metrics.jsonl") for size in (1, 2)]
    evaluations = [[row for row in part if "val_images" in row] for part in rows]
    assert [len(part) for part in evaluations] == [2, 2]
    for one, two in zip(*evaluations, strict=True):
        for prefix in ("", "ema_"):
            assert one[f"{prefix}val_images"] == two[f"{prefix}val_images"] == KINDS[kind][2]
            assert one[f"{prefix}val_top1"] == two[f"{prefix}val_top1"]
            assert one[f"{prefix}val_loss"] == pytest.approx(two[f"{prefix}val_loss"], rel=TOLERANCE)


def test_two_processes_train_another_task_like_one(folder: Path) -> None:
    assert_same_run(folder / "tracks 2", folder / "tracks 1")
    assert {row["val_tracks"] for row in read_metrics(folder / "tracks 2/metrics.jsonl") if "val_tracks" in row} == {11}


def test_sums_of_an_evaluation_are_exchanged_by_the_hosts() -> None:
    """A process without images has its sums on the host; if the others sent theirs from a GPU, all would wait forever."""

    class OnDevice(Tensor):
        def cpu(self, *_: Any) -> Tensor:
            return torch.tensor([1.0, 2.0, 3.0, 4.0])

    accuracy = Accuracy()
    accuracy._sums = torch.zeros(4).as_subclass(OnDevice)
    accuracy.reduce(Processes())
    assert accuracy.result() == {"val_top1": 25.0, "val_top5": 50.0, "val_loss": 0.75, "val_images": 4}


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_restarts_a_run_whose_processes_are_killed(tmp_path: Path) -> None:
    """In each of three starts, one process is killed; the fourth one completes the run, bit for bit."""
    run(tmp_path, "sparse 2")
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(len(KILLS)), "--monitor-interval", "0.1"]
    program = ["-m", "tests.engine.elastic_program", str(tmp_path), "torchrun"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *program]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "torchrun.kills").read_text() == "".join(f"{step} {rank}\n" for step, rank in KILLS)
    states = [final_state(tmp_path / name) for name in ("torchrun", "sparse 2")]
    assert states_equal(*states)
    rows = [without_timings(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("torchrun", "sparse 2")]
    assert rows[0] == rows[1]
