"""Random choice of anchors or proposals for training, as a function of the image's seed alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from widekernel.errors import ArgumentError


@dataclass(frozen=True)
class SampleOptions:
    """How many candidates of an image train.

    Args:
        number: positive and negative candidates together, at most
        positive_share: share of `number` that may be positive

    Raises:
        ArgumentError: if `number` is below 1 or the share not between 0 and 1.
    """

    number: int
    positive_share: float

    def __post_init__(self) -> None:
        if self.number < 1 or not 0 <= self.positive_share <= 1:
            raise ArgumentError(
                f"number is {self.number} and positive_share {self.positive_share}; a sample needs at least one candidate "
                "and a share between 0 and 1."
            )


class Sample(NamedTuple):
    """The candidates that train.

    Attributes:
        positive: (n,) bool
        negative: (n,) bool
    """

    positive: Tensor
    negative: Tensor


def permutation(seed: int, purpose: str, count: int) -> Tensor:
    """Return a random order of `count` candidates, on the CPU: each number below `count` once.

    Args:
        seed: seed of the image
        purpose: what is chosen; different purposes have unrelated orders
        count: number of candidates
    """
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    # 63 bits, since a generator's seed is a signed integer.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(count, generator=generator)


def sample(positive: Tensor, negative: Tensor, order: Tensor, options: SampleOptions) -> Sample:
    """Choose candidates: positive ones up to their share, and negative ones up to the number.

    The host does not wait for the device.

    Args:
        positive: (n,) bool, candidates to choose from
        negative: (n,) bool
        order: (n,) int64 on the same device; of the positive and of the negative candidates, those with the lowest numbers
            are chosen
        options: how many
    """
    chosen = _first(positive, order, int(options.number * options.positive_share), None)
    return Sample(chosen, _first(negative, order, options.number, options.number - chosen.sum()))


def _first(eligible: Tensor, order: Tensor, most: int, limit: Tensor | None) -> Tensor:
    """Choose at most `most` candidates, of which at most `limit`, a number on the device."""
    last = torch.iinfo(order.dtype).max
    ranked, places = torch.where(eligible, order, last).topk(min(most, len(order)), largest=False, sorted=True)
    chosen = ranked < last
    if limit is not None:
        chosen &= torch.arange(len(chosen), device=chosen.device) < limit
    return torch.zeros_like(eligible).scatter(0, places, chosen)
