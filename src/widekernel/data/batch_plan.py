"""Division of a global batch among processes and forward passes."""

from dataclasses import dataclass

from widekernel.errors import ConfigError
from widekernel.settings import require_whole


@dataclass(frozen=True)
class BatchPlan:
    """Division of the images of one optimizer step.

    Every process takes a contiguous part of each global batch, and divides it into contiguous micro-batches, one for each
    forward pass. So the order of the data does not depend on the division.

    Args:
        batch_size: images per optimizer step over all processes (loop.batch_size)
        micro_batch: images per forward pass of one process (loop.micro_batch); by default all images of the process
        world_size: number of processes

    Raises:
        ConfigError: the batch cannot be divided in this way; the message names the nearest sizes that can.
    """

    batch_size: int
    micro_batch: int | None = None
    world_size: int = 1

    def __post_init__(self) -> None:
        require_whole("loop.batch_size", self.batch_size, 1)
        require_whole("number of processes", self.world_size, 1)
        if self.batch_size % self.world_size:
            sizes = _nearest_multiples(self.batch_size, self.world_size)
            raise ConfigError(
                f"loop.batch_size is {self.batch_size}, which {self.world_size} processes cannot share equally. "
                f"Set loop.batch_size to {sizes}."
            )
        if self.micro_batch is None:
            return
        require_whole("loop.micro_batch", self.micro_batch, 1)
        if self.per_process % self.micro_batch:
            share = f"{self.batch_size} images" if self.world_size == 1 else f"{self.per_process} images per process"
            raise ConfigError(
                f"loop.micro_batch is {self.micro_batch}, which does not divide the {share} of loop.batch_size "
                f"{self.batch_size}. Set loop.micro_batch to {_nearest_divisors(self.per_process, self.micro_batch)}, or "
                f"loop.batch_size to {_nearest_multiples(self.batch_size, self.micro_batch * self.world_size)}."
            )

    @property
    def per_process(self) -> int:
        """Images of one process in each optimizer step."""
        return self.batch_size // self.world_size

    @property
    def per_pass(self) -> int:
        """Images of one forward pass."""
        return self.micro_batch or self.per_process

    @property
    def accumulate(self) -> int:
        """Forward passes of one process whose gradients are accumulated in each optimizer step."""
        return self.per_process // self.per_pass

    def first(self, rank: int, number: int) -> int:
        """Return the place, in the global batch, of the first image of micro-batch `number` of process `rank`."""
        return rank * self.per_process + number * self.per_pass

    def describe(self) -> str:
        """Return a line such as "batch of 4096 images = 8 processes × 2 forward passes × 256"."""
        factors = []
        if self.world_size > 1:
            factors.append(f"{self.world_size} processes")
        if self.accumulate > 1:
            factors.append(f"{self.accumulate} forward passes")
        whole = f"batch of {self.batch_size} image{'s' if self.batch_size > 1 else ''}"
        return " × ".join([f"{whole} = {factors[0]}", *factors[1:], str(self.per_pass)]) if factors else whole


def _nearest_multiples(value: int, unit: int) -> str:
    """Return the positive multiples of `unit` just below and above `value`, joined by "or"."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _nearest_divisors(whole: int, value: int) -> str:
    """Return the divisors of `whole` just below and above `value`, joined by "or"."""
    small = [divisor for divisor in range(1, int(whole**0.5) + 1) if whole % divisor == 0]
    divisors = {*small, *(whole // divisor for divisor in small)}
    near = [
        max((divisor for divisor in divisors if divisor < value), default=None),
        min((divisor for divisor in divisors if divisor > value), default=None),
    ]
    return " or ".join(str(divisor) for divisor in near if divisor is not None)
