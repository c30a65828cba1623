"""Starting a command in several processes on this machine (--processes)."""

from __future__ import annotations

import sys

from widekernel.data.config import processors
from widekernel.engine.process_environment import read_environment
from widekernel.errors import ConfigError
from widekernel.launch.local import launch
from widekernel.settings import require

_PER_PROCESSOR = 4
"""Largest number of processes per processor; each takes memory and starts PyTorch."""


def is_started(processes: int) -> bool:
    """Return whether this is one of the processes already, or the only one.

    Raises:
        ConfigError: there are others than `processes`.
    """
    environment = read_environment()
    if environment is not None and environment.world_size != processes:
        raise ConfigError(
            f"--processes is {processes}, but this is one of {environment.world_size} processes (WORLD_SIZE). Leave "
            "--processes out if torchrun or a cluster job starts the processes."
        )
    return environment is not None or processes == 1


def is_first() -> bool:
    """Return whether this process is alone, or the first of several, which alone prints."""
    environment = read_environment()
    return environment is None or environment.rank == 0


def check_number(processes: int) -> None:
    """Raise a `ConfigError` if the number is not positive, or if so many processes would overload this machine."""
    require(processes > 0, "--processes", processes, "1 or more")
    cores = processors()
    most = _PER_PROCESSOR * cores
    if processes > most:
        raise ConfigError(
            f"--processes is {processes}, but must be at most {most}, {_PER_PROCESSOR} for each of the {cores} processors "
            "of this machine: lower it."
        )


def start(command: str, arguments: list[str], processes: int) -> int:
    """Run the command `widekernel COMMAND ARGUMENTS` in several processes, and return their exit code."""
    return launch([sys.executable, "-m", "widekernel", command, *arguments], processes, _say)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
