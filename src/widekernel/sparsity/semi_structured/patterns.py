"""Patterns that keep two of four weights (there are six), and choices among them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# In lexicographic order. The choice of a group of four weights is the index of its pattern (uint8, 0..5). Masks are derived
# from choices and never stored.
PATTERNS = ((0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0), (1, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0))
COUNT = len(PATTERNS)


@cache
def _table(device: torch.device) -> Tensor:
    # A cached tensor that was made in inference mode could not be used for training later.
    with torch.inference_mode(False):
        return torch.tensor(PATTERNS, dtype=torch.bool, device=device)


def pattern_table(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool) -> Tensor:
    """Return the patterns as a new (6, 4) tensor; it is not a parameter, so no optimizer can change it."""
    return _table(torch.device(device)).to(dtype=dtype, copy=True)


@cache
def _slots(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        kept = [[slot for slot, bit in enumerate(pattern) if bit] for pattern in PATTERNS]
        return torch.tensor(kept, dtype=torch.int64, device=device)


def kept_slots(choices: Tensor) -> Tensor:
    """Return the two kept slots of each group in ascending order: (G,) uint8 -> (G, 2) int64."""
    return _slots(choices.device)[choices.long()]


def bits_of(choices: Tensor) -> Tensor:
    """Return the pattern of each group: (G,) uint8 -> (G, 4) bool."""
    return _table(choices.device)[choices.long()]


def legal_patterns(valid: Tensor) -> Tensor:
    """Return the patterns that keep as many real weights as the group allows.

    Args:
        valid: (G, 4) bool, False where a slot is padding.

    Returns:
        (G, 6) bool; all True for a group without padding.
    """
    kept = valid.to(torch.float32) @ _table(valid.device).to(torch.float32).T
    return kept == valid.sum(1, keepdim=True).clamp(max=2)


def best_choices(scores: Tensor, valid: Tensor) -> Tensor:
    """Return the choice that keeps the two real slots of highest score in each group.

    This is the pattern of largest summed score, found by comparing scores, because rounding could make sums equal. Of
    equally good patterns the one of lowest index wins, so of two equal weights the later one is kept. NaN counts as the
    highest score. A padded slot never takes the place of a real one.

    Args:
        scores: (G, 4), of any real type, 0 or more.
        valid: (G, 4) bool, False where a slot is padding.

    Returns:
        (G,) uint8.
    """
    values = scores if scores.dtype == torch.float64 else scores.to(torch.float32)
    values = torch.where(values.isnan(), torch.inf, values)
    values = torch.where(valid, values, -1.0)
    mine, other = values.unsqueeze(2), values.unsqueeze(1)
    slot = torch.arange(4, device=values.device)
    later = slot.unsqueeze(0) > slot.unsqueeze(1)
    beaten_by = ((other > mine) | ((other == mine) & later)).sum(2)
    return choices_of_bits(beaten_by < 2)


def choices_of_bits(bits: Tensor) -> Tensor:
    """Return the choices whose patterns are `bits`, (G, 4) bool with exactly two True in each row: (G,) uint8."""
    return (bits.unsqueeze(1) == _table(bits.device)).all(2).to(torch.uint8).argmax(1).to(torch.uint8)
