"""Wide kernels made of small square tiles: a strip is cut into N x N tiles, which are kept apart, shared or moved.

A row of nk = ceil(K / N) tiles is a strip of nk·N taps that is anchored where the K-tap kernel has its middle, K // 2.
Shifting and adding the outputs of the tiles, as the papers do it, equals one depthwise convolution with that strip, borders
included; so every source here yields strips, and no feature map is ever nk times as large as its input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, empty, nn
from torch.utils._python_dispatch import _disable_current_modes

from widekernel.errors import ArgumentError
from widekernel.layers.rect import Rect
from widekernel.layers.sources import RectSource, check_odd
from widekernel.ops.jit_trace import static_shape

TABLE_SEED = 123  # the seed that the Shift-wise authors' code draws its tables with


def num_tiles(big: int, small: int) -> int:
    """How many `small`-wide tiles stand for `big` taps."""
    return math.ceil(big / small)


def tall_strip(tiles: Tensor, big: int) -> Rect:
    """Stack tiles (C, nk, N, N) below one another into a rectangle of nk·N x N taps."""
    return Rect(stacked(tiles), (big // 2, tiles.shape[3] // 2))


def wide_strip(tiles: Tensor, big: int) -> Rect:
    """Put tiles (C, nk, N, N) side by side into a rectangle of N x nk·N taps."""
    return Rect(side_by_side(tiles), (tiles.shape[2] // 2, big // 2))


def stacked(tiles: Tensor) -> Tensor:
    """Stack tiles (C, nk, N, N) below one another: (C, 1, nk·N, N)."""
    channels, count, height, width = static_shape(tiles)
    return tiles.reshape(channels, 1, count * height, width)


def side_by_side(tiles: Tensor) -> Tensor:
    """Put tiles (C, nk, N, N) side by side: (C, 1, N, nk·N)."""
    channels, count, height, width = static_shape(tiles)
    return tiles.transpose(1, 2).reshape(channels, 1, height, count * width)


def cut_into_tiles(strip: Tensor, small: int) -> Tensor:
    """Cut a strip (C, 1, K, N) or (C, 1, N, K) into its tiles (C·nk, 1, N, N), zeros filling up the last one.

    The tiles of a channel follow one another, from the top or from the left.
    """
    channels, _, kh, kw = strip.shape
    along = 2 if kh > kw else 3
    big = max(kh, kw)
    if min(kh, kw) != small or big < small:
        raise ArgumentError(f"a {kh}x{kw} kernel is not a strip of {small}x{small} tiles: one side must be {small}")
    count = num_tiles(big, small)
    missing = count * small - big
    strip = F.pad(strip, (0, 0, 0, missing) if along == 2 else (0, missing))
    if along == 2:
        return strip.reshape(channels * count, 1, small, small)
    return strip.reshape(channels, small, count, small).transpose(1, 2).reshape(channels * count, 1, small, small)


def tile_convolution_padding(big: int, small: int) -> int:
    """Padding that the authors' tile convolution uses along the strip, which decides how many positions it computes.

    The smallest number congruent to K // 2 modulo N that loses no tile touching the image.
    """
    count = num_tiles(big, small)
    after = count * small - 1 - big // 2 - (count - 1) * small
    need = max(after, small - 1)
    return need + (big // 2 - need) % small


class SplitStrips(RectSource):
    """Two strips, K x N and N x K, each made of tiles of its own (SLaK_reg).

    Args:
        channels: C.
        big: K, odd.
        small: N, odd, smaller than K.
    """

    num_branches = 2

    def __init__(self, channels: int, big: int, small: int) -> None:
        super().__init__()
        check_tiles(big, small)
        self.channels, self.big, self.small = channels, big, small
        count = num_tiles(big, small)
        self.tall = nn.Parameter(empty(channels * count, 1, small, small))
        self.wide = nn.Parameter(empty(channels * count, 1, small, small))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tiles as `nn.Conv2d` would."""
        for tiles in (self.tall, self.wide):
            nn.init.kaiming_uniform_(tiles, a=math.sqrt(5))

    def branch_kernels(self) -> list[Tensor]:
        """Give the tall and the wide strip."""
        shape = [self.channels, -1, self.small, self.small]
        return [stacked(self.tall.view(shape)), side_by_side(self.wide.view(shape))]

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Give the middles of the kernels that the strips stand for."""
        return [(self.big // 2, self.small // 2), (self.small // 2, self.big // 2)]

    def published_macs(self, height: int, width: int) -> int:
        """Count the tile convolutions, which run on an image padded along the strip."""
        extra = 2 * tile_convolution_padding(self.big, self.small) - self.small + 1
        return self.tall.numel() * ((height + extra) * width + height * (width + extra))

    def extra_repr(self) -> str:
        """Name the geometry."""
        return f"{self.channels}, big={self.big}, small={self.small}"


class SharedStrips(RectSource):
    """A wide and a tall strip out of the same tiles, weighted per direction by sigmoid gates (SLaK_pww).

    Args:
        channels: C.
        big: K, odd.
        small: N, odd, smaller than K.
    """

    num_branches = 2

    def __init__(self, channels: int, big: int, small: int) -> None:
        super().__init__()
        check_tiles(big, small)
        self.channels, self.big, self.small = channels, big, small
        count = num_tiles(big, small)
        self.tiles = nn.Parameter(empty(channels * count, 1, small, small))
        self.gates = nn.ParameterList(nn.Parameter(empty(1, channels * count, 1, 1)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tiles as `nn.Conv2d` would and the gate logits uniformly from (-1, 1)."""
        nn.init.kaiming_uniform_(self.tiles, a=math.sqrt(5))
        for gate in self.gates:
            nn.init.uniform_(gate, -1.0, 1.0)

    def branch_kernels(self) -> list[Tensor]:
        """Give the wide and the tall strip of the gated tiles."""
        shape = [self.channels, -1, self.small, self.small]
        wide = self.tiles * self.gates[0].sigmoid().view(-1, 1, 1, 1)
        tall = self.tiles * self.gates[1].sigmoid().view(-1, 1, 1, 1)
        return [side_by_side(wide.view(shape)), stacked(tall.view(shape))]

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Give the middles of the kernels that the strips stand for."""
        return [(self.small // 2, self.big // 2), (self.big // 2, self.small // 2)]

    def published_macs(self, height: int, width: int) -> int:
        """Count the one tile convolution that both directions share, on an image padded on all sides."""
        extra = 2 * tile_convolution_padding(self.big, self.small) - self.small + 1
        return self.tiles.numel() * (height + extra) * (width + extra)

    def extra_repr(self) -> str:
        """Name the geometry."""
        return f"{self.channels}, big={self.big}, small={self.small}"


class ShiftTiles(RectSource):
    """Strips out of tiles that are shared by both directions and moved to other places in each (Shift-wise convolution).

    Yields three branches: a wide strip, a tall strip and a single tile. Tile j of channel c stands in strip d at the slots
    that the tables of the `groups` permutations give it, added up; the third branch adds one tile a group, unmoved.
    The tables are drawn from a private generator, as the authors' code draws them, and kept in the state dict, so that a
    network does not depend on the random numbers of the PyTorch version that loads it.

    Args:
        channels: C.
        big: K, odd.
        small: N, odd, smaller than K.
        paths: tile sets that are added up, for training only (re-parameterisation).
        groups: permutations a direction.
        gated: weight every tile by a sigmoid gate per direction.
    """

    num_branches = 3

    def __init__(self, channels: int, big: int, small: int, paths: int = 1, groups: int = 1, gated: bool = False) -> None:
        super().__init__()
        check_tiles(big, small)
        if paths < 1 or groups < 1:
            raise ArgumentError(f"paths={paths} and groups={groups} must both be at least 1")
        self.channels, self.big, self.small = channels, big, small
        count = num_tiles(big, small)
        self.tiles = nn.ParameterList(nn.Parameter(empty(channels * count, 1, small, small)) for _ in range(paths))
        self.gates = nn.ParameterList(nn.Parameter(empty(channels * count)) for _ in range(2 if gated else 0))
        tile_at, centre = draw_tables(channels, count, groups)
        self.tile_at: Tensor
        self.centre: Tensor
        device = torch.get_default_device()
        self.register_buffer("tile_at", tile_at.to(device))
        self.register_buffer("centre", centre.to(device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tiles as `nn.Conv2d` would and gate logits uniformly from (-1, 1); the tables stay."""
        for tiles in self.tiles:
            nn.init.kaiming_uniform_(tiles, a=math.sqrt(5))
        for gate in self.gates:
            nn.init.uniform_(gate, -1.0, 1.0)

    def branch_kernels(self) -> list[Tensor]:
        """Give the wide strip, the tall strip and the tile in the middle."""
        tiles = self.tiles[0]
        for i, path in enumerate(self.tiles):
            if i > 0:
                tiles = tiles + path
        flat = tiles.flatten(1)
        wide, tall = self._moved(self._weighted(flat, 0), 0), self._moved(self._weighted(flat, 1), 1)
        middle = _take_sum(flat, self.centre, self.channels).view(self.channels, 1, self.small, self.small)
        return [side_by_side(wide), stacked(tall), middle]

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Give the middles of the kernels that the strips stand for, and of the tile."""
        big, small = self.big // 2, self.small // 2
        return [(small, big), (big, small), (small, small)]

    def published_macs(self, height: int, width: int) -> int:
        """Count the tile convolutions of every path, which compute N - 1 pixels more on each axis."""
        extra = self.small - 1
        return sum(tiles.numel() for tiles in self.tiles) * (height + extra) * (width + extra)

    def extra_repr(self) -> str:
        """Name the geometry."""
        paths, groups = len(self.tiles), self.tile_at.shape[1]
        return f"{self.channels}, big={self.big}, small={self.small}, paths={paths}, groups={groups}"

    def seeded_tables(self) -> dict[str, Tensor]:
        """Give the tables as the authors' code draws them, by the name of their buffer."""
        tile_at, centre = draw_tables(self.channels, num_tiles(self.big, self.small), self.tile_at.shape[1])
        return {"tile_at": tile_at, "centre": centre}

    def table_problem(self, name: str, tables: Mapping[str, Tensor]) -> str:
        """Say what is wrong with a table of a file, "" if nothing is."""
        table, count = tables[name], self.tile_at.shape[-1]
        if name == "tile_at":
            return _arrangement_problem(table)
        inside = bool(((table >= 0) & (table < count)).all())
        return "" if inside else f"names tiles outside 0..{count - 1}"

    def _weighted(self, flat: Tensor, direction: int) -> Tensor:
        for d, gate in enumerate(self.gates):  # none, or two
            if d == direction:
                flat = flat * gate.sigmoid().unsqueeze(1)
        return flat

    def _moved(self, flat: Tensor, direction: int) -> Tensor:
        moved = _take_sum(flat, self.tile_at[direction], self.channels)
        return moved.view(self.channels, -1, self.small, self.small)


