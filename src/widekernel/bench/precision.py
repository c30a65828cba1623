"""The numeric precisions that are timed, how exact each must be, and the PyTorch settings that select them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from widekernel.settings import parse_names


@dataclass(frozen=True)
class Precision:
    """A type of numbers and the way in which PyTorch computes with it.

    Attributes:
        name: for tables and the command line.
        dtype: of the tensors.
        tolerance: largest error allowed against float64, relative to the largest number.
        matmul: argument of `torch.set_float32_matmul_precision`; `high` allows products of float32 tensors in TF32.
    """

    name: str
    dtype: torch.dtype
    tolerance: float
    matmul: str = "highest"

    @property
    def agreement_tolerance(self) -> float:
        """Largest difference allowed between two implementations, both of which round sums over all images."""
        return 1e-4 if self is FLOAT32 else 2 * self.tolerance

    @property
    def bytes(self) -> int:
        """Bytes per number."""
        return self.dtype.itemsize

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that networks with float32 parameters are autocast to; None for no autocast."""
        return None if self.dtype == torch.float32 else self.dtype

    def autocasting(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context in which such networks compute in this precision on a device."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)


FLOAT32 = Precision("float32", torch.float32, 1e-5)
TF32 = Precision("tf32", torch.float32, 2e-3, "high")
FLOAT16 = Precision("float16", torch.float16, 4e-3)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, 1.6e-2)

PRECISIONS = {precision.name: precision for precision in (BFLOAT16, TF32, FLOAT16, FLOAT32)}
"""In the order in which they are timed: the most common ones first, because time may run out."""


def parse_precisions(text: str) -> list[Precision]:
    """Parse names separated by commas; return the precisions in the order of `PRECISIONS`.

    Raises:
        ArgumentError: if a name is unknown.
    """
    return [PRECISIONS[name] for name in parse_names("dtypes", text, PRECISIONS)]


@contextmanager
def in_force(precision: Precision, search: bool = True) -> Iterator[None]:
    """Make PyTorch compute in `precision` inside the block, and restore all settings afterwards.

    The settings are changed by PyTorch's older interface alone, which refuses to answer once both have been used. The values
    of the newer one, which follow, are restored as well.

    Args:
        precision: to compute in.
        search: whether cuDNN searches for its fastest algorithm in the first call of each shape, which takes time.
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
