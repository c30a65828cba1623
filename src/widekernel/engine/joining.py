"""Joining the processes that were started together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from widekernel.engine.process_environment import read_environment
from widekernel.engine.processes import Processes

TIMEOUT_S = 60.0
"""Seconds without a sign of life after which a process counts as lost."""

PATIENCE_S = 3600.0
"""Seconds that a process waits for others that are alive."""


@contextmanager
def joined_processes(
    device_name: str = "auto",
    timeout_s: float = TIMEOUT_S,
    *,
    patience_s: float = PATIENCE_S,
    report: Callable[[str], None] | None = None,
) -> Iterator[Processes]:
    """Join the processes that were started together, and leave them at the end of the block.

    torchrun's environment says which they are: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without it,
    this process is alone. In the block, a thread tells the others that this process lives, and watches them.

    Args:
        device_name: auto, cpu, cuda or cuda:N. Of several processes, each uses the GPU number LOCAL_RANK.
        timeout_s: seconds without a sign of life after which a process counts as lost.
        patience_s: seconds to wait, in one exchange, for processes that are alive.
        report: is given the error if the process must end while it cannot raise; by default, standard error is.

    Raises:
        ConfigError: the environment is incomplete or contradictory, or there are too few GPUs.
        ProcessError: processes did not join, or one was lost during the block.
    """
    environment = read_environment()
    if environment is None or environment.world_size == 1:
        yield Processes()
        return
    from widekernel.engine.distributed import join

    device = environment.device(device_name)
    with join(environment, device, timeout_s, patience_s, report) as processes:
        yield processes
