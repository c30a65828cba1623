"""Search for an order of a matrix's columns in which 2:4 masks lose less magnitude."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from widekernel.errors import ShapeError

MOST_ROWS = 1024  # of larger matrices, the search uses a sample of this many rows; all rows judge the result


@torch.no_grad()
def kept_magnitude(matrix: Tensor) -> float:
    """Return the share of the summed magnitude of (R, C) that the two largest of every four consecutive columns hold."""
    magnitudes = matrix.detach().double().abs()
    total = float(magnitudes.sum())
    kept = float(magnitudes.reshape(-1, 4).topk(2, 1).values.sum())
    return kept / total if total else 1.0


@torch.no_grad()
def search_permutation(matrix: Tensor, rounds: int = 200, escapes: int = 10, seed: int = 0) -> Tensor:
    """Return an order of the columns in which keeping two of every four keeps more of the magnitude.

    Only the assignment of columns to stripes of four matters. In every round, stripes are paired, and each pair exchanges
    the two columns that gain most, if any exchange is a gain. After S - 1 rounds, each of the S stripes has met every other
    one. If that many rounds bring no gain, some columns are exchanged at random, and the search continues. The best order
    found is returned (Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021, but with a budget of rounds instead
    of time).

    Args:
        matrix: (R, C), C a multiple of 4.
        rounds: largest number of rounds.
        escapes: largest number of random exchanges.
        seed: seed of the pairing and of the random exchanges; the result depends on nothing else.

    Returns:
        (C,) int64; `matrix[:, result]` keeps at least as much as `matrix`.
    """
    if matrix.dim() != 2 or matrix.shape[1] % 4 or not matrix.shape[1]:
        raise ShapeError(f"a matrix of shape {tuple(matrix.shape)} has no stripes: it must be (R, C) with C a multiple of 4")
    generator = random.Random(seed)
    magnitudes = matrix.detach().float().abs().nan_to_num()
    rows, columns = magnitudes.shape
    if rows > MOST_ROWS:
        magnitudes = magnitudes[sorted(generator.sample(range(rows), MOST_ROWS))]
    identity = torch.arange(columns, device=matrix.device)
    if columns == 4:
        return identity
    order = _search(magnitudes.T.contiguous(), rounds, escapes, generator)
    order = order.reshape(-1, 4).sort(1).values
    order = order[order[:, 0].argsort()].flatten()
    return order if kept_magnitude(matrix[:, order]) > kept_magnitude(matrix) else identity


def _search(columns: Tensor, rounds: int, escapes: int, generator: random.Random) -> Tensor:
    """Search for an order of `columns`, the magnitudes (C, R)."""
    stripes = columns.shape[0] // 4
    order = torch.arange(columns.shape[0], device=columns.device).reshape(stripes, 4)
    best, most = order.clone(), _kept(columns, order)
    idle, seats = 0, list(range(stripes + stripes % 2))
    generator.shuffle(seats)
    for _ in range(rounds):
        half = len(seats) // 2
        pairs = [(i, j) for i, j in zip(seats[:half], reversed(seats[half:])) if max(i, j) < stripes]
        seats = [seats[0], seats[-1], *seats[1:-1]]  # a round-robin tournament: one stripe stays, the others move on
        idle = 0 if _exchange(columns, order, pairs) else idle + 1
        if idle < len(seats) - 1:
            continue
        kept = _kept(columns, order)
        if kept > most:
            best, most = order.clone(), kept
        if not escapes:
            break
        escapes, idle = escapes - 1, 0
        order = best.clone()
        for _ in range(max(1, stripes // 4)):
            i, j = generator.sample(range(stripes), 2)
            a, b = generator.randrange(4), generator.randrange(4)
            order[i, a], order[j, b] = order[j, b].clone(), order[i, a].clone()
    return order if _kept(columns, order) > most else best


def _kept(columns: Tensor, order: Tensor) -> float:
    return float(columns[order].topk(2, 1).values.double().sum())


def _exchange(columns: Tensor, order: Tensor, pairs: list[tuple[int, int]]) -> bool:
    """Let each pair of stripes exchange the columns that gain most; return whether any pair did."""
    left, right = (torch.tensor(side, device=order.device) for side in zip(*pairs))
    a, b = columns[order[left]], columns[order[right]]  # (P, 4, R)
    alone_a, second_a = _without_each(a)
    alone_b, second_b = _without_each(b)
    # The two largest of three columns and a fourth: the largest of the three, and the larger of the second and the fourth.
    after_a = alone_a.unsqueeze(2) + torch.maximum(second_a.unsqueeze(2), b.unsqueeze(1)).sum(3)
    after_b = alone_b.unsqueeze(1) + torch.maximum(second_b.unsqueeze(1), a.unsqueeze(2)).sum(3)
    before = a.topk(2, 1).values.sum((1, 2)) + b.topk(2, 1).values.sum((1, 2))
    gain, at = (after_a + after_b).flatten(1).max(1)
    better = gain > before * (1 + 1e-6)  # more than rounding can turn a tie into
    if not bool(better.any()):
        return False
    left, right, at = left[better], right[better], at[better]
    row, column = at // 4, at % 4
    order[left, row], order[right, column] = order[right, column].clone(), order[left, row].clone()
    return True


def _without_each(stripe: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of the three other columns of each column, summed, and the second largest.

    Args:
        stripe: (P, 4, R).

    Returns:
        (P, 4) and (P, 4, R).
    """
    others = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]], device=stripe.device)
    x, y, z = (stripe[:, others[:, i]] for i in range(3))
    high, low = torch.maximum(x, y), torch.minimum(x, y)
    return torch.maximum(high, z).sum(2), torch.maximum(low, torch.minimum(high, z))
