"""The processes that train together, as the loop sees them."""

from dataclasses import dataclass

from torch import Tensor

from widekernel.data.loading import Shard


@dataclass(frozen=True)
class Processes:
    """One process training alone. The loop asks this object, and never assumes, who writes files and who sums."""

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

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over all processes."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in at least one process."""
        return flag

    def union(self, names: set[str]) -> set[str]:
        """Union of the names over all processes."""
        return names
