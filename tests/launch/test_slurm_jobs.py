"""Jobs of a cluster of one machine: what they tell their processes, and when they are requeued."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.fake_slurm import JOB, FakeSlurm, options, tasks_of
from widekernel.launch.restarts import newest_step, read_starts
from widekernel.launch.slurm import SubmissionError, SubmittedJob, submit
from widekernel.launch.slurm_config import SlurmConfig
from widekernel.launch.task import LOCAL_STARTS, Outcome, outcome

pytest.importorskip("submitit")
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the cluster of one machine needs /proc")

STUB = Path(__file__).with_name("stub_training.py")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    cluster = FakeSlurm(tmp_path / "cluster")
    monkeypatch.setenv("PATH", f"{cluster.install()}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(cluster.folder))
    return cluster


def start(run: Path, *stub: object, **settings: object) -> SubmittedJob:
    config = SlurmConfig(**{"gpus": 0, "processes": 2, "cpus_per_gpu": 1, "hours": 1, **settings})
    return submit(config, [sys.executable, "-S", str(STUB), str(run), *map(str, stub)], run)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def starts(run: Path, rank: int = 0) -> list[dict]:
    path = run / f"starts-{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def log(run: Path, rank: int = 0) -> str:
    return (run / "slurm" / f"{JOB}_{rank}_log.out").read_text()


# -- what is submitted -----------------------------------------------------------------------------------------------


def test_the_file_for_sbatch(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLURM_HOLDS", "1")
    settings = {"nodes": 4, "gpus": 8, "processes": 1, "cpus_per_gpu": 6, "memory": 480.5, "partition": "P", "hours": 72}
    more = {"account": "A", "qos": "Q", "constraint": "h100", "comment": "a 'b'", "signal_seconds": 300}
    job = start(tmp_path / "run", 5, **settings, **more, setup=("module load cuda",), sbatch={"exclude": "node[1-3]"})
    assert job.number == JOB and job.log == tmp_path / "run" / "slurm" / f"{JOB}_0_log.out"
    script = Path(slurm.get("script"))
    given = options(script)
    expected = {
        "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "6", "mem": "492032MB",
        "partition": "P", "account": "A", "qos": "Q", "constraint": "h100", "comment": "a 'b'", "exclude": "node[1-3]",
        "time": "4320", "signal": "USR2@300", "job-name": "widekernel run", "open-mode": "append", "requeue": "",
        "output": str(tmp_path / "run" / "slurm" / "%j_0_log.out"), "wckey": "submitit",
    }  # fmt: skip
    assert given == expected
    lines = script.read_text().splitlines()
    command = next(number for number, line in enumerate(lines) if line.startswith("srun"))
    assert lines.index("module load cuda") < command
    assert "--kill-on-bad-exit=1" in lines[command] and lines[command].endswith(str(tmp_path / "run" / "slurm"))
    assert f"scancel {JOB}" in job.describe() and "4 node(s) with 8 process(es) each, for 72 hours" in job.describe()


def test_a_job_stores_plain_values_only(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a job in the queue could not start after an update of the package."""
    monkeypatch.setenv("FAKE_SLURM_HOLDS", "1")
    job = start(tmp_path / "run", 5)
    named = []

    class Names(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            named.append((module, name))
            return super().find_class(module, name)

    with job.job.paths.submitted_pickle.open("rb") as file:
        stored = Names(file).load()
    assert named == [("submitit.core.utils", "DelayedSubmission"), ("widekernel_command", "run_task")]
    command = [sys.executable, "-S", str(STUB), str(tmp_path / "run"), "5"]
    assert stored.args == (
        {"command": command, "directory": str(Path.cwd()), "run_folder": str(tmp_path / "run"), "max_restarts": 3},
    )


def test_without_gpus_none_are_requested(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLURM_HOLDS", "1")
    start(tmp_path / "run", 5, processes=3, cpus_per_gpu=None)
    given = options(Path(slurm.get("script")))
    assert given["ntasks-per-node"] == "3" and not {"gpus-per-node", "cpus-per-task", "mem"} & given.keys()


def test_what_prevents_a_submission(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLURM_REFUSES", "1")
    with pytest.raises(SubmissionError, match=r"sbatch refused the job: .*invalid partition specified: nowhere"):
        start(tmp_path / "run", 5)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SubmissionError, match=r"has no sbatch and no srun.* on a login node"):
        start(tmp_path / "run", 5)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SubmissionError, match=r"pip install 'widekernel\[slurm\]'"):
        start(tmp_path / "run", 5)


# -- what a job does -------------------------------------------------------------------------------------------------


def test_processes_get_the_variables_of_torchrun(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLURM_NODES", "gpu[07-08],other3")
    monkeypatch.setenv("RANK", "9")  # of the process that submits
    run = tmp_path / "run"
    job = start(run, 2, nodes=2)
    shown: list[str] = []
    assert job.follow(shown.append, seconds=0.05)
    assert slurm.wait() == "COMPLETED" and slurm.calls == []
    assert "".join(shown) == log(run) and "Process 0 of 4 has finished" in log(run)
    first = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07", "MASTER_PORT": str(15000 + int(JOB))}
    for rank in range(4):
        ((variables),) = starts(run, rank)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WIDEKERNEL_SLURM_TASK": "1"}
        assert {**variables, "step": 0} == {"step": 0, "cwd": str(Path.cwd()), **first, **place}


@pytest.mark.dist
def test_a_single_process_is_no_process_group(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    start(tmp_path / "run", 2, processes=1)
    assert slurm.wait() == "COMPLETED"
    ((variables),) = starts(tmp_path / "run")
    assert variables["WORLD_SIZE"] is None and variables["RANK"] is None and variables["WIDEKERNEL_SLURM_TASK"] == "1"


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(None, id="all", marks=pytest.mark.dist),
        pytest.param([0], id="the first", marks=pytest.mark.dist),
        pytest.param([0, 1, 0], id="the first twice"),
    ],
)
def test_a_job_at_its_time_limit_saves_and_is_requeued_once(
    slurm: FakeSlurm, tmp_path: Path, ranks: list[int] | None
) -> None:
    run = tmp_path / "run"
    start(run, 40)
    until(lambda: newest_step(run) >= 5)
    slurm.signal(signal.SIGUSR2, ranks)
    until(lambda: len(starts(run)) == 2)
    assert slurm.calls == [f"scontrol show job {JOB}", f"scontrol requeue {JOB}"]
    saved = int((run / "saved").read_text())
    assert starts(run)[1]["step"] == saved >= 5  # the state was complete when the job started again
    assert slurm.wait() == "COMPLETED" and slurm.requeues == 1
    assert (run / "finished-0").exists() and (run / "finished-1").exists()
    record = read_starts(run, JOB)
    assert record is not None and (record.starts, record.step, record.without_progress) == (2, saved, 0)


@pytest.mark.dist
def test_a_signal_before_the_command_starts_is_not_lost(slurm: FakeSlurm, tmp_path: Path) -> None:
    """Until the command catches signals, they end it, and the job is requeued without a state."""
    run = tmp_path / "run"
    start(run, 5, processes=1)
    until(slurm.tasks)
    (task,) = slurm.tasks()
    until(lambda: (run / "slurm" / "restarts.json").exists())
    os.kill(task, signal.SIGUSR1)
    assert slurm.wait() == "COMPLETED" and slurm.requeues == 1


def test_a_canceled_job_saves_and_stays_canceled(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 1000)
    until(lambda: newest_step(run) >= 5)
    assert os.system(f"scancel {JOB}") == 0
    assert slurm.wait() == "CANCELLED" and slurm.requeues == 0
    assert int((run / "saved").read_text()) == newest_step(run)
    assert "was stopped on request" in log(run)


@pytest.mark.dist
def test_a_job_canceled_at_its_time_limit_stays_canceled(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 1000)
    until(lambda: newest_step(run) >= 5)
    slurm.signal(signal.SIGUSR2)
    assert os.system(f"scancel {JOB}") == 0
    assert slurm.wait() == "CANCELLED" and slurm.requeues == 0
    assert "not requeued, because its state is COMPLETING" in log(run)


@pytest.mark.dist
def test_a_preemption_that_sigterm_announces_requeues_the_job(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 40)
    until(lambda: newest_step(run) >= 5)
    slurm.put("preempted", "2026-01-01T00:00:00")
    slurm.signal(signal.SIGTERM)
    until(lambda: len(starts(run)) == 2)
    slurm.put("preempted", "None")
    assert slurm.wait() == "COMPLETED" and slurm.requeues == 1


def test_a_job_without_progress_is_given_up(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 60, "crash=3", "idle", max_restarts=1)
    assert slurm.wait() == "FAILED"
    assert slurm.requeues == 1 and len(starts(run)) == 2
    assert "The job is given up: its last 2 starts saved no new training state (slurm.max_restarts is 1)" in log(run)


@pytest.mark.dist
def test_progress_allows_further_restarts(slurm: FakeSlurm, tmp_path: Path) -> None:
    """The run crashes at step 5, 3 and 3: only the last two starts make no progress."""
    run = tmp_path / "run"
    start(run, 60, "crash=5", max_restarts=1)
    assert slurm.wait() == "FAILED"
    assert slurm.requeues == 2 and [line["step"] for line in starts(run)] == [0, 4, 4]


@pytest.mark.dist
def test_one_crashed_process_restarts_the_job_once(slurm: FakeSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, 60, "crash1=5", max_restarts=0)
    until(lambda: slurm.requeues == 1)
    assert "has crashed (exit code -9)" in log(run, 1)
    (run / "checkpoints" / "step-00000050.pt").touch()  # past the step of the crash
    assert slurm.wait() == "COMPLETED" and slurm.requeues == 1


@pytest.mark.dist
def test_an_expected_error_is_not_repeated(slurm: FakeSlurm, tmp_path: Path) -> None:
    start(tmp_path / "run", 60, "fail=2")
    assert slurm.wait() == "FAILED" and slurm.calls == []
    assert "an error that a restart would repeat (exit code 2)" in log(tmp_path / "run")


@pytest.mark.dist
def test_a_requeue_that_fails_is_reported(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.put("requeue fails", "1")
    run = tmp_path / "run"
    job = start(run, 40)
    until(lambda: newest_step(run) >= 5)
    slurm.signal(signal.SIGUSR1)
    assert slurm.wait() == "FAILED" and not job.follow(lambda _: None, seconds=0.05)
    assert "`scontrol requeue 4242` failed: slurm_requeue error: Requested operation is presently disabled" in log(run)


@pytest.mark.parametrize(
    ("code", "received", "expected"),
    [
        (0, {signal.SIGUSR2}, Outcome.FINISHED),
        (128 + signal.SIGUSR2, set(), Outcome.PREEMPTED),  # only another process was signaled
        (-signal.SIGUSR1, {signal.SIGUSR1}, Outcome.PREEMPTED),
        (128 + signal.SIGTERM, {signal.SIGTERM, signal.SIGUSR2}, Outcome.PREEMPTED),
        (128 + signal.SIGTERM, {signal.SIGTERM}, Outcome.STOPPED),
        (128 + signal.SIGINT, {signal.SIGINT}, Outcome.STOPPED),
        (2, set(), Outcome.REFUSED),
        (1, {signal.SIGUSR2}, Outcome.CRASHED),
        (-signal.SIGKILL, set(), Outcome.CRASHED),
        (75, set(), Outcome.CRASHED),  # another process was lost
        (75, {signal.SIGTERM}, Outcome.STOPPED),  # ... because the job was canceled
    ],
)
def test_outcomes(code: int, received: set[int], expected: Outcome) -> None:
    assert outcome(code, received) is expected


# -- without SLURM ---------------------------------------------------------------------------------------------------


def local_task(job: SubmittedJob) -> int:
    """Return the process of the first task of a local job."""
    return tasks_of(int(job.number))[0]


def test_a_local_job_starts_again_by_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(run, 40, cluster="local", gpus=0)
    until(lambda: newest_step(run) >= 5)
    os.kill(local_task(job), signal.SIGUSR2)
    assert job.follow(lambda _: None, seconds=0.05)
    first, second = starts(run)
    assert second["step"] >= 5 and second["step"] == int((run / "saved").read_text())
    assert (first["WORLD_SIZE"], first["MASTER_ADDR"]) == ("2", "127.0.0.1")
    assert f"kill {job.number}" in job.describe()


@pytest.mark.dist
def test_a_killed_local_job_saves_and_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(run, 1000, cluster="local", processes=1)
    until(lambda: newest_step(run) >= 5)
    os.kill(int(job.number), signal.SIGTERM)
    assert not job.follow(lambda _: None, seconds=0.05)
    assert len(starts(run)) == 1 and int((run / "saved").read_text()) == newest_step(run)


@pytest.mark.dist
def test_a_killed_task_does_not_leave_its_command_behind(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(run, 1000, cluster="local", processes=1)
    until(lambda: newest_step(run) >= 5)
    os.kill(local_task(job), signal.SIGKILL)
    until(lambda: (run / "saved").exists())
    assert not job.follow(lambda _: None, seconds=0.05)


@pytest.mark.dist
def test_the_last_start_of_a_local_job_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(run, 60, "crash=3", "idle", cluster="local", processes=1, max_restarts=100)
    assert not job.follow(lambda _: None, seconds=0.05)
    assert len(starts(run)) == LOCAL_STARTS
    assert f"starts a job at most {LOCAL_STARTS} times" in job.log.read_text()
