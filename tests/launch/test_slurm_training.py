"""A real training as a job that is preempted, starts again by itself, and ends with the weights of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.launch.fake_slurm import tasks_of
from tests.tasks.images import make_images
from widekernel.cli.main import main
from widekernel.cli.train import parse_slurm
from widekernel.engine.metrics_log import read_metrics
from widekernel.launch.restarts import newest_step, read_starts
from widekernel.launch.slurm import submit

pytest.importorskip("submitit")
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finding the processes of a job needs /proc")

SETTINGS = """
model: {name: slak_nano, args: {depths: [1, 1, 1, 1], dims: [8, 8, 16, 16]}}
data: {root: IMAGES, input_size: 32, workers: 0}
schedule: {epochs: 2, warmup_epochs: 0}
ema: {decay: 0.8}
loop: {batch_size: 4, device: cpu, log_every: 1}
sparsity: {method: dynamic, dynamic: {sparsity: 0.4, update_interval: 3}}
slurm: {cluster: local, gpus: 0, hours: 1, signal_seconds: 60}
"""


def test_a_preempted_job_ends_with_the_same_weights(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(SETTINGS.replace("IMAGES", str(make_images(tmp_path / "images"))))
    run, reference = tmp_path / "run", tmp_path / "reference"
    arguments = ["train", "--config", str(file), "--output"]
    config = parse_slurm([*arguments[1:], str(run)])
    assert config is not None
    job = submit(config, [sys.executable, "-m", "widekernel", *arguments, str(run)], run)
    with pytest.MonkeyPatch.context() as patch:  # meanwhile, the undisturbed run
        patch.setenv("WIDEKERNEL_SLURM_TASK", "1")
        assert main([*arguments, str(reference)]) == 0
    end = time.monotonic() + 120
    while newest_step(run) < 1:
        assert time.monotonic() < end and not job.job.done()
        time.sleep(0.001)
    os.kill(tasks_of(int(job.number))[0], signal.SIGUSR2)
    assert job.follow(lambda _: None, seconds=0.1)

    record = read_starts(run, job.number)
    assert record is not None and record.starts == 2 and record.step >= 1
    text = job.log.read_text()
    assert "Stopped by SIGUSR2; the state is saved." in text and "The job starts again." in text
    assert f"Resuming {run} after step {record.step} of 8." in text
    for name in ("model.safetensors", "model_ema.safetensors", "masks.safetensors"):
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    assert read_metrics(run / "metrics.jsonl") == read_metrics(reference / "metrics.jsonl")
    assert json.loads((run / "summary.json").read_text())["step"] == 8