class ShuffledStrips(RectSource):
    """A wide strip of tiles in their order and a tall one of the same tiles shuffled (SLaK_pw).

    With several branches, each adds the same tiles once more, shuffled anew in both directions (the multi-branch variant).
    No official code of these variants is public; this follows their description.

    Args:
        channels: C.
        big: K, odd.
        small: N, odd, smaller than K.
        branches: how many arrangements of the tiles are added up in each direction.
    """

    num_branches = 2

    def __init__(self, channels: int, big: int, small: int, branches: int = 1) -> None:
        super().__init__()
        check_tiles(big, small)
        if branches < 1:
            raise ArgumentError(f"branches={branches} must be at least 1")
        self.channels, self.big, self.small = channels, big, small
        count = num_tiles(big, small)
        self.tiles = nn.Parameter(empty(channels * count, 1, small, small))
        self.tile_at: Tensor
        self.register_buffer("tile_at", _in_order_first(channels, count, branches).to(torch.get_default_device()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tiles as `nn.Conv2d` would; the tables stay."""
        nn.init.kaiming_uniform_(self.tiles, a=math.sqrt(5))

    def seeded_tables(self) -> dict[str, Tensor]:
        """Give the table as it is drawn at construction, by the name of its buffer."""
        return {"tile_at": _in_order_first(self.channels, num_tiles(self.big, self.small), self.tile_at.shape[1])}

    def table_problem(self, name: str, tables: Mapping[str, Tensor]) -> str:
        """Say what is wrong with a table of a file, "" if nothing is."""
        return _arrangement_problem(tables[name])

    def arranged(self) -> tuple[Tensor, Tensor]:
        """Give the tiles (C, nk, N, N) of the wide and of the tall strip, in the order of their slots."""
        flat = self.tiles.flatten(1)
        shape = [self.channels, -1, self.small, self.small]
        wide = _take_sum(flat, self.tile_at[0], self.channels).view(shape)
        tall = _take_sum(flat, self.tile_at[1], self.channels).view(shape)
        return wide, tall

    def branch_kernels(self) -> list[Tensor]:
        """Give the wide and the tall strip."""
        wide, tall = self.arranged()
        return [side_by_side(wide), stacked(tall)]

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Give the middles of the kernels that the strips stand for."""
        return [(self.small // 2, self.big // 2), (self.big // 2, self.small // 2)]

    def published_macs(self, height: int, width: int) -> int:
        """Count one tile convolution on an image padded by N - 1 on every side."""
        extra = self.small - 1
        return self.tiles.numel() * (height + extra) * (width + extra)

    def extra_repr(self) -> str:
        """Name the geometry."""
        return f"{self.channels}, big={self.big}, small={self.small}, branches={self.tile_at.shape[1]}"


def draw_tables(channels: int, count: int, groups: int) -> tuple[Tensor, Tensor]:
    """Draw the arrangement tables of Shift-wise convolution from a private generator.

    Returns:
        tile_at: (2, groups, C, nk) int32; entry [d, g, c, slot] is the tile that stands there (d = 0: the wide strip).
        centre: (groups, C) int32, the tile that the unmoved branch takes.
    """
    # Copies, made on the CPU whatever the default device is.
    tile_at, centre = (torch.tensor(table, device="cpu") for table in _drawn_tables(channels, count, groups))
    return tile_at, centre


@lru_cache(maxsize=64)  # the blocks of a stage have the same tables, and drawing them takes longer than all the rest
def _drawn_tables(channels: int, count: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    # Real numbers of the CPU's generator even where tensors are made without data, or on another device.
    with _disable_current_modes(), torch.device("cpu"):
        generator = Generator().manual_seed(TABLE_SEED)
        drawn = [torch.randperm(count, generator=generator) for _ in range(2 * groups * channels)]
        tile_at = torch.stack(drawn).view(2, groups, channels, count)
        centre = torch.stack([torch.randint(0, count, (channels,), generator=generator) for _ in range(groups)])
        return tile_at.to(torch.int32).numpy(), centre.to(torch.int32).numpy()


def _in_order_first(channels: int, count: int, branches: int) -> Tensor:
    """Draw the table of `ShuffledStrips`, whose first wide strip has its tiles in their order."""
    tile_at, _ = draw_tables(channels, count, branches)
    tile_at[0, 0] = torch.arange(count, dtype=tile_at.dtype, device="cpu")
    return tile_at


def _arrangement_problem(table: Tensor) -> str:
    """Say what is wrong with a table (2, groups, C, nk) of a file, "" if every row is a permutation."""
    slots = torch.arange(table.shape[-1], dtype=table.dtype)
    return "" if torch.equal(table.cpu().sort(-1).values, slots.expand_as(table)) else "is not made of permutations"


def check_tiles(big: int, small: int) -> None:
    """Raise unless a `big`-tap strip can be made of `small` x `small` tiles."""
    check_odd("kernel size", big)
    check_odd("tile size", small)
    if small >= big:
        raise ArgumentError(f"tile size {small} is not smaller than the kernel size {big}: give a smaller tile")


def _take_sum(flat: Tensor, table: Tensor, channels: int) -> Tensor:
    """Add up the rows of `flat` (C·nk, taps) that the groups of a table (groups, C) or (groups, C, slots) name.

    Returns:
        (C·slots, taps)
    """
    count = static_shape(flat)[0] // channels
    start = torch.arange(channels, device=flat.device).unsqueeze(1) * count
    groups = table if table.dim() == 3 else table.unsqueeze(2)
    # One gather a group: within a group no row is taken twice, so that the gradient is summed in a fixed order.
    rows = [(group.long() + start).flatten() for group in groups.unbind(0)]
    total = flat.index_select(0, rows[0])
    for row in rows[1:]:
        total = total + flat.index_select(0, row)
    return total
