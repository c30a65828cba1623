"""Data sets for loaders: items of a source, transformed, with the images that cannot be read reported."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from widekernel.data.batch_plan import BatchPlan
from widekernel.data.batches import Batch, Sample, Unreadable
from widekernel.data.images import UnreadableImageError
from widekernel.data.seeding import AUGMENT_STREAM, SHUFFLE_STREAM, derive_seed, scoped_seed

SampleKey = tuple[int, ...]
"""(epoch, index), or (epoch, index, version) in repeated augmentation: the request of a sampler to a data set."""

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


def _ignore(_index: int) -> None:
    pass


@dataclass(frozen=True)
class Shard:
    """Part of a data set that one process loads: part `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1


class TrainingSamples(Dataset):
    """Randomly transformed items, which depend only on (seed, epoch, index) and, in repeated augmentation, the version.

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
        return self.sample(key)

    def sample(self, key: SampleKey, note: Callable[[int], None] = _ignore) -> Sample:
        """Return the sample of the key; `note` is told the index of every item before it is loaded."""
        index = key[1]
        unreadable: list[Unreadable] = []
        for shift in range(min(len(self.source), self.MAX_REPLACEMENTS)):
            candidate = (index + shift) % len(self.source)
            note(candidate)
            try:
                item = self.source.load(candidate)
            except UnreadableImageError as error:
                unreadable.append(Unreadable(self.source.sample_name(candidate), str(error)))
                continue
            with scoped_seed(AUGMENT_STREAM, self.seed, *key):
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
        return self.sample(index)

    def sample(self, index: int, note: Callable[[int], None] = _ignore) -> Sample:
        """Return the sample; `note` is told its index before it is loaded."""
        note(index)
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

    The order is a function of (seed, epoch) alone. The next iteration yields the micro-batches of the epoch `epoch` from
    number `first` on; both can be set.

    Repeated augmentation takes as many items per epoch as usual, each of them `repeats` times in a row, in versions that are
    changed differently; the last items of the order are left out. Within a global batch, all first versions come first, then
    all second ones, and so on. So processes have different versions, as with timm's `RepeatAugSampler`, and mixup does not
    mix an image with itself.

    With groups, such as landscape and portrait images, each global batch is of one group. Only those that are filled from
    what is left of the groups, fewer than there are groups, are mixed.

    Args:
        length: number of items
        plan: division of the global batch
        seed: seed of the run
        rank: number of this process
        repeats: versions of each item
        groups: group of each item `(length,)`, from 0; `None` if all belong together
    """

    def __init__(
        self,
        length: int,
        plan: BatchPlan,
        seed: int,
        rank: int = 0,
        repeats: int = 1,
        groups: Tensor | None = None,
    ) -> None:
        self.length, self.plan, self.seed, self.rank, self.repeats = length, plan, seed, rank, repeats
        self.groups = groups
        self.epoch = 0
        self.first = 0

    @property
    def steps_per_epoch(self) -> int:
        """Number of complete global batches in an epoch, which is the same for every process."""
        return self.length // self.plan.batch_size

    def __len__(self) -> int:
        return self.steps_per_epoch * self.plan.accumulate - self.first

    def __iter__(self) -> Iterator[list[SampleKey]]:
        plan, epoch = self.plan, self.epoch
        generator = torch.Generator().manual_seed(derive_seed(SHUFFLE_STREAM, self.seed, epoch))
        order = torch.randperm(self.length, generator=generator)
        if self.groups is not None:
            order = _by_group(order, self.groups[order], plan.batch_size, generator)
        for batch in range(self.first, self.steps_per_epoch * plan.accumulate):
            step, number = divmod(batch, plan.accumulate)
            first = plan.first(self.rank, number)
            if self.repeats > 1:
                places = self._places(step)[first : first + plan.per_pass]
                yield [(epoch, int(order[place // self.repeats]), place % self.repeats) for place in places]
                continue
            start = step * plan.batch_size + first
            yield [(epoch, index) for index in order[start : start + plan.per_pass].tolist()]

    def _places(self, step: int) -> list[int]:
        """Return the places of a global batch in the sequence of repeated items, ordered by version."""
        first = step * self.plan.batch_size
        return sorted(range(first, first + self.plan.batch_size), key=lambda place: (place % self.repeats, place))


def _by_group(order: Tensor, groups: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Return `order`, rearranged so that batches are of one group each, in a random order of the batches.

    Args:
        order: items `(n,)`.
        groups: group of each of them `(n,)`.
        batch_size: items per batch.
        generator: source of the order of the batches.
    """
    members = [order[groups == group] for group in groups.unique()]
    # What is left of a group is shorter than a batch. It follows, group by group, and the last batch of the epoch is cut.
    whole = [items[: len(items) // batch_size * batch_size] for items in members]
    left = [items[len(complete) :] for items, complete in zip(members, whole)]
    items = torch.cat([*whole, *left])
    batches = items[: len(items) // batch_size * batch_size].view(-1, batch_size)
    shuffled = batches[torch.randperm(len(batches), generator=generator)]
    return torch.cat([shuffled.flatten(), items[batches.numel() :]])


class ShardBatches(Sampler[list[int]]):
    """Batches of the items of one shard, in order, each item once; the last batch may be incomplete.

    The next iteration starts with batch number `first`, which can be set.

    Args:
        length: number of items of all shards
        batch_size: items per batch
        shard: which part of the items
    """

    def __init__(self, length: int, batch_size: int, shard: Shard) -> None:
        self.indices = range(shard.rank, length, shard.world_size)
        self.batch_size = batch_size
        self.first = 0

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size) - self.first

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.first * self.batch_size, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])
