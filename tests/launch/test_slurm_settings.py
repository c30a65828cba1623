"""Settings of cluster jobs, and how the command line takes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.tasks.images import make_images
from widekernel.cli import train as command
from widekernel.cli.main import main
from widekernel.engine.process_environment import read_environment
from widekernel.errors import ConfigError
from widekernel.launch.restarts import Starts, claim_restart, may_restart, newest_step, note_start, read_starts
from widekernel.launch.slurm_config import SlurmConfig
from widekernel.launch.task import IN_A_TASK, TORCHRUN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 0}, "slurm.nodes is 0, but must be a whole number, at least 1"),
        ({"gpus": -1}, "slurm.gpus is -1, but must be a whole number, at least 0"),
        ({"processes": 2}, r"slurm.processes is 2, but each of the slurm.gpus \(1\) .*set slurm.gpus to 0"),
        ({"cpus_per_gpu": 0}, "slurm.cpus_per_gpu is 0"),
        ({"memory": 0.0}, "slurm.memory is 0.0, but must be positive"),
        ({"memory": float("inf")}, "slurm.memory is inf, but must be finite"),
        ({"hours": 0}, "slurm.hours is 0, but must be positive"),
        ({"hours": 0.01}, "slurm.signal_seconds is 120, but must be from 1 to 59: shorter than the time limit of 60 s"),
        ({"signal_seconds": 0}, "slurm.signal_seconds is 0"),
        ({"signal_seconds": 70000}, "slurm.signal_seconds is 70000, but must be from 1 to 65535"),
        ({"max_restarts": -1}, "slurm.max_restarts is -1"),
        ({"cluster": "locl"}, "slurm.cluster 'locl' is unknown.*Did you mean 'local'"),
        ({"cluster": "local", "nodes": 2}, "slurm.nodes is 2, but slurm.cluster local is this machine alone"),
        ({"cluster": "local", "setup": ("x",)}, "slurm.setup is set, but slurm.cluster local"),
        ({"sbatch": {"time": 5}}, "slurm.sbatch holds 'time'; set slurm.hours instead"),
        ({"sbatch": {"gpus_per_node": 5}}, "slurm.sbatch holds 'gpus_per_node'; set slurm.gpus instead"),
        ({"sbatch": {"open-mode": "truncate"}}, "on which logs and restarts depend; remove it"),
        ({"sbatch": {"--exclude": "a"}}, "slurm.sbatch holds '--exclude'; use the long name"),
        ({"sbatch": {"exclude": ["a"]}}, r"slurm.sbatch.exclude is \['a'\], but must be text, a number, or true"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlurmConfig(**settings)


def test_the_time_limit_is_never_shorter_than_asked() -> None:
    assert SlurmConfig(hours=72).minutes == 4320
    assert SlurmConfig(hours=0.09).minutes == 6
    assert SlurmConfig(hours=0.001, signal_seconds=5).minutes == 1


def test_settings_come_from_files_and_the_command_line(tmp_path: Path) -> None:
    assert command.parse_slurm(["--model.name", "slak_nano"]) is None
    file = tmp_path / "cluster.yaml"
    file.write_text("slurm: {nodes: 4, partition: P, sbatch: {exclude: 'node[1-3]'}, setup: [module load cuda]}\n")
    job = command.parse_slurm(["--config", str(file), "--slurm.nodes", "2", "--slurm.sbatch.reservation", "R"])
    assert job == SlurmConfig(
        nodes=2, partition="P", sbatch={"exclude": "node[1-3]", "reservation": "R"}, setup=("module load cuda",)
    )
    plain = command.parse_config([])
    assert command.parse_config(["--config", str(file)]) == plain and "slurm" not in plain.to_dict()
    with pytest.raises(ConfigError, match=r"no option --slurm.node\. Did you mean '--slurm.nodes'"):
        command.parse_slurm(["--slurm.node", "3"])


def test_the_command_submits_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class Submitted:
        def describe(self) -> str:
            return "submitted"

    calls: list[tuple] = []
    monkeypatch.setattr(command, "submit", lambda *call: calls.append(call) or Submitted())
    images, run = make_images(tmp_path / "images"), tmp_path / "run"
    model = ["--model.name", "slak_nano", "--model.args.depths", "[1,1,1,1]", "--model.args.dims", "[8,8,16,16]"]
    data = ["--data.root", str(images), "--data.input_size", "32", "--data.workers", "0", "--loop.batch_size", "8"]
    length = ["--schedule.epochs", "1", "--schedule.warmup_epochs", "0", "--loop.device", "cpu", "--output", str(run)]
    arguments = [*model, *data, *length, "--slurm.nodes", "2", "--slurm.partition", "P"]
    assert main(["train", *arguments]) == 0
    assert capsys.readouterr().out == "submitted\n"
    assert main(["train", *arguments, "--processes", "2"]) == 2
    assert "--processes is 2, but a cluster job starts its processes itself" in capsys.readouterr().err
    assert calls == [(SlurmConfig(nodes=2, partition="P"), [sys.executable, "-m", "widekernel", "train", *arguments], run)]

    # in a job, the same command trains
    monkeypatch.setenv(IN_A_TASK, "1")
    assert main(["train", *arguments]) == 0
    assert len(calls) == 1 and (run / "summary.json").exists()
    monkeypatch.delenv(IN_A_TASK)
    capsys.readouterr()
    assert main(["train", *arguments]) == 0
    assert len(calls) == 1 and "is already finished; no job was submitted" in " ".join(capsys.readouterr().out.split())

    # a run with other settings is refused before it waits in the queue
    assert main(["train", *arguments, "--seed", "3"]) == 2
    assert len(calls) == 1 and "seed: 0 there, 3 now" in capsys.readouterr().err


def test_in_an_interactive_shell_of_a_job_the_command_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`salloc` sets SLURM's variables, but nobody has started the other processes."""
    inside = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NNODES": "2"}
    for name, value in inside.items():
        monkeypatch.setenv(name, value)
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert command.parse_slurm([]) is None
    assert read_environment() is None


def test_starts_are_counted_per_job(tmp_path: Path) -> None:
    states = tmp_path / "checkpoints"
    assert newest_step(tmp_path) == -1
    assert note_start(tmp_path, "7") == Starts("7", 1, -1, 0)
    states.mkdir()
    for name in ("step-00000009.pt", "step-00000010.pt.tmp.5", "step-00000020.pt.damaged", "step-00000030.pt.sha256"):
        (states / name).touch()
    assert newest_step(tmp_path) == 9
    assert note_start(tmp_path, "7") == Starts("7", 2, 9, 0)
    third = note_start(tmp_path, "7")
    assert third == Starts("7", 3, 9, 1) == read_starts(tmp_path, "7")
    assert may_restart(tmp_path, third, 2) and not may_restart(tmp_path, third, 1)
    assert claim_restart(tmp_path, third) and not claim_restart(tmp_path, third)
    (states / "step-00000011.pt").touch()
    assert may_restart(tmp_path, third, 0)
    assert note_start(tmp_path, "8") == Starts("8", 1, 11, 0) and read_starts(tmp_path, "7") is None
    assert [path.name for path in (tmp_path / "slurm").iterdir()] == ["restarts.json"]


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"job": "7"}), "{"])
def test_a_damaged_count_starts_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "restarts.json").write_text(content)
    assert read_starts(tmp_path, "7") is None
    assert note_start(tmp_path, "7").starts == 1
