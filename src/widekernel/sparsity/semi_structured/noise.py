"""Random numbers that are a function of (seed, step, name): the same on every rank, and after a restart."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from widekernel.sparsity.named_seeds import named_seed

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def uniform(shape: Sequence[int], seed: int, step: int, name: str, device: torch.device | str = "cpu") -> Tensor:
    """Draw float32 numbers from the open interval (0, 1), without using any generator.

    Elements 2i and 2i + 1 are the two halves of a hash of i and (seed, step, name): SplitMix64 (Steele et al., OOPSLA 2014)
    as a counter. It is integer arithmetic, so every device yields the same bits.
    """
    start = int.from_bytes(named_seed(seed, step, name), "little", signed=True)
    count = prod(shape)
    x = torch.arange(1, count // 2 + 2, dtype=torch.int64, device=device).mul_(_GOLDEN).add_(start)
    x.bitwise_xor_(_shifted(x, 30)).mul_(_FIRST)
    x.bitwise_xor_(_shifted(x, 27)).mul_(_SECOND)
    x.bitwise_xor_(_shifted(x, 31))
    halves = torch.stack([_shifted(x, 41), x.bitwise_and_((1 << 23) - 1)], 1).flatten()[:count]
    # 23 bits plus one half: neither 0 nor 1 after rounding to float32.
    return halves.to(torch.float32).add_(0.5).mul_(2.0**-23).reshape(tuple(shape))


def gumbel(shape: Sequence[int], seed: int, step: int, name: str, device: torch.device | str = "cpu") -> Tensor:
    """Draw standard Gumbel noise, float32, as `uniform` does."""
    return uniform(shape, seed, step, name, device).log_().neg_().log_().neg_()


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros (the shift of int64 fills with the sign)."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)
