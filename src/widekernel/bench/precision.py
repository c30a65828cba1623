"""The numeric precisions that are timed, the accuracy required of each, and the PyTorch settings that select them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from widekernel.settings import parse_names


@dataclass(frozen=True)
class Precision:
    """A type of numbers, and PyTorch's setting for products in it.

    Attributes:
        name: name in tables and on the command line.
        dtype: type of the tensors.
        tolerance: largest allowed error against float64, relative to the largest number.
        matmul: argument of `torch.set_float32_matmul_precision`; `high` allows products of float32 tensors in TF32.
    """

    name: str
    dtype: torch.dtype
    tolerance: float
    matmul: str = "highest"

    @property
    def agreement_tolerance(self) -> float:
        """Largest allowed difference between two implementations, both of which round sums over all images."""
        return 1e-4 if self is FLOAT32 else 2 * self.tolerance

    @property
    def bytes(self) -> int:
        """Bytes per number."""
        return self.dtype.itemsize

    @property
    def autocast(self) -> torch.dtype | None:
        """The autocast type of networks with float32 parameters; None for no autocast."""
        return None if self.dtype == torch.float32 else self.dtype

    def autocasting(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context in which networks with float32 parameters compute in this precision on a device."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)


FLOAT32 = Precision("float32", torch.float32, 1e-5)
TF32 = Precision("tf32", torch.float32, 2e-3, "high")
FLOAT16 = Precision("float16", torch.float16, 4e-3)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, 1.6e-2)

INT8 = Precision("int8", torch.int8, 0.1)
"""Factors of products in inference on a CPU; no tensor has this type."""

PRECISIONS = {precision.name: precision for precision in (BFLOAT16, TF32, FLOAT16, FLOAT32)}
"""The precisions in the order in which they are timed: the most common first, because time may run out."""


def parse_precisions(text: str, more: Sequence[Precision] = ()) -> list[Precision]:
    """Parse names separated by commas; return the precisions in the order of `PRECISIONS`.

    Args:
        text: the names.
        more: precisions that are known besides `PRECISIONS`.

    Raises:
        ArgumentError: if a name is unknown.
    """
    known = PRECISIONS | {precision.name: precision for precision in more}
    return [known[name] for name in parse_names("dtypes", text, known)]


@contextmanager
def in_force(precision: Precision, search: bool = True) -> Iterator[None]:
    """Make PyTorch compute in `precision` inside the block, and restore all settings afterwards.

    The settings are changed only through PyTorch's older interface, because its getters raise once both interfaces have been
    used. The values of the newer interface change along with them and are restored as well.

    Args:
        precision: the precision to compute in.
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
