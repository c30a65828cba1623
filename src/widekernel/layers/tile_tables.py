"""Arrangement tables: which tile is in which slot of a strip, drawn as by the authors of Shift-wise convolution.

The tables come from a private generator and are part of the state dict, so a network does not depend on the random numbers
of the PyTorch version that loads it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import _disable_current_modes

from widekernel.ops.jit_trace import static_shape

TABLE_SEED = 123  # the seed in the authors' code


def draw_tables(channels: int, num_tiles: int, groups: int) -> tuple[Tensor, Tensor]:
    """Draw the arrangement tables of Shift-wise convolution.

    Returns:
        tile_at: (2, groups, C, nk) int32 on the CPU; entry [d, g, c, slot] is the tile in that slot (d = 0: the wide
            strip).
        centre: (groups, C) int32 on the CPU, the tile that the third branch uses; that branch shifts no tile.
    """
    # Copies, on the CPU whatever the default device is.
    tile_at, centre = (torch.tensor(table, device="cpu") for table in _drawn_tables(channels, num_tiles, groups))
    return tile_at, centre


def draw_ordered_table(channels: int, num_tiles: int, branches: int) -> Tensor:
    """Draw a table (2, branches, C, nk) in which the tiles of the first wide strip are in order."""
    tile_at, _ = draw_tables(channels, num_tiles, branches)
    tile_at[0, 0] = torch.arange(num_tiles, dtype=tile_at.dtype, device="cpu")
    return tile_at


def arrangement_problem(table: Tensor) -> str:
    """Return what is wrong with a table (2, groups, C, nk) read from a file; "" if every row is a permutation."""
    slots = torch.arange(table.shape[-1], dtype=table.dtype)
    return "" if torch.equal(table.cpu().sort(-1).values, slots.expand_as(table)) else "is not made of permutations"


def take_sum(flat: Tensor, table: Tensor, channels: int) -> Tensor:
    """Select the rows of `flat` (C·nk, taps) that a table names and add them up over the groups.

    TorchScript compiles this function.

    Args:
        flat: the tiles; those of a channel are consecutive.
        table: (groups, C) or (groups, C, slots), indices of tiles within their channel.
        channels: C.

    Returns:
        (C·slots, taps)
    """
    num_tiles = static_shape(flat)[0] // channels
    start = torch.arange(channels, device=flat.device).unsqueeze(1) * num_tiles
    groups = table if table.dim() == 3 else table.unsqueeze(2)
    if torch.jit.is_scripting():  # without loops over lists, which some converters cannot read
        every = (groups.long() + start).flatten()
        return flat.index_select(0, every).unflatten(0, (groups.size(0), -1)).sum(0)
    # One gather per group: within a group, no row is selected twice, so that the gradient is summed in a fixed order.
    rows = [(group.long() + start).flatten() for group in groups.unbind(0)]
    total = flat.index_select(0, rows[0])
    for row in rows[1:]:
        total = total + flat.index_select(0, row)
    return total


@lru_cache(maxsize=64)  # the blocks of a stage have the same tables, and drawing them dominates the construction
def _drawn_tables(channels: int, num_tiles: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    # Real numbers from the CPU's generator, even if the default device is the meta device or a GPU.
    with _disable_current_modes(), torch.device("cpu"):
        generator = Generator().manual_seed(TABLE_SEED)
        drawn = [torch.randperm(num_tiles, generator=generator) for _ in range(2 * groups * channels)]
        tile_at = torch.stack(drawn).view(2, groups, channels, num_tiles)
        centre = torch.stack([torch.randint(0, num_tiles, (channels,), generator=generator) for _ in range(groups)])
        return tile_at.to(torch.int32).numpy(), centre.to(torch.int32).numpy()
