"""Errors of networks and loading processes, restated in one line: what failed, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from widekernel.errors import WidekernelError, in_short

_TRACEBACK = "with WIDEKERNEL_TRACEBACK=1 in the environment, the command prints a traceback."
_SMALLER = "There is not enough memory: use smaller batches (loop.batch_size) or images ({size})."
_REMEDIES = (
    ("out of memory", _SMALLER),
    ("allocate memory", _SMALLER),
    ("more than 1 value per channel", "Batch norm needs more than one value per channel: raise loop.batch_size or {size}."),
    ("size can't be greater than actual input", "The images are too small for the network: raise {size}."),
    ("output size is too small", "The images are too small for the network: raise {size}."),
    ("doesn't match model", "The network takes images of one size only: set {size} to it, or choose another network."),
)  # fmt: skip
"""Part of PyTorch's message -> what to do; `{size}` is the setting of the size of the images."""

INPUT_SIZE = "data.input_size"
"""Setting of the size of the images of most tasks."""


class TrainingError(WidekernelError, RuntimeError):
    """Error that ends the training: the loss is not finite, or too many images are unreadable."""


class NetworkError(WidekernelError, RuntimeError):
    """Error for a network that fails when it is run."""

    causes: ClassVar = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, MemoryError)

    @staticmethod
    def remedy(error: Exception, size: str) -> str:
        """Say what to do about `error`; `size` names the setting of the size of the images."""
        text = "out of memory" if isinstance(error, MemoryError) else str(error).lower()
        otherwise = f"Check model.args, {{size}} and the batch size; {_TRACEBACK}"
        return next((remedy for sign, remedy in _REMEDIES if sign in text), otherwise).format(size=size)


class LoadingError(WidekernelError, RuntimeError):
    """Error of the processes that load images, for reasons other than an unreadable image."""

    causes: ClassVar = (RuntimeError, MemoryError, OSError)

    @staticmethod
    def remedy(error: Exception, size: str) -> str:
        """Say what to do about `error`, whatever the size of the images."""
        return (
            "There may not be enough memory for the loading processes: lower data.workers, or set it to 0 to load in the "
            f"training process and see the error there; {_TRACEBACK}"
        )


@contextmanager
def errors_as(kind: type[NetworkError | LoadingError], what: str, size: str = INPUT_SIZE) -> Iterator[None]:
    """Restate errors of the types `kind.causes` in the block as a `kind`; our own errors pass unchanged.

    Args:
        kind: kind of the error.
        what: what the block does, such as "Training step 3".
        size: setting of the size of the images.

    Raises:
        NetworkError, LoadingError: depending on `kind`.
    """
    try:
        yield
    except WidekernelError:
        raise
    except kind.causes as error:
        raise kind(f"{what} failed ({in_short(error).rstrip('.')}). {kind.remedy(error, size)}") from error
