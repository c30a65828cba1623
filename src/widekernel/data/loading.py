"""Batches whose content depends on (seed, epoch, position) alone, in any number of workers and on any rank."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.sharedctypes import RawValue
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from widekernel.data.images import UnreadableImageError
from widekernel.data.preprocess import ImageTransform
from widekernel.data.seeding import derive_seed, scoped_seed
from widekernel.data.sources import ImageSource
from widekernel.errors import DataError

# First keys of the random streams: each purpose draws from its own.
SHUFFLE_STREAM, AUGMENT_STREAM, MIX_STREAM = 1, 2, 3

SampleKey = tuple[int, int]
"""(epoch, index): what a sampler asks a data set for."""


class Unreadable(NamedTuple):
    """An image that could not be decoded: what it is called, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Sample(NamedTuple):
    """One image, or (with `image` None) the report of an unreadable one."""

    image: Tensor | None
    target: int
    unreadable: tuple[Unreadable, ...]


class Batch(NamedTuple):
    """Images `(n, 3, size, size)`, class indices `(n,)`, and the unreadable images met while loading them."""

    images: Tensor
    targets: Tensor
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True)
class Shard:
    """Which part of every epoch this process loads: position `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1


class TrainingSamples(Dataset):
    """Randomly transformed training images, a function of (seed, epoch, index).

    An unreadable image is replaced by the next readable one, so that batches keep their size, and reported.
    """

    MAX_REPLACEMENTS = 100

    def __init__(self, source: ImageSource, transform: ImageTransform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index = key
        unreadable: list[Unreadable] = []
        for shift in range(min(len(self.source), self.MAX_REPLACEMENTS)):
            candidate = (index + shift) % len(self.source)
            try:
                image, target = self.source.load(candidate)
            except UnreadableImageError as error:
                unreadable.append(Unreadable(self.source.sample_name(candidate), str(error)))
                continue
            with scoped_seed(AUGMENT_STREAM, self.seed, epoch, index):
                return Sample(self.transform(image), target, tuple(unreadable))
        return Sample(None, -1, tuple(unreadable))  # the training process raises: a worker's error hides in a traceback


class EvaluationSamples(Dataset):
    """Deterministically transformed images; an unreadable one is reported and left out."""

    def __init__(self, source: ImageSource, transform: ImageTransform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, target = self.source.load(index)
        except UnreadableImageError as error:
            return Sample(None, -1, (Unreadable(self.source.sample_name(index), str(error)),))
        return Sample(self.transform(image), target, ())


class EpochBatches(Sampler[list[SampleKey]]):
    """Shuffled batches of one epoch for one rank; the incomplete last batch is dropped.

    `start(epoch, skip)` chooses what the next iteration gives: the order of `epoch`, without its first `skip`
    batches. All ranks cut their batches from one common order.
    """

    def __init__(self, length: int, batch_size: int, seed: int, shard: Shard) -> None:
        self.length, self.batch_size, self.seed, self.shard = length, batch_size, seed, shard
        self.epoch = 0
        self.skip = 0

    def start(self, epoch: int, skip: int = 0) -> None:
        """Choose what the next iteration gives."""
        self.epoch, self.skip = epoch, skip

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of this rank in an epoch; the same number on every rank."""
        return self.length // (self.batch_size * self.shard.world_size)

    def __len__(self) -> int:
        return self.batches_per_epoch - self.skip

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = torch.Generator().manual_seed(derive_seed(SHUFFLE_STREAM, self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        stride = self.batch_size * self.shard.world_size
        for number in range(self.skip, self.batches_per_epoch):
            first = number * stride + self.shard.rank * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


def collate(samples: list[Sample]) -> Batch:
    """Stack the readable samples and pass on what was unreadable."""
    readable = [(sample.image, sample.target) for sample in samples if sample.image is not None]
    names = tuple(name for sample in samples for name in sample.unreadable)
    if not readable:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), names)
    images, targets = zip(*readable, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), names)


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are loaded.

    Args:
        batch_size: images per batch and process
        workers: decoding processes
        pin_memory: copy batches to page-locked memory, for transfer to a GPU
    """

    batch_size: int
    workers: int = 0
    pin_memory: bool = False


class TrainingLoader:
    """Training batches by epoch; `epoch(n, skip)` starts anywhere."""

    def __init__(self, samples: TrainingSamples, options: LoaderOptions, shard: Shard) -> None:
        self.samples = samples
        self.sampler = EpochBatches(len(samples), options.batch_size, samples.seed, shard)
        self._loader = _make_loader(samples, options, batch_sampler=self.sampler)

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of this process in an epoch."""
        return self.sampler.batches_per_epoch

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from number `skip` on.

        Raises:
            DataError: so many neighbouring images are unreadable that no replacement was found.
        """
        self.sampler.start(epoch, skip)
        for batch in self._loader:
            if len(batch.images) < self.sampler.batch_size:
                raise DataError(
                    f"Too many images in a row cannot be read, the last of them {batch.unreadable[-1]}. Check the data set."
                )
            yield batch


def evaluation_loader(samples: EvaluationSamples, options: LoaderOptions, shard: Shard) -> DataLoader:
    """A loader that gives every image exactly once over all ranks, in order, with nothing repeated to fill up."""
    indices = range(shard.rank, len(samples), shard.world_size)
    return _make_loader(samples, options, batch_size=options.batch_size, sampler=indices)


_TO_THE_GROUP = (signal.SIGINT, signal.SIGTERM)


class _SignalSafeLoader(DataLoader):
    """A loader whose workers, while they start, have signals to the process group wait until they can ignore them.

    Where workers are forked or spawned; those that a fork server forks start with the mask of that server.
    """

    def __iter__(self) -> Any:
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        if multiprocessing.get_context().get_start_method() == "spawn":
            # What spawned processes need of it unblocks signals when it starts, so it must be there before.
            resource_tracker.ensure_running()
        # A process inherits the mask of the thread that starts it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_THE_GROUP)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _make_loader(samples: Dataset, options: LoaderOptions, **batching: Any) -> DataLoader:
    start_worker = None
    if options.workers:
        leaving = RawValue("b", False)
        atexit.register(_announce, leaving)
        start_worker = partial(_ignore_signals_to_the_group, leaving=leaving)
    return _SignalSafeLoader(
        samples,
        num_workers=options.workers,
        pin_memory=options.pin_memory,
        collate_fn=collate,
        worker_init_fn=start_worker,
        persistent_workers=options.workers > 0,
        # its own generator: otherwise every new iterator would draw from the global one, and a resumed run would differ
        generator=torch.Generator(),
        **batching,
    )


def _announce(leaving: Any) -> None:
    leaving.value = True


def _ignore_signals_to_the_group(_worker: int, leaving: Any) -> None:
    # Ctrl-C, timeout and batch schedulers signal the whole process group; the training process decides when to stop.
    # When it leaves, it terminates the workers that still wait, and only then they obey.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_THE_GROUP)
