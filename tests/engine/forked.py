"""Groups of processes forked from one that has imported everything, each a rank of its group.

Run as a program of its own, which has computed nothing yet: OpenMP's threads do not survive a fork.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

Scenario = Callable[[], object]


@dataclass
class Group:
    """Processes of one scenario.

    Args:
        name: name of the scenario
        pids: process numbers by rank
        codes: exit codes by rank, of those that have ended; negative for signals
        ended: times at which they ended, by rank
    """

    name: str
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)

    def reap(self) -> bool:
        """Note who has ended; return whether all have."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(found[1])
                self.ended[rank] = time.time()
        return len(self.codes) == len(self.pids)

    def wait(self, limit_s: float) -> list[int]:
        """Wait until all have ended, and return the ranks that had to be killed after `limit_s`."""
        deadline = time.time() + limit_s
        while not self.reap() and time.time() < deadline:
            time.sleep(0.01)
        late = [rank for rank in range(len(self.pids)) if rank not in self.codes]
        for rank in late:
            os.kill(self.pids[rank], signal.SIGKILL)
        while not self.reap():
            time.sleep(0.01)
        return late


def free_ports() -> Iterator[int]:
    """Yield ports that are free now, each once."""
    for port in range(31000 + os.getpid() % 1000, 32767):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def start(name: str, scenario: Scenario, world_size: int, folder: Path, port: int) -> Group:
    """Fork the processes of a scenario, whose output goes to `folder`/NAME.RANK; each exits like the main program."""
    gc.freeze()  # else each process, when it exits, takes a second to collect what was imported
    pids = []
    for rank in range(world_size):
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        log = os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        torch.set_num_threads(1)
        scenario()
        sys.exit(0)
    return Group(name, pids)
