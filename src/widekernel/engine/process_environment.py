"""Environment variables that tell a process its place among several; torchrun's names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from widekernel.errors import ConfigError

if TYPE_CHECKING:
    import torch

REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
RUN_ID = "WIDEKERNEL_RUN_ID"
"""Variable that is equal in processes that were started together; those of another run at the same port differ."""
_IDENTIFYING = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class ProcessEnvironment:
    """Place of this process among those that were started together.

    Args:
        rank: number of the process among all
        world_size: number of processes
        local_rank: number of the process on its machine
        local_size: number of processes on its machine, if known
        address: machine of process 0
        port: port of process 0
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int | None
    address: str
    port: int

    def device(self, name: str) -> torch.device:
        """Return the device of this process.

        Args:
            name: auto, cpu or cuda.

        Raises:
            ConfigError: the name is another one, or the machine has fewer GPUs than processes.
        """
        import torch  # the launcher reads the environment without PyTorch

        kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        if kind == "cpu":
            return torch.device("cpu")
        if kind != "cuda":
            raise ConfigError(
                f"loop.device is {name!r}, but of several processes each uses the GPU with its local number: "
                "set auto, cpu or cuda."
            )
        if not torch.cuda.is_available():
            raise ConfigError(f"loop.device is {name!r}, but PyTorch finds no CUDA device.")
        # All processes of a machine compare with their number, so that none is left waiting for one that refused.
        here, gpus = max(self.local_size or 0, self.local_rank + 1), torch.cuda.device_count()
        if here > gpus:
            raise ConfigError(
                f"There are {here} processes on this machine, but only {gpus} GPU(s): start at most {gpus}, or set cpu."
            )
        return torch.device("cuda", self.local_rank)


def read_environment(variables: Mapping[str, str] | None = None) -> ProcessEnvironment | None:
    """Return the place of this process, or `None` if no variable says that there are others.

    MASTER_ADDR and MASTER_PORT alone do not say so: cluster profiles set them for every job.

    Args:
        variables: environment; by default, that of this process.

    Raises:
        ConfigError: some variables are missing, are no numbers or contradict each other.
    """
    variables = os.environ if variables is None else variables
    if not any(variables.get(name) for name in _IDENTIFYING):
        return None
    missing = [name for name in REQUIRED if not variables.get(name)]
    if missing:
        given = [name for name in REQUIRED if variables.get(name)]
        raise ConfigError(
            f"The environment sets {', '.join(given)}, but not {', '.join(missing)}. Start several processes with "
            f"--processes N or torchrun, which set all; to train with one process, unset {', '.join(given)}."
        )
    values = {name: _number(name, variables[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    local_size = _number("LOCAL_WORLD_SIZE", variables["LOCAL_WORLD_SIZE"]) if variables.get("LOCAL_WORLD_SIZE") else None
    place = ProcessEnvironment(
        rank=values["RANK"],
        world_size=values["WORLD_SIZE"],
        local_rank=values["LOCAL_RANK"],
        local_size=local_size,
        address=variables["MASTER_ADDR"],
        port=values["MASTER_PORT"],
    )
    if place.rank >= place.world_size:
        raise ConfigError(f"RANK is {place.rank}, but must be less than WORLD_SIZE, which is {place.world_size}.")
    if not 0 < place.port < 2**16:
        raise ConfigError(f"MASTER_PORT is {place.port}, but a port is a number from 1 to 65535.")
    return place


def refuse_several(command: str, variables: Mapping[str, str] | None = None) -> None:
    """Raise if this is one of several processes, as which `command` would do the same work, and write the same files, each.

    Args:
        command: name of the command.
        variables: environment; by default, that of this process.

    Raises:
        ConfigError: torchrun, or whoever sets its variables, has started several processes.
    """
    variables = os.environ if variables is None else variables
    world_size = variables.get("WORLD_SIZE", "")
    if variables.get("RANK") and world_size.isascii() and world_size.isdigit() and int(world_size) > 1:
        raise ConfigError(
            f"`widekernel {command}` runs in one process, but the environment says that this is one of {world_size} (RANK, "
            "WORLD_SIZE). Start it without torchrun, or unset these variables. `widekernel train` and `eval` take several."
        )


def _number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"The environment variable {name} is {text!r}, but must be a number, 0 or more.")
    return int(text)
