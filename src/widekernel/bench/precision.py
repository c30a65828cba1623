"""The types that are timed, how exact each of them has to be, and the settings of PyTorch under which it is timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from widekernel.errors import ArgumentError, nearest


@dataclass(frozen=True)
class Precision:
    """A type of numbers, or a way of computing with it.

    Attributes:
        name: for tables and the command line.
        dtype: of the tensors.
        tolerance: largest difference from float64 allowed, relative to the largest number.
        matmul: what `torch.set_float32_matmul_precision` is set to: `high` allows float32 tensors to be multiplied as tf32.
    """

    name: str
    dtype: torch.dtype
    tolerance: float
    matmul: str = "highest"

    @property
    def rivals_tolerance(self) -> float:
        """Largest difference of two rivals allowed, each of which is off by its rounding of sums over all images."""
        return 1e-4 if self is FLOAT32 else 2 * self.tolerance

    @property
    def bytes(self) -> int:
        """Of a number."""
        return self.dtype.itemsize

    @property
    def autocast(self) -> torch.dtype | None:
        """What networks with float32 parameters are autocast to; None: nothing."""
        return None if self.dtype == torch.float32 else self.dtype


FLOAT32 = Precision("float32", torch.float32, 1e-5)
TF32 = Precision("tf32", torch.float32, 2e-3, "high")
FLOAT16 = Precision("float16", torch.float16, 4e-3)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, 1.6e-2)

PRECISIONS = {precision.name: precision for precision in (BFLOAT16, TF32, FLOAT16, FLOAT32)}
"""In the order in which they are timed: what is most used comes first, because time may run out."""


def parse_precisions(text: str) -> list[Precision]:
    """Read names separated by commas.

    Raises:
        ArgumentError: if one is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PRECISIONS:
            raise ArgumentError(
                f"dtypes has {name!r}.{nearest(name, PRECISIONS)} It takes {', '.join(PRECISIONS)}, with commas."
            )
    return [precision for name, precision in PRECISIONS.items() if name in names]


def names_of(precisions: Sequence[Precision]) -> str:
    """Give what `parse_precisions` reads."""
    return ",".join(precision.name for precision in precisions)


@contextmanager
def in_force(precision: Precision, search: bool = True) -> Iterator[None]:
    """Let PyTorch compute in `precision` inside the block.

    All settings are afterwards what they were. They are set by PyTorch's older interface alone, since it refuses to answer
    once both have been used; the newer one's values, which follow, are put back as well.

    Args:
        precision: to compute in.
        search: whether cuDNN looks for its fastest way in the first call of each shape, which takes time.
    """
    backends = torch.backends
    newer = [(of, of.fp32_precision) for of in (backends.cuda.matmul, backends.mkldnn.matmul)]  # type: ignore[attr-defined]
    newer += [(of, of.fp32_precision) for of in (backends.cudnn.conv, backends.cudnn.rnn)]  # type: ignore[attr-defined]
    before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32, backends.cudnn.benchmark
    try:
        torch.set_float32_matmul_precision(precision.matmul)
        backends.cudnn.allow_tf32 = precision.matmul == "high"
        backends.cudnn.benchmark = search
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        backends.cudnn.allow_tf32 = before[1]
        backends.cudnn.benchmark = before[2]
        for of, value in newer:
            of.fp32_precision = value
