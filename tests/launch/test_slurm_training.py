"""A real training as a job that is preempted, starts again by itself, and ends with the weights of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.engine.tiny import without_timings
from tests.launch.fake_slurm import tasks_of
from tests.tasks.images import make_images
from widekernel.cli.train import parse_slurm
from widekernel.engine.metrics_log import read_metrics
from widekernel.launch.restarts import newest_step, read_starts
from widekernel.launch.slurm import submit

pytest.importorskip("submitit")
pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finding the processes of a job needs /proc"),
]

SETTINGS = """
model: {name: slak_nano, args: {depths: [1, 1, 1, 1], dims: [8, 8, 16, 16]}}
data: {root: IMAGES, input_size: 32, workers: 0}
schedule: {epochs: 2, warmup_epochs: 0}
ema: {decay: 0.8}
loop: {batch_size: 4, device: cpu, log_every: 1}
sparsity: {method: dynamic, dynamic: {sparsity: 0.4, update_interval: 3}}
slurm: {cluster: local, gpus: 0, processes: PROCESSES, hours: 1, signal_seconds: 60}
"""
COMMAND = [sys.executable, "-m", "widekernel", "train"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_preempted_job_ends_with_the_same_weights(processes: int, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    settings = SETTINGS.replace("IMAGES", str(make_images(tmp_path / "images")))
    file.write_text(settings.replace("PROCESSES", str(processes)))
    run, reference = tmp_path / "run", tmp_path / "reference"
    config = parse_slurm(["--config", str(file)])
    assert config is not None
    job = submit(config, [*COMMAND, "--config", str(file), "--output", str(run)], run)
    undisturbed = submit(config, [*COMMAND, "--config", str(file), "--output", str(reference)], reference)
    end = time.monotonic() + 120
    while newest_step(run) < 1:
        assert time.monotonic() < end and not job.job.done(), job.log.read_text()
        time.sleep(0.001)
    os.kill(tasks_of(int(job.number))[-1], signal.SIGUSR2)  # only one of the processes
    assert job.follow(lambda _: None, seconds=0.1), job.log.read_text()
    assert undisturbed.follow(lambda _: None, seconds=0.1), undisturbed.log.read_text()

    record, once = read_starts(run, job.number), read_starts(reference, undisturbed.number)
    assert record is not None and once is not None and (record.starts, once.starts) == (2, 1)
    text = job.log.read_text()
    assert "Stopped by SIGUSR2; the state is saved." in text and "The job starts again." in text
    assert f"Resuming {run} after step {record.step} of 8." in text and record.step >= 1
    for name in ("model.safetensors", "model_ema.safetensors", "masks.safetensors"):
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    rows = [without_timings(read_metrics(folder / "metrics.jsonl")) for folder in (run, reference)]
    assert rows[0] == rows[1]
    assert json.loads((run / "summary.json").read_text())["step"] == 8
