"""Processes on two hosts, each a network namespace of this machine, which see each other only by a network link."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tasks.images import make_images
from widekernel.engine.metrics_log import read_metrics

EXCHANGE = """
import socket, torch
from widekernel.engine.joining import joined_processes

with joined_processes("cpu", patience_s=30) as processes:
    rank = processes.rank
    assert processes.world_size == 2
    for step in range(5):
        values = processes.sum(torch.full((1000,), float(step + rank)))
        assert torch.equal(values, torch.full((1000,), 2.0 * step + 1)), values
    assert processes.gather(f"rank {rank}") == ["rank 0", "rank 1"]
    assert processes.broadcast(rank) == 0
    model = torch.nn.Linear(300, 7)
    torch.nn.init.constant_(model.weight, float(rank))
    processes.equalize(model)
    assert model.weight.sum() == 0
    processes.require_equal(model)
print("exchanged")
"""


class Hosts:
    """Two network namespaces with a link between them.

    Args:
        name: prefix of their names
    """

    def __init__(self, name: str) -> None:
        self.names = [f"{name}a", f"{name}b"]
        self.links = [f"{name}0", f"{name}1"]
        self.addresses = ["10.213.7.1", "10.213.7.2"]

    def create(self) -> None:
        for namespace in self.names:
            ip("netns", "add", namespace)
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for namespace, link, address in zip(self.names, self.links, self.addresses):
            ip("link", "set", link, "netns", namespace)
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", namespace, "link", "set", device, "up")

    def remove(self) -> None:
        for namespace in self.names:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self.links[0]], capture_output=True, check=False)

    def start(self, rank: int, *command: str, together: bool = False) -> subprocess.Popen[str]:
        """Start process `rank` of two on its host, or both on the first; process 0 listens there."""
        host, local, size = (0, rank, 2) if together else (rank, 0, 1)
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(size)}
        meeting = {"MASTER_ADDR": self.addresses[0], "MASTER_PORT": "15042", "GLOO_SOCKET_IFNAME": self.links[host]}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *command],
            env={**os.environ, **place, **meeting},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed, which creates network namespaces")
    made = Hosts(f"wk{os.getpid() % 100000}")
    try:
        try:
            made.create()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this system allows no network namespaces: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()


def finish(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[str]:
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


@pytest.mark.dist
def test_two_hosts_exchange_values(hosts: Hosts) -> None:
    done = [hosts.start(rank, sys.executable, "-c", EXCHANGE) for rank in (0, 1)]
    # PyTorch may warn before that a host has no name.
    assert [output.splitlines()[-1] for output in finish(done)] == ["exchanged", "exchanged"]


def test_the_hosts_share_nothing_but_the_link(hosts: Hosts) -> None:
    """Otherwise the test above would show nothing: an address of the other host is no address of this one."""
    code = "import socket; socket.create_server((%r, 15043)).close()"
    for rank in (0, 1):
        own, other = (
            subprocess.run(
                ["ip", "netns", "exec", hosts.names[rank], sys.executable, "-S", "-c", code % hosts.addresses[place]],
                capture_output=True,
                text=True,
                check=False,
            )
            for place in (rank, 1 - rank)
        )
        assert own.returncode == 0 and "Cannot assign requested address" in other.stderr


@pytest.mark.dist
def test_a_training_on_two_hosts_equals_one_on_a_single_host(hosts: Hosts, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    model = ["--model.name", "slak_nano", "--model.args.depths", "[1,1,1,1]", "--model.args.dims", "[8,8,16,16]"]
    data = ["--data.root", str(images), "--data.input_size", "32", "--data.workers", "0", "--loop.batch_size", "8"]
    length = ["--schedule.epochs", "2", "--schedule.warmup_epochs", "0", "--loop.device", "cpu"]
    command = [sys.executable, "-m", "widekernel", "train", *model, *data, *length, "--output"]
    for name, together in (("apart", False), ("together", True)):
        finish([hosts.start(rank, *command, str(tmp_path / name), together=together) for rank in (0, 1)], seconds=300)
    apart, together = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("apart", "together"))
    assert apart == together
    assert len(read_metrics(tmp_path / "apart" / "metrics.jsonl")) >= 2
