"""What loading processes are doing, so that one that dies, hangs or fails is reported with the image that it was loading."""

import multiprocessing.connection
import signal
import time
import traceback
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple

from torch.utils.data import Dataset, get_worker_info

from widekernel.data.batches import Batch, Sample
from widekernel.data.samples import BatchOf, EvaluationSamples, TrainingSamples
from widekernel.errors import WidekernelError, in_short


class LoaderError(WidekernelError, RuntimeError):
    """Error for a loading process that died, hung or failed for other reasons than an unreadable image."""


class WorkerFaultError(Exception):
    """Death or hang of a loading process, after which the processes can be started again; the message says what happened."""


class Failure(NamedTuple):
    """Error in a loading process.

    Args:
        what: what was being loaded
        reason: type and message of the error, or the message alone of one that explains itself
        report: its traceback
        explained: whether the error explains itself
    """

    what: str
    reason: str
    report: str
    explained: bool = False


class Activity:
    """The item that each loading process is loading, in shared memory; process 0 may be the training process itself."""

    def __init__(self, workers: int) -> None:
        self._slots = RawArray("q", 2 * max(1, workers))  # index + 1 or 0, and the time since when this holds

    def begin(self, index: int) -> None:
        """Note that this process begins to load item `index`."""
        slot = _slot()
        self._slots[slot + 1] = time.monotonic_ns()
        self._slots[slot] = index + 1

    def end(self) -> None:
        """Note that this process is not loading an item."""
        slot = _slot()
        self._slots[slot + 1] = time.monotonic_ns()
        self._slots[slot] = 0

    def clear(self) -> None:
        """Forget what all processes were doing."""
        self._slots[:] = [0] * len(self._slots)

    def index(self, worker: int) -> int | None:
        """Return the item that a process is loading, or was loading when it died."""
        return self._slots[2 * worker] - 1 if self._slots[2 * worker] else None

    def seconds(self, worker: int) -> float:
        """Return how long a process has been loading its item, or nothing."""
        return (time.monotonic_ns() - self._slots[2 * worker + 1]) / 1e9


def _slot() -> int:
    info = get_worker_info()
    return 2 * info.id if info else 0


class WatchedSamples(Dataset):
    """Samples that note what is being loaded, and return a `Failure` instead of raising an error."""

    def __init__(self, samples: TrainingSamples | EvaluationSamples, activity: Activity) -> None:
        self.samples, self.activity = samples, activity

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Any) -> Sample | Failure:
        try:
            return self.samples.sample(key, self.activity.begin)
        except Exception as error:  # of whatever kind: it is raised again in the training process, with the image's name
            index = self.activity.index(_slot() // 2)
            what = "an image" if index is None else self.samples.source.sample_name(index)
            explained = isinstance(error, WidekernelError)
            return Failure(what, str(error) if explained else in_short(error), traceback.format_exc(), explained)
        finally:
            self.activity.end()


class WatchedBatchOf:
    """Function from a list of samples or failures to a batch, or to the first failure."""

    def __init__(self, batch_of: BatchOf) -> None:
        self.batch_of = batch_of

    def __call__(self, samples: list[Sample | Failure]) -> Batch | Failure:
        """Return the batch, or a `Failure`."""
        for sample in samples:
            if isinstance(sample, Failure):
                return sample
        try:
            return self.batch_of(samples)  # type: ignore[arg-type]
        except Exception as error:
            return Failure(f"a batch of {len(samples)}", in_short(error), traceback.format_exc())


class _WorkerTracebackError(Exception):
    """Traceback of an error in another process, as text."""


def raise_failure(failure: Failure, workers: int) -> None:
    """Raise a `LoaderError` for `failure`, whose cause shows the traceback."""
    advice = "Check the image and the transforms."
    if failure.reason.startswith("MemoryError"):
        advice = "There is not enough memory: lower data.workers, loop.batch_size or the size of the images."
    place = "in a loading process" if workers else "in the training process"
    text = f"Loading {failure.what} failed {place} ({failure.reason.rstrip('.')}). {advice}"
    if failure.explained:
        text = f"Loading {failure.what} failed: {failure.reason}"
    raise LoaderError(text) from _WorkerTracebackError(f"\n{failure.report}")


class Watch:
    """Search for a loading process that died or hangs.

    Args:
        samples: what is loaded
        activity: what the processes are doing
        timeout: longest time to load one item, in seconds
    """

    def __init__(self, samples: TrainingSamples | EvaluationSamples, activity: Activity, timeout: float) -> None:
        self.samples, self.activity, self.timeout = samples, activity, timeout

    def check(self, processes: Sequence[BaseProcess], waiting_since: float, patience: float = 0.0) -> None:
        """Raise a `WorkerFaultError` if a process died, or if one keeps the training process waiting for too long.

        Args:
            processes: the loading processes.
            waiting_since: time (`time.monotonic()`) since when the training process waits for a batch.
            patience: seconds to wait for a process to end.
        """
        if patience and processes:
            ended = multiprocessing.connection.wait([process.sentinel for process in processes], patience)
            for process in processes:
                if process.sentinel in ended:
                    process.join(patience)
        for worker, process in enumerate(processes):
            if not process.is_alive():
                raise WorkerFaultError(f"{self._who(worker, process)} {_ending(process.exitcode)}")
        if time.monotonic() - waiting_since < self.timeout:
            return
        slow = [worker for worker in range(len(processes)) if self.activity.seconds(worker) > self.timeout]
        busy = [worker for worker in slow if self.activity.index(worker) is not None]
        if busy:
            worker = max(busy, key=self.activity.seconds)
            raise WorkerFaultError(
                f"{self._who(worker, processes[worker])} has not finished for {self.activity.seconds(worker):.0f} seconds "
                f"(data.timeout is {self.timeout:g}). Check the disk or network drive that holds the image"
            )
        if len(slow) == len(processes):
            raise WorkerFaultError(
                f"No batch has arrived from the loading processes for {self.timeout:g} seconds (data.timeout), though none "
                "of them is loading an image"
            )

    def _who(self, worker: int, process: BaseProcess) -> str:
        index = self.activity.index(worker)
        which = f"Loading process {worker} (number {process.pid})"
        if index is None:
            return f"{which}, which was loading no image,"
        return f"{which}, which was loading {self.samples.source.sample_name(index)},"


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hints = {
        "SIGKILL": ". Perhaps memory ran out: lower data.workers",
        "SIGBUS": ". Perhaps shared memory (/dev/shm) is full: lower data.workers",
        "SIGSEGV": ". Perhaps the decoder cannot take the image: check it",
    }
    return f"was killed by {name}{hints.get(name, '')}"
