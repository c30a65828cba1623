"""How far the results of a fused block may be from those of its code, and how far they are."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-6, "int8": 2**-5}
"""By precision, the largest difference between a fused block and its original, relative to the largest number.

In bfloat16, rounding changes a factor by up to 2⁻⁹, a product by 2⁻⁸, and two products in turn by 2⁻⁷ of the sum of
absolute values. Rounding errors have different signs, so the difference is usually a fraction of that. It is larger only
where sums cancel, and there a lower precision is not suitable. In int8, rounding changes a factor of a pixel by up to 1/510
of the range of its channels, and a weight by up to 1/254 of the largest one, and the difference is usually 1 to 1.6 %. It is
larger where a few channels are much larger than the others. These limits do not have to find errors in what is computed,
which are excluded in float32.
"""


class Deviation(NamedTuple):
    """A comparison: the largest difference relative to the largest number, and what is wrong with it, "" if nothing."""

    size: float = 0.0
    reason: str = ""


def deviation(got: Any, want: Any, tolerance: float) -> Deviation:
    """Compare two outputs, which may be nested."""
    ours, theirs = tree_leaves(got), tree_leaves(want)
    if len(ours) != len(theirs):
        return Deviation(reason="the outputs have different structures")
    size = 0.0
    for a, b in zip(ours, theirs):
        if not isinstance(b, Tensor):
            continue
        if not isinstance(a, Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
            return Deviation(reason="the outputs have different shapes")
        largest = b.abs().max().item()
        if largest == 0:
            return Deviation(reason="its output is zero for the example, so that nothing can be compared")
        error = (a - b).abs().max().item() / largest
        # Written so that NaN counts as different.
        if not error <= tolerance:
            return Deviation(error, f"the output differs by {error:.1e} of its largest number")
        size = max(size, error)
    return Deviation(size)
