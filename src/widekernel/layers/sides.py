"""Settings of convolutions: a number for rows and one for columns."""

from __future__ import annotations

from collections.abc import Sequence


def sides(setting: int | Sequence[int]) -> tuple[int, int]:
    """Return a stride, padding or dilation as (rows, columns).

    The constructor of `nn.Conv2d` makes a pair of one number. Code that adapts networks may set one number afterwards, or a
    sequence of it, and PyTorch computes with all of them.
    """
    both = (setting,) if isinstance(setting, int) else tuple(setting)
    return (both[0], both[-1])
