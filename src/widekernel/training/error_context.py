"""What a network raises when it is run on images that it cannot take, and what loading them raises, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

from widekernel.errors import WidekernelError, in_short

_OF_NETWORKS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, MemoryError)
_SMALLER = "The memory does not suffice: use smaller batches (loop.batch_size) or images (data.input_size)."
_REMEDIES = (
    ("out of memory", _SMALLER),
    ("allocate memory", _SMALLER),
    ("more than 1 value per channel", "Batch norm needs more than one value per channel: raise loop.batch_size or "
                                      "data.input_size."),
    ("size can't be greater than actual input", "The images are too small for the network: raise data.input_size."),
    ("output size is too small", "The images are too small for the network: raise data.input_size."),
    ("doesn't match model", "The network takes images of one size only: leave data.input_size out."),
)  # fmt: skip
_OTHERWISE = (
    "Check model.args, data.input_size and the batch size; with WIDEKERNEL_TRACEBACK=1 in the environment the command "
    "shows where it happened."
)


class NetworkError(WidekernelError, RuntimeError):
    """A network that fails when it is run."""


class LoadingError(WidekernelError, RuntimeError):
    """Processes that load images and fail, not because of an image."""


@contextmanager
def explained_failure(what: str) -> Iterator[None]:
    """Within the block, an error of PyTorch's becomes a `NetworkError` that says what failed, why and what to do.

    Args:
        what: what is done in the block, such as "The first training step".

    Raises:
        NetworkError: the block raised one.
    """
    try:
        yield
    except WidekernelError:
        raise
    except _OF_NETWORKS as error:
        text = str(error).lower()
        remedy = next((remedy for sign, remedy in _REMEDIES if sign in text), _OTHERWISE)
        if isinstance(error, MemoryError):
            remedy = _SMALLER
        raise NetworkError(f"{what} failed ({in_short(error).rstrip('.')}). {remedy}") from error


@contextmanager
def explained_loading(what: str) -> Iterator[None]:
    """Within the block, an error of the processes that load images becomes a `LoadingError`.

    Args:
        what: what is done in the block, such as "Loading the images of training step 3".

    Raises:
        LoadingError: the block raised one.
    """
    try:
        yield
    except WidekernelError:
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        raise LoadingError(
            f"{what} failed ({in_short(error).rstrip('.')}). The memory may not suffice for the loading processes: lower "
            "data.workers, or set it to 0 to load in the training process and see what happens; "
            "with WIDEKERNEL_TRACEBACK=1 in the environment the command shows where it happened."
        ) from error
