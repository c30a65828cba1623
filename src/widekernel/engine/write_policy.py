"""What happens when a file of a run cannot be written: training stops, or goes on for some time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from widekernel.errors import WidekernelError

OnFailure = Literal["stop", "continue"]


@dataclass
class Attempt:
    """Outcome of writing a file.

    Args:
        succeeded: whether it was written
    """

    succeeded: bool = False


class WritePolicy:
    """Policy for files that cannot be written, for example because the disk is full.

    Args:
        on_failure: "stop" raises the error; "continue" reports it, so that training goes on without the file
        max_failures: number of failures in a row of the same kind of file with which "continue" stops, too
        report: function that receives messages
    """

    def __init__(
        self, on_failure: OnFailure = "stop", max_failures: int = 5, report: Callable[[str], None] | None = None
    ) -> None:
        self.on_failure = on_failure
        self.max_failures = max_failures
        self._report = report or (lambda text: None)
        self._in_a_row: Counter[str] = Counter()

    @contextmanager
    def attempt(self, what: str) -> Iterator[Attempt]:
        """Apply the policy to the failure of the block, which writes `what`, for example "the training state".

        Raises:
            WidekernelError: it cannot be written, and training is to stop.
        """
        attempt = Attempt()
        try:
            yield attempt
        except (WidekernelError, OSError) as error:
            self.failed(what, error)
        else:
            attempt.succeeded = True
            self._in_a_row[what] = 0

    def failed(self, what: str, error: WidekernelError | OSError) -> None:
        """Apply the policy to `error`, because of which `what` was not written.

        Raises:
            WidekernelError: training is to stop.
        """
        if self.on_failure == "stop":
            raise error
        self._in_a_row[what] += 1
        times = self._in_a_row[what]
        if times >= self.max_failures:
            raise WidekernelError(
                f"{error} Training stops, because {what} could not be written {times} times in a row "
                f"(checkpoint.max_failures is {self.max_failures})."
            ) from error
        self._report(f"{error} Training goes on without it (failure {times} of at most {self.max_failures} in a row).")
