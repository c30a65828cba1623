"""Settings of a job on a SLURM cluster."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from widekernel.errors import ConfigError
from widekernel.settings import require, require_finite, require_literals, require_whole

_OWN = {
    "nodes": "nodes",
    "time": "hours",
    "gpus-per-node": "gpus",
    "ntasks-per-node": "gpus or slurm.processes",
    "cpus-per-task": "cpus_per_gpu",
    "mem": "memory",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "comment": "comment",
    "signal": "signal_seconds",
}
"""Parameters of sbatch that have a setting of their own, with its name."""
_MANAGED = {"array", "error", "job-name", "no-requeue", "open-mode", "output", "requeue"}
"""Parameters of sbatch on which logs and restarts depend."""


@dataclass(frozen=True)
class SlurmConfig:
    """Settings of a job on a SLURM cluster; giving one of them submits the command instead of running it here.

    They are no part of the run's settings, so a run can be resumed with others.

    Args:
        cluster: slurm, or local to run the job on this machine without SLURM
        nodes: number of nodes
        gpus: GPUs per node, each with a process of its own; 0 means processes without a GPU
        processes: processes per node if slurm.gpus is 0
        cpus_per_gpu: CPU cores per process; null means the cluster's default
        memory: memory per node in GB; null means the cluster's default
        partition: partition; null means the cluster's default
        account: account that is charged; null means the user's default
        qos: quality of service; null means the default
        constraint: features that the nodes must have, such as h100
        comment: comment that some clusters require
        hours: time limit in hours; at the limit, the run is saved, and the job returns to the queue
        signal_seconds: seconds before the time limit at which the run is asked to save and stop
        max_restarts: restarts in a row without a new training state after which the job is given up
        setup: shell commands before the start, such as [module load cuda]
        sbatch: further parameters of sbatch, for example --slurm.sbatch.exclude node[1-3]
        follow: wait for the job, and show the log of its first process
    """

    cluster: Literal["slurm", "local"] = "slurm"
    nodes: int = 1
    gpus: int = 1
    processes: int = 1
    cpus_per_gpu: int | None = 4
    memory: float | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    comment: str | None = None
    hours: float = 24.0
    signal_seconds: int = 120
    max_restarts: int = 3
    setup: tuple[str, ...] = ()
    sbatch: dict[str, Any] = field(default_factory=dict)
    follow: bool = False

    def __post_init__(self) -> None:
        require_literals(self, "slurm")
        require_finite(self, "slurm")
        require_whole("slurm.nodes", self.nodes, 1)
        require_whole("slurm.gpus", self.gpus, 0)
        require_whole("slurm.processes", self.processes, 1)
        require_whole("slurm.max_restarts", self.max_restarts, 0)
        if self.cpus_per_gpu is not None:
            require_whole("slurm.cpus_per_gpu", self.cpus_per_gpu, 1)
        require(self.memory is None or self.memory > 0, "slurm.memory", self.memory, "positive")
        require(self.hours > 0, "slurm.hours", self.hours, "positive")
        self._check_signal()
        if self.gpus and self.processes != 1:
            raise ConfigError(
                f"slurm.processes is {self.processes}, but each of the slurm.gpus ({self.gpus}) of a node has one process: "
                "set slurm.gpus to 0 for processes without a GPU, or leave slurm.processes out."
            )
        if self.cluster == "local" and self.nodes != 1:
            raise ConfigError(f"slurm.nodes is {self.nodes}, but slurm.cluster local is this machine alone: set it to 1.")
        if self.cluster == "local" and self.setup:
            raise ConfigError(
                "slurm.setup is set, but slurm.cluster local starts the job from this shell: run the commands here."
            )
        self._check_sbatch()

    def _check_signal(self) -> None:
        most = min(60 * self.minutes - 1, 65535)  # of sbatch
        ok = isinstance(self.signal_seconds, int) and 1 <= self.signal_seconds <= most
        rule = f"from 1 to {most}: shorter than the time limit of {60 * self.minutes} seconds"
        require(ok, "slurm.signal_seconds", self.signal_seconds, rule)

    def _check_sbatch(self) -> None:
        for name, value in self.sbatch.items():
            key = name.replace("_", "-")
            if re.fullmatch(r"[a-z][a-z0-9-]*", key) is None:
                raise ConfigError(f"slurm.sbatch holds {name!r}; use the long name of an option of sbatch, such as exclude.")
            if key in _OWN:
                raise ConfigError(f"slurm.sbatch holds {name!r}; set slurm.{_OWN[key]} instead.")
            if key in _MANAGED:
                raise ConfigError(f"slurm.sbatch holds {name!r}, on which logs and restarts depend; remove it.")
            ok = isinstance(value, (str, int, float)) and value is not False
            require(ok, f"slurm.sbatch.{name}", value, "text, a number, or true for an option without a value")

    @property
    def processes_per_node(self) -> int:
        """Number of processes on each node."""
        return self.gpus or self.processes

    @property
    def minutes(self) -> int:
        """Time limit in whole minutes, as SLURM counts it; at least 1."""
        return max(1, math.ceil(60 * self.hours))
