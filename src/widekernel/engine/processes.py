"""Processes that train together, as the training loop sees them."""

from dataclasses import dataclass

from torch import Tensor

from widekernel.data import Shard
from widekernel.deprecation import renamed_attribute


@dataclass(frozen=True)
class Processes:
    """A single training process. The training loop uses this object to choose who writes files, and to sum values."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """The part of the data that this process loads."""
        return Shard(self.rank, self.world_size)

    share = renamed_attribute("share", "shard")

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes."""
        return values

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in at least one process."""
        return flag

    def union(self, names: set[str]) -> set[str]:
        """Return the union of the names over all processes."""
        return names
