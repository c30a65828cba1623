"""Loaders of batches that depend only on (seed, epoch, position), whatever the number of workers and processes."""

import math
from collections.abc import Iterator

from torch import Tensor

from widekernel.data.batch_plan import BatchPlan
from widekernel.data.batches import Batch, Sample, Unreadable
from widekernel.data.samples import EpochBatches, EvaluationSamples, Shard, ShardBatches, TrainingSamples
from widekernel.data.worker_faults import LoaderError
from widekernel.data.worker_pool import LoaderOptions, WorkerPool
from widekernel.errors import DataError

__all__ = [
    "Batch",
    "EvaluationLoader",
    "EvaluationSamples",
    "LoaderError",
    "LoaderOptions",
    "Sample",
    "Shard",
    "TrainingLoader",
    "TrainingSamples",
    "Unreadable",
]


class TrainingLoader:
    """Loader of one process's micro-batches by epoch; `epoch(n, skip_steps)` starts at any optimizer step.

    Args:
        samples: the training items
        options: worker processes and memory
        plan: division of the global batch
        rank: number of this process
        repeats: versions of each item in an epoch; see `EpochBatches`
        groups: group of each item, if batches are to be of one group; see `EpochBatches`
    """

    def __init__(
        self,
        samples: TrainingSamples,
        options: LoaderOptions,
        plan: BatchPlan,
        rank: int = 0,
        repeats: int = 1,
        groups: Tensor | None = None,
    ) -> None:
        self.samples, self.plan = samples, plan
        self.sampler = EpochBatches(len(samples), plan, samples.seed, rank, repeats, groups)
        self._pool = WorkerPool(samples, self.sampler, options)

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch; an incomplete last batch is dropped."""
        return self.sampler.steps_per_epoch

    def epoch(self, epoch: int, skip_steps: int = 0) -> Iterator[Batch]:
        """Yield this process's micro-batches of `epoch`, `plan.accumulate` for each step, without the first steps.

        Raises:
            DataError: so many neighboring images are unreadable that no replacement was found.
            LoaderError: a loading process died, hung or failed.
        """
        self.sampler.epoch = epoch
        for batch in self._pool.run(skip_steps * self.plan.accumulate):
            if batch.size < self.plan.per_pass:
                raise DataError(
                    f"Too many images in a row cannot be read; the last of them is {batch.unreadable[-1]}. "
                    "Check the data set."
                )
            yield batch


class EvaluationLoader:
    """Loader that yields each item exactly once over all processes, in order, and repeats none to fill a batch.

    Args:
        samples: the items
        batch_size: items per batch
        options: worker processes and memory
        shard: the part that this process loads; `len` is its number of batches
    """

    def __init__(self, samples: EvaluationSamples, batch_size: int, options: LoaderOptions, shard: Shard) -> None:
        self.samples, self.batch_size, self.shard = samples, batch_size, shard
        self._batches = ShardBatches(len(samples), batch_size, shard)
        self._pool = WorkerPool(samples, self._batches, options)

    @property
    def most_batches(self) -> int:
        """Largest number of batches of any process; those of two processes differ by at most one."""
        return math.ceil(math.ceil(len(self.samples) / self.shard.world_size) / self.batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self._batches.indices) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._pool.run()
