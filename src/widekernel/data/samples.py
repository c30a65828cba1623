"""Data sets for loaders: items of a source, transformed, with the images that cannot be read reported."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from widekernel.data.batch_plan import BatchPlan
from widekernel.data.batches import Batch, Sample, Unreadable
from widekernel.data.images import UnreadableImageError
from widekernel.data.seeding import AUGMENT_STREAM, SHUFFLE_STREAM, derive_seed, scoped_seed

SampleKey = tuple[int, int]
"""(epoch, index): the request of a sampler to a data set."""

Collate = Callable[[list[Any]], Any]
"""Function that turns a list of items into the content of a batch."""


class Source(Protocol):
    """A finite, indexable set of items, such as images with labels."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Any:
        """Return an item.

        Raises:
            UnreadableImageError: an image of the item cannot be decoded.
        """

    def sample_name(self, index: int) -> str:
        """Return the name of the item for messages."""


@dataclass(frozen=True)
class Shard:
    """Part of a data set that one process loads: part `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1


class TrainingSamples(Dataset):
    """Randomly transformed items, which depend only on (seed, epoch, index).

    An unreadable image is reported, and replaced by the next readable one so that batches keep their size.

    Args:
        source: the items
        transform: random function from an item to an item, which draws from the global generators
        seed: seed of the run
        collate: function from a list of transformed items to the content of a batch
    """

    MAX_REPLACEMENTS = 100

    def __init__(
        self, source: Source, transform: Callable[[Any], Any], seed: int, collate: Collate = default_collate
    ) -> None:
        self.source, self.transform, self.seed, self.collate = source, transform, seed, collate

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index = key
        unreadable: list[Unreadable] = []
        for shift in range(min(len(self.source), self.MAX_REPLACEMENTS)):
            candidate = (index + shift) % len(self.source)
            try:
                item = self.source.load(candidate)
            except UnreadableImageError as error:
                unreadable.append(Unreadable(self.source.sample_name(candidate), str(error)))
                continue
            with scoped_seed(AUGMENT_STREAM, self.seed, epoch, index):
                return Sample(self.transform(item), tuple(unreadable))
        # The training process raises the error, because an error in a worker would become a traceback.
        return Sample(None, tuple(unreadable))


class EvaluationSamples(Dataset):
    """Deterministically transformed items; unreadable ones are reported and left out.

    Args:
        source: the items
        transform: function from an item to an item
        collate: function from a list of transformed items to the content of a batch
    """

    def __init__(self, source: Source, transform: Callable[[Any], Any], collate: Collate = default_collate) -> None:
        self.source, self.transform, self.collate = source, transform, collate

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            item = self.source.load(index)
        except UnreadableImageError as error:
            return Sample(None, (Unreadable(self.source.sample_name(index), str(error)),))
        return Sample(self.transform(item))


class BatchOf:
    """Function from a list of samples to a batch, whose content `collate` makes from the readable items."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch, which has fewer items than there are samples if some are unreadable."""
        items = [sample.item for sample in samples if sample.item is not None]
        unreadable = tuple(image for sample in samples for image in sample.unreadable)
        return Batch(self.collate(items) if items else None, len(items), unreadable)


class EpochBatches(Sampler[list[SampleKey]]):
    """Shuffled micro-batches of one epoch, for one process; an incomplete last global batch is dropped.

    The order is a function of (seed, epoch) alone. `start(epoch, skip_steps)` chooses what the next iteration yields:
    `epoch`, without the micro-batches of its first `skip_steps` optimizer steps.

    Args:
        length: number of items
        plan: division of the global batch
        seed: seed of the run
        rank: number of this process
    """

    def __init__(self, length: int, plan: BatchPlan, seed: int, rank: int = 0) -> None:
        self.length, self.plan, self.seed, self.rank = length, plan, seed, rank
        self.epoch = 0
        self.skip_steps = 0

    def start(self, epoch: int, skip_steps: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its optimizer steps to skip."""
        self.epoch, self.skip_steps = epoch, skip_steps

    @property
    def steps_per_epoch(self) -> int:
        """Number of complete global batches in an epoch, which is the same for every process."""
        return self.length // self.plan.batch_size

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.skip_steps) * self.plan.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        plan, epoch = self.plan, self.epoch
        generator = torch.Generator().manual_seed(derive_seed(SHUFFLE_STREAM, self.seed, epoch))
        order = torch.randperm(self.length, generator=generator)
        for step in range(self.skip_steps, self.steps_per_epoch):
            for number in range(plan.accumulate):
                first = step * plan.batch_size + plan.first(self.rank, number)
                yield [(epoch, index) for index in order[first : first + plan.per_pass].tolist()]
