"""Choice of weights or blocks to prune and to grow: the k smallest or largest scores (ties by position), or k at random."""

from __future__ import annotations

import torch
from torch import Tensor

from widekernel.sparsity.named_seeds import named_seed


def smallest(scores: Tensor, k: int, among: Tensor) -> Tensor:
    """Mark the `k` smallest `scores` (n,) among those where `among` (n,) is True; of equal scores, the first."""
    picked = torch.zeros_like(among)
    if k == 0:
        return picked
    places = among.nonzero().squeeze(1)
    values = scores[places]
    threshold = values.kthvalue(k).values
    below, equal = values < threshold, values == threshold
    first = equal & (equal.cumsum(0) <= k - below.sum())
    picked[places[below | first]] = True
    return picked


def largest(scores: Tensor, k: int, among: Tensor) -> Tensor:
    """Mark the `k` largest `scores` (n,) among those where `among` (n,) is True; of equal scores, the first."""
    return smallest(-scores, k, among)


def at_random(k: int, among: Tensor, generator: torch.Generator) -> Tensor:
    """Mark `k` places drawn without replacement where `among` (n,) is True."""
    picked = torch.zeros_like(among)
    places = among.nonzero().squeeze(1)
    order = torch.randperm(places.numel(), generator=generator, device=generator.device)[:k]
    picked[places[order]] = True
    return picked


def generator_for(device: torch.device, seed: int, update: int, name: str) -> torch.Generator:
    """Return the generator for one update of one layer; its numbers depend only on the arguments.

    Every process draws the same numbers, a resumed run needs no generator state, and no other generator is disturbed.
    """
    return torch.Generator(device).manual_seed(int.from_bytes(named_seed(seed, update, name), "big") >> 1)


def protected_by_fan_in(scores: Tensor, live: Tensor, shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Mark the `fan_in` live elements with the largest scores of every output channel.

    Args:
        scores: (n,), in the order of a weight of `shape`.
        live: (n,) bool.
        shape: shape of the weight, output channels first.
        fan_in: elements to mark per output channel.
    """
    rows = scores.masked_fill(~live, -torch.inf).view(shape[0], -1)
    kept = torch.zeros_like(rows, dtype=torch.bool)
    kept.scatter_(1, torch.sort(rows, dim=1, descending=True, stable=True).indices[:, :fan_in], True)
    return kept.view(-1) & live
