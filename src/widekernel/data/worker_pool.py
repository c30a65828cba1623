"""Loading of batches by worker processes, which are started again at the exact batch if one of them dies or hangs."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from widekernel.data.batches import Batch
from widekernel.data.config import LoadingConfig
from widekernel.data.samples import BatchOf, EvaluationSamples, TrainingSamples
from widekernel.data.worker_faults import (
    Activity,
    Failure,
    LoaderError,
    Watch,
    WatchedBatchOf,
    WatchedSamples,
    WorkerFaultError,
    raise_failure,
)
from widekernel.data.worker_signals import IgnoreGroupSignals, SignalSafeLoader

_POLL = 2.0
"""Seconds between two looks at the loading processes while a batch is awaited."""


def _ignore(_text: str) -> None:
    pass


@dataclass(frozen=True)
class LoaderOptions:
    """Options for loading batches.

    Args:
        workers: processes that decode images; 0 decodes in this process
        pin_memory: copy batches to page-locked memory, for transfer to a GPU
        timeout: seconds after which a process that is still loading the same image counts as hung
        restarts: how often the processes are started again after one of them died or hung
        notify: function that receives a message about each restart
    """

    workers: int = 0
    pin_memory: bool = False
    timeout: float = 120.0
    restarts: int = 0
    notify: Callable[[str], None] = _ignore

    @classmethod
    def configured(
        cls, config: LoadingConfig, *, pin_memory: bool = False, notify: Callable[[str], None] = _ignore
    ) -> "LoaderOptions":
        """Return the options that `config` describes."""
        return cls(config.workers, pin_memory, config.timeout, config.worker_restarts, notify)


class BatchSampler(Protocol):
    """Keys of batches, in an order of which any tail can be repeated."""

    first: int
    """Number of the batch with which the next iteration starts."""

    def __iter__(self) -> Iterator[list[Any]]: ...

    def __len__(self) -> int: ...


class WorkerPool:
    """Loading processes, or this process if there are none, that yield batches in the order of a sampler.

    Args:
        samples: the items
        batches: keys of the items of each batch
        options: number of processes, and what to do if one of them fails
    """

    def __init__(self, samples: TrainingSamples | EvaluationSamples, batches: BatchSampler, options: LoaderOptions) -> None:
        self.samples, self.batches, self.options = samples, batches, options
        self.restarts = 0
        self._activity = Activity(options.workers)
        self._watch = Watch(samples, self._activity, options.timeout)
        self._loader: DataLoader | None = None
        self._iterator: Any = None
        self._complete = True
        self._poll = min(_POLL, options.timeout / 4)

    def __del__(self) -> None:
        with suppress(Exception):  # parts of the interpreter may be gone already
            self._discard()

    def run(self, first: int = 0) -> Iterator[Batch]:
        """Yield the batches from number `first` on.

        Raises:
            LoaderError: loading failed, or a process died or hung more often than `options.restarts` allows.
        """
        number = first
        while True:
            try:
                self.batches.first = number
                with _Fetcher(self._start(), threaded=self.options.workers > 0) as fetcher:
                    while (batch := self._next(fetcher)) is not None:
                        number += 1
                        yield batch
                self._complete = True
                return
            except WorkerFaultError as fault:
                self._discard()
                if self.restarts >= self.options.restarts:
                    again = f" {self.restarts} restart(s) did not help." if self.restarts else ""
                    raise LoaderError(
                        f"{fault}.{again} Set data.workers to 0 to load in the training process and see the error there."
                    ) from fault
                self.restarts += 1
                self.options.notify(
                    f"{fault}. Starting the loading processes again (restart {self.restarts} of {self.options.restarts})."
                )

    def _start(self) -> Any:
        """Return an iterator over the remaining batches of the sampler."""
        if not self._complete:
            self._discard()  # whoever left the last iteration early need not wait for what is still being loaded
        try:
            self._iterator = self._begin()
        except RuntimeError:  # a process died or stopped while it had nothing to do
            self._discard()
            self._iterator = self._begin()
        self._complete = False
        if getattr(self._iterator, "_worker_pids_set", False):
            # Otherwise, PyTorch raises an error in whatever this process is doing when a worker dies, such as a training
            # step. Here, the next wait for a batch notices it.
            signal_handling._remove_worker_pids(id(self._iterator))
            self._iterator._worker_pids_set = False
        return self._iterator

    def _begin(self) -> Any:
        if self._loader is None:
            self._loader = self._make()
        if self.options.workers:
            # Otherwise, each worker makes a folder for its sockets, which it cannot remove when it is killed. Workers share
            # the folder of this process, which removes it at its end.
            get_temp_dir()
        return iter(self._loader)

    @property
    def _processes(self) -> Sequence[BaseProcess]:
        return getattr(self._iterator, "_workers", ())

    def _make(self) -> DataLoader:
        workers = self.options.workers
        return SignalSafeLoader(
            WatchedSamples(self.samples, self._activity),
            batch_sampler=self.batches,
            num_workers=workers,
            pin_memory=self.options.pin_memory,
            collate_fn=WatchedBatchOf(BatchOf(self.samples.collate)),
            worker_init_fn=IgnoreGroupSignals() if workers else None,
            persistent_workers=workers > 0,
            timeout=self.options.timeout if workers else 0,
            # A separate generator: otherwise every iterator draws from the global one, and a resumed run differs.
            generator=torch.Generator(),
        )

    def _next(self, fetcher: "_Fetcher") -> Batch | None:
        """Return the next batch, or `None` at the end."""
        waiting_since = time.monotonic()
        fetcher.request()
        while True:
            try:
                batch = fetcher.wait(self._poll)
            except queue.Empty:
                self._watch.check(self._processes, waiting_since)
                continue
            except (RuntimeError, OSError, EOFError) as error:
                # A connection that breaks is the first sign of a process that is about to end.
                self._watch.check(self._processes, waiting_since, patience=1.0)
                if "timed out after" not in str(error):
                    raise
                fetcher.request()
                continue
            if isinstance(batch, Failure):
                self._discard()
                raise_failure(batch, self.options.workers)
            return batch

    def _discard(self) -> None:
        """Kill the loading processes, one of which may hang, and forget their loader without waiting for it."""
        iterator, self._iterator, self._loader = self._iterator, None, None
        if iterator is None:
            return
        processes = getattr(iterator, "_workers", ())
        iterator._shutdown = True  # an orderly end would wait for locks that a killed process may hold
        if hasattr(iterator, "_pin_memory_thread_done_event"):
            iterator._pin_memory_thread_done_event.set()
        for process in processes:
            process.kill()
        for process in processes:
            process.join(timeout=5)
        for requests in getattr(iterator, "_index_queues", ()):
            with suppress(OSError, ValueError):
                requests.cancel_join_thread()
                requests.close()
        self._activity.clear()


class _Fetcher:
    """Thread that waits for the next item of an iterator, so that the training process can look after its workers.

    Batches arrive by way of a connection to the worker that made them, on which a stopped worker would let the training
    process wait forever. Once the worker is killed, the thread ends, too.

    Args:
        iterator: the iterator
        threaded: whether to use a thread; otherwise `wait` calls the iterator itself
    """

    def __init__(self, iterator: Any, threaded: bool) -> None:
        self._iterator = iterator
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True) if threaded else None

    def __enter__(self) -> "_Fetcher":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(False)

    def request(self) -> None:
        """Ask for the next item."""
        self._requests.put(True)

    def wait(self, seconds: float) -> Any:
        """Return the item that was asked for, or `None` at the end.

        Raises:
            queue.Empty: it did not arrive in time.
        """
        if self._thread is None:
            return next(self._iterator, None)
        result, error = self._results.get(timeout=seconds)
        if error is not None:
            raise error
        return result

    def _serve(self) -> None:
        while self._requests.get():
            try:
                self._results.put((next(self._iterator, None), None))
            except Exception as error:  # raised again where it is waited for
                self._results.put((None, error))
