"""Batches that depend only on (seed, epoch, position), whatever the number of workers and the rank."""

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
from widekernel.deprecation import renamed_arguments
from widekernel.errors import DataError

# First keys of the random streams: each purpose has its own stream.
SHUFFLE_STREAM, AUGMENT_STREAM, MIX_STREAM = 1, 2, 3

SampleKey = tuple[int, int]
"""(epoch, index): the request of a sampler to a data set."""


class Unreadable(NamedTuple):
    """Name of an image that could not be decoded, and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Sample(NamedTuple):
    """One image `(channels, size, size)`, or `None` if it is unreadable."""

    image: Tensor | None
    target: int
    unreadable: tuple[Unreadable, ...]


class Batch(NamedTuple):
    """Images `(n, channels, size, size)`, class indices `(n,)`, and the unreadable images met while loading them."""

    images: Tensor
    targets: Tensor
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True)
class Shard:
    """Part of every epoch that one process loads: part `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1


class TrainingSamples(Dataset):
    """Randomly transformed training images, which depend only on (seed, epoch, index).

    An unreadable image is reported, and replaced by the next readable one so that batches keep their size.
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
        # The training process raises the error, because an error in a worker would become a traceback.
        return Sample(None, -1, tuple(unreadable))


class EvaluationSamples(Dataset):
    """Deterministically transformed images; unreadable ones are reported and left out."""

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
    """Shuffled batches of one epoch, for one rank; the incomplete last batch is dropped.

    `start(epoch, skip)` chooses what the next iteration yields: `epoch`, without its first `skip` batches. All ranks
    cut their batches from one common order.
    """

    def __init__(self, length: int, batch_size: int, seed: int, shard: Shard) -> None:
        self.length, self.batch_size, self.seed, self.shard = length, batch_size, seed, shard
        self.epoch = 0
        self.skip = 0

    def start(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its batches to skip."""
        self.epoch, self.skip = epoch, skip

    @property
    def batches_per_epoch(self) -> int:
        """Number of complete batches of this rank in an epoch, which is the same on every rank."""
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
    """Stack the readable samples, and collect the reports on unreadable ones."""
    readable = [(sample.image, sample.target) for sample in samples if sample.image is not None]
    names = tuple(name for sample in samples for name in sample.unreadable)
    if not readable:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), names)
    images, targets = zip(*readable, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), names)


@dataclass(frozen=True)
class LoaderOptions:
    """Options for loading batches.

    Args:
        batch_size: images per batch and process
        workers: processes that decode images; 0 decodes in this process
        pin_memory: copy batches to page-locked memory, for transfer to a GPU
    """

    batch_size: int
    workers: int = 0
    pin_memory: bool = False


class TrainingLoader:
    """Loader of training batches by epoch; `epoch(n, skip)` starts at any batch."""

    @renamed_arguments(share="shard")
    def __init__(self, samples: TrainingSamples, options: LoaderOptions, shard: Shard) -> None:
        self.samples = samples
        self.sampler = EpochBatches(len(samples), options.batch_size, samples.seed, shard)
        self._loader = _make_loader(samples, options, batch_sampler=self.sampler)

    @property
    def batches_per_epoch(self) -> int:
        """Number of complete batches of this process in an epoch."""
        return self.sampler.batches_per_epoch

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch`, without the first `skip`.

        Raises:
            DataError: so many neighboring images are unreadable that no replacement was found.
        """
        self.sampler.start(epoch, skip)
        for batch in self._loader:
            if len(batch.images) < self.sampler.batch_size:
                raise DataError(
                    f"Too many images in a row cannot be read; the last of them is {batch.unreadable[-1]}. "
                    "Check the data set."
                )
            yield batch


@renamed_arguments(share="shard")
def evaluation_loader(samples: EvaluationSamples, options: LoaderOptions, shard: Shard) -> DataLoader:
    """Return a loader that yields each image exactly once over all ranks, in order, and repeats none to fill a batch."""
    indices = range(shard.rank, len(samples), shard.world_size)
    return _make_loader(samples, options, batch_size=options.batch_size, sampler=indices)


_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that terminals and batch schedulers send to the whole process group."""


class _SignalSafeLoader(DataLoader):
    """Loader whose workers start with signals to the process group blocked, until they can ignore them.

    This holds for workers that are forked or spawned; those of a fork server start with the mask of that server.
    """

    def __iter__(self) -> Any:
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        if multiprocessing.get_context().get_start_method() == "spawn":
            # Spawned processes need the resource tracker, which unblocks signals when it starts, so start it first.
            resource_tracker.ensure_running()
        # A process inherits the mask of the thread that starts it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _make_loader(samples: Dataset, options: LoaderOptions, **batching: Any) -> DataLoader:
    start_worker = None
    if options.workers:
        leaving = RawValue("b", False)
        atexit.register(_announce_exit, leaving)
        start_worker = partial(_ignore_group_signals, leaving=leaving)
    return _SignalSafeLoader(
        samples,
        num_workers=options.workers,
        pin_memory=options.pin_memory,
        collate_fn=collate,
        worker_init_fn=start_worker,
        persistent_workers=options.workers > 0,
        # With a separate generator: otherwise every new iterator draws from the global one, and a resumed run differs.
        generator=torch.Generator(),
        **batching,
    )


def _announce_exit(leaving: Any) -> None:
    leaving.value = True


def _ignore_group_signals(_worker: int, leaving: Any) -> None:
    # Ctrl-C, `timeout` and batch schedulers signal the whole process group, but the training process decides when to
    # stop. When it exits, it terminates the workers that still wait; only then do they react to the signal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)
