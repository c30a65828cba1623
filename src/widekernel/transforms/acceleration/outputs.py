"""What a lower precision changes in the outputs of a network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class OutputDeviation:
    """The outputs for an example before and after acceleration.

    Attributes:
        relative: norm of the difference, relative to the norm of the outputs before.
        largest: largest difference, relative to the largest number before.
        cosine: cosine similarity of both; 1 for the same direction.
        images: N, if the only floating-point output is (N, D) with D > 1, such as the classes of N images; None otherwise.
        same_class: in how many of these rows the largest output is in the same place, such as the top class of an image.
    """

    relative: float
    largest: float
    cosine: float
    images: int | None = None
    same_class: int | None = None

    @classmethod
    def of(cls, before: Any, after: Any) -> OutputDeviation:
        """Compare outputs of the same structure, which may be nested; what is not a floating-point tensor does not count."""
        pairs = [
            (old, new)
            for old, new in zip(tree_leaves(before), tree_leaves(after))
            if isinstance(old, Tensor) and old.is_floating_point()
        ]
        if not pairs:
            return cls(0.0, 0.0, 1.0)
        old, new = (torch.cat([pair[i].detach().double().flatten() for pair in pairs]) for i in (0, 1))
        difference, tiny = new - old, torch.finfo(torch.float64).tiny
        size = old.norm().clamp_min(tiny)
        cosine = (old @ new) / (size * new.norm().clamp_min(tiny))
        numbers = (
            (difference.norm() / size).item(),
            (difference.abs().max() / old.abs().max().clamp_min(tiny)).item(),
            cosine.item(),
        )
        has_rows = len(pairs) == 1 and pairs[0][0].dim() == 2 and pairs[0][0].shape[1] > 1
        if not has_rows:
            return cls(*numbers)
        tops = [output.argmax(1) for output in pairs[0]]
        return cls(*numbers, len(tops[0]), int((tops[0] == tops[1]).sum()))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a sentence."""
        text = f"The outputs differ by {self.relative:.1e} of their norm (cosine {self.cosine:.6f})"
        if self.images is None:
            return f"{text}."
        return f"{text}; the largest output stays in its place for {self.same_class} of {self.images} images."
