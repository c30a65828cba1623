"""Two gloo processes: what they exchange, how they train, and what happens when one is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.forked import free_ports
from tests.engine.nonfinite_program import check, short_cases
from tests.engine.process_program import TIMEOUT_S
from torch import nn

from widekernel.cli.main import main
from widekernel.engine import distributed
from widekernel.engine.heartbeat import GRACE_S
from widekernel.engine.joining import joined_processes
from widekernel.engine.joining_limit import joining_within
from widekernel.engine.process_environment import RUN_ID, ProcessEnvironment, read_environment, refuse_several
from widekernel.engine.processes import Processes, refuse_sharded
from widekernel.engine.synced_norms import SyncedBatchNorm, SyncedBatchNormAct, convert_batch_norms
from widekernel.errors import ConfigError
from widekernel.launch import local
from widekernel.layers import NativeBatchNorm2d
from widekernel.layers.norms import affine_of, is_foldable

PLACE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all scenarios of `process_program`, and return the folder with their files."""
    folder = tmp_path_factory.mktemp("processes")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.engine.process_program", str(folder)]
    subprocess.run(command, check=True, cwd=root, env=environment, timeout=120)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def values(folder: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the two processes computed, by rank."""
    assert report["values"]["codes"] == {"0": 0, "1": 0}, (folder / "values.0").read_text()
    return [json.loads((folder / f"values.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_exchanges(values: list, rank: int) -> None:
    assert values[rank]["exchanges"] == {
        "sum": [2.0],
        "unchanged": [0.5 + rank],
        "mean": 0.5,
        "largest": [1, 0],
        "any": [True, False],
        "votes": [False, True],
        "union": ["common", "of 0", "of 1"],
        "broadcast": "from 0",
        "gather": [0, 1],
        "finite": [False, True],
        # Process 1 votes after step 1, all know it after step 2, and four steps made four exchanges.
        "carried": [[[True, True], False], [[True, True], False], [[True, True], True], [[True, False], False], 4, False],
        "from_main": "made by 0",
        "shard": [rank, 2],
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_process_0_is_raised_in_all(values: list, rank: int) -> None:
    errors = values[rank]["errors"]
    assert errors["data"] == "DataError: no images"
    assert errors["picky"] == ("PickyError: a and b" if rank == 0 else "WidekernelError: a and b")
    assert errors["other"] == "OSError: [Errno 28] No space left"
    assert errors["unsendable"] != "none"


def test_gradients_are_averaged(values: list) -> None:
    first = values[0]["gradients"]
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["close"] == [True] * 6  # of eight parameters, the two of the last layer are frozen
    assert first["unsynced_differs"] == 2
    assert "process 1" in first["differing"] and "0.weight" in first["differing"]
    assert first["digests"][0] == first["digests"][1]


@pytest.mark.parametrize("rank", [0, 1])
def test_buffers_are_copied_and_compared(values: list, rank: int) -> None:
    found = values[rank]["buffers"]
    assert "2 of 12 tensors of process 1, the first of them mask" in found["unequal"]
    assert found["mean"] == [1.0] * 4 and found["mask"] == [True] * 5
    assert found["frozen"] is True
    assert "another network" in found["other"] and "(3, 2)" in found["other"]


@pytest.mark.parametrize("rank", [0, 1])
def test_batch_norms_are_those_of_one_process_with_all_images(values: list, rank: int) -> None:
    cases = [*values[rank]["norms"], values[rank]["cumulative"]]
    assert len(cases) == 4
    for case in cases:
        assert case["kind"] == "SyncedBatchNorm" and case["keys"]
        assert len(case["largest"]) == 10
        assert max(case["largest"].values()) < 1e-10
    assert "more than 1 value per channel" in values[rank]["one value"]


@pytest.mark.parametrize("name", short_cases())
def test_all_processes_decide_the_same_about_values_that_are_not_finite(name: str, folder: Path, report: dict) -> None:
    assert report["nonfinite"]["codes"] == {"0": 0, "1": 0}, (folder / "nonfinite.0").read_text()
    check(name, [json.loads((folder / f"nonfinite.{rank}.json").read_text()) for rank in range(2)])


def test_long_computations_are_no_loss(report: dict) -> None:
    assert report["busy"]["codes"] == {"0": 0, "1": 0}


def test_a_save_is_completed_after_others_have_stopped(folder: Path, report: dict) -> None:
    assert report["unequal_ends"]["codes"] == {"0": 143, "1": 143}
    assert (folder / "unequal_ends.0").read_text() == "saved\n"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("kill", ""),
        ("stop", "has been stopped (SIGSTOP)"),
        ("raise", "ended with an error; last seen at step 3, training step 4: DataError: broken image"),
    ],
)
def test_the_lost_process_is_named(folder: Path, report: dict, fault: str, text: str, victim: int) -> None:
    found, other = report[f"{fault}-{victim}"], str(1 - victim)
    message = (folder / f"{fault}-{victim}.{other}").read_text()
    assert f"Process {victim} (rank {victim}, host " in message and f"pid {found['pids'][victim]})" in message
    assert "last seen at step 3, training step 4" in message and text in message
    assert found["codes"][other] > 0
    # Each of these processes also had to start, and to share two cores with 17 others, so the limit is generous.
    assert found["seconds"][other] < TIMEOUT_S + GRACE_S + 7


def test_without_an_environment_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "node7")  # cluster profiles set it for every job
    model = nn.Linear(2, 2)
    with joined_processes("cpu") as processes:
        assert type(processes) is Processes and processes.is_main
        assert processes.wrap(model) is model and convert_batch_norms(model, processes) is model
        processes.equalize(model)
        processes.require_equal(model)
        processes.note(1, "training step 2")
        assert processes.gather(3) == [3] and processes.vote(True)() is True
        assert processes.from_main(lambda: 4) == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"LOCAL_RANK": "", "MASTER_PORT": ""}, "not LOCAL_RANK, MASTER_PORT"),
        ({"RANK": ""}, "not RANK"),
        ({"RANK": "2"}, "less than WORLD_SIZE"),
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"MASTER_PORT": "99999"}, "1 to 65535"),
    ],
)
def test_incomplete_environments(change: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_environment({**PLACE, **change})


def test_joining_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process 0 that is stopped while others join keeps its connections, on which they wait without a limit."""
    ended, codes, texts = threading.Event(), [], []
    monkeypatch.setattr("os._exit", lambda code: (codes.append(code), ended.set()))
    with joining_within(30, "nobody", texts.append):
        pass
    with joining_within(0.01, "process 0 at host:1", texts.append):
        assert ended.wait(20)
    assert codes == [75] and len(texts) == 1 and "within 0 s: process 0 at host:1 does not answer" in texts[0]


def test_runs_at_the_same_port_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers may have found the same port free; only one of them gets it, and must not be disturbed."""
    first, second = (ProcessEnvironment(rank, 2, rank, 2, "127.0.0.1", next(free_ports())) for rank in (0, 1))
    monkeypatch.setenv(RUN_ID, "first")
    own = distributed._meet(first)
    own.set("sign/1", "own")
    monkeypatch.setenv(RUN_ID, "second")
    foreign = distributed._meet(replace(second, port=first.port))
    foreign.set("sign/1", "foreign")
    assert (own.get("sign/1"), foreign.get("sign/1")) == (b"own", b"foreign")
    runs = [local.environments(2, {}) for _ in range(2)]
    assert runs[0][0][RUN_ID] == runs[0][1][RUN_ID] != runs[1][0][RUN_ID]


@pytest.mark.parametrize("command", ["sparsify", "fold", "bench", "tune", "demo"])
def test_other_commands_refuse_several_processes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    assert main([command]) == 2
    assert f"`widekernel {command}` runs in one process, but" in capsys.readouterr().err
    refuse_several(command, {**PLACE, "WORLD_SIZE": "1"})
    refuse_several(command, {"WORLD_SIZE": "4"})  # set by a cluster's profile


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    place = read_environment({**PLACE, "LOCAL_WORLD_SIZE": "4"})
    assert place is not None and place.device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert place.device("auto") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="local number"):
        place.device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match="4 processes on this machine, but only 3"):
        place.device("cuda")


def test_folding_sees_a_batch_norm() -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.normal_()
    synced = SyncedBatchNorm(norm, Processes())
    assert is_foldable(synced)
    for a, b in zip(affine_of(synced, 3), affine_of(norm, 3)):
        assert torch.equal(a, b)
    assert type(synced).__mro__[1] is nn.modules.batchnorm._BatchNorm
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(synced(x), norm(x))


def test_norms_that_cannot_be_synchronized_are_refused() -> None:
    from timm.layers import BatchNormAct2d

    class Shifted(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    several = Processes(0, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match="Shifted is not a plain batch norm"):
        convert_batch_norms(nn.Sequential(Shifted(2)), several)
    hooked = nn.Sequential(nn.BatchNorm2d(2))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="forward hook"):
        convert_batch_norms(hooked, several)
    shared = nn.BatchNorm2d(2)
    accelerated = NativeBatchNorm2d(2)
    network = nn.Sequential(shared, BatchNormAct2d(2), shared, nn.ModuleDict({"a": nn.BatchNorm1d(2)}), accelerated)
    keys = list(network.state_dict())
    converted = convert_batch_norms(network, several)
    assert converted[0] is converted[2] and list(converted.state_dict()) == keys
    assert type(converted[4]) is SyncedBatchNorm and converted[4].weight is accelerated.weight
    assert type(converted[1]) is SyncedBatchNormAct and not is_foldable(converted[1])
    x = torch.randn(2, 2, 3, 3)
    assert converted.eval()[1](x).min() == 0  # its ReLU


def test_sharded_parameters_are_refused() -> None:
    class DTensor(torch.Tensor): ...

    network = nn.Linear(2, 2)
    refuse_sharded(network, "it is whole")
    network.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(DTensor))
    with pytest.raises(ConfigError, match=r"weight is divided among processes.*but sums need all of it"):
        refuse_sharded(network, "sums need all of it")
