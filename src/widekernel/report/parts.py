"""What all sections share: the options of a report, progress, and sections without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from widekernel.settings import require

Progress = Callable[[str, int, int], None]
"""Function that receives a text on the current work, the number of steps done, and their total; 0 if it is unknown."""


def silent(_what: str, _done: int, _total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Missing:
    """A section without data.

    Attributes:
        reason: why there are none.
        advice: what the user can do to get them; may hold a command in backquotes.
    """

    reason: str
    advice: str


@dataclass(frozen=True)
class ReportOptions:
    """Settings of a report.

    Args:
        time: time the network in all its forms on this machine
        seconds: seconds for which each form is timed
        batch_sizes: images per call that are timed
        eval_images: most held-out images on which the accuracy is measured; more are drawn from at random
        batch_size: images per forward pass when the accuracy is measured
        erf_images: images over which the effective receptive field is averaged
        erf_size: height and width of the input of the effective receptive field in pixels; null means four times the
            network's own size, but at most 512
        cka_images: images on which two networks are compared
        input_size: height and width of the input in pixels for costs and times; null means the network's own
        seed: seed of the choice of images
        device: auto (CUDA if available), cpu, cuda or cuda:N
    """

    time: bool = True
    seconds: float = 0.5
    batch_sizes: tuple[int, ...] = (1, 16)
    eval_images: int = 10_000
    batch_size: int = 64
    erf_images: int = 20
    erf_size: int | None = None
    cka_images: int = 128
    input_size: int | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for key in ("seconds", "eval_images", "batch_size", "erf_images", "erf_size", "cka_images", "input_size"):
            value = getattr(self, key)
            require(value is None or value > 0, key, value, "positive")
        ok = bool(self.batch_sizes) and min(self.batch_sizes, default=0) > 0
        require(ok, "batch_sizes", list(self.batch_sizes), "one or more positive numbers, such as [1, 16]")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
