"""Shift-wise convolution: both directions build a strip from the same tiles, each in its own arrangement.

Li et al., ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect, CVPR 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, empty, nn

import widekernel.layers.tile_tables as tile_tables
from widekernel.deprecation import renamed_arguments
from widekernel.errors import ArgumentError
from widekernel.layers.strips import TileSource
from widekernel.layers.tiles import num_tiles, side_by_side, stacked


class ShiftTiles(TileSource):
    """Strips made of tiles that both directions share, in a different arrangement in each (Shift-wise convolution).

    Yields three branches: a wide strip, a tall strip and a single tile. In strip d, the tables of the `groups` permutations
    assign slots to tile j of channel c; tiles in the same slot are added up. The third branch adds up one tile per group.
    The tables are drawn as in the authors' code, and are part of the state dict.

    Args:
        channels: C.
        kernel_size: K, odd.
        tile_size: N, odd, smaller than K.
        paths: number of tile sets that are added up, for training only (re-parameterization).
        groups: number of permutations per direction.
        gated: weight every tile by a sigmoid gate per direction.

    Raises:
        ArgumentError: if there are fewer than one path or group, or K and N do not fit.
    """

    num_branches = 3

    @renamed_arguments(big="kernel_size", small="tile_size")
    def __init__(
        self, channels: int, kernel_size: int, tile_size: int, paths: int = 1, groups: int = 1, gated: bool = False
    ) -> None:
        super().__init__(channels, kernel_size, tile_size)
        if paths < 1 or groups < 1:
            raise ArgumentError(f"paths={paths} and groups={groups} must both be at least 1")
        count = num_tiles(kernel_size, tile_size)
        shape = channels * count, 1, tile_size, tile_size
        self.tiles = nn.ParameterList(nn.Parameter(empty(shape)) for _ in range(paths))
        self.gates = nn.ParameterList(nn.Parameter(empty(channels * count)) for _ in range(2 if gated else 0))
        tile_at, centre = tile_tables.draw_tables(channels, count, groups)
        self.tile_at: Tensor
        self.centre: Tensor
        device = torch.get_default_device()
        self.register_buffer("tile_at", tile_at.to(device))
        self.register_buffer("centre", centre.to(device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tiles as `nn.Conv2d` does, and gate logits uniformly from (-1, 1); the tables stay."""
        for tiles in self.tiles:
            nn.init.kaiming_uniform_(tiles, a=math.sqrt(5))
        for gate in self.gates:
            nn.init.uniform_(gate, -1.0, 1.0)

    def branch_kernels(self) -> list[Tensor]:
        """Return the wide strip, the tall strip and the single tile."""
        tiles = self.tiles[0]
        for i, path in enumerate(self.tiles):
            if i > 0:
                tiles = tiles + path
        flat = tiles.flatten(1)
        wide, tall = self._arranged(self._gated(flat, 0), 0), self._arranged(self._gated(flat, 1), 1)
        single = tile_tables.take_sum(flat, self.centre, self.channels)
        return [side_by_side(wide), stacked(tall), single.view(self.channels, 1, self.tile_size, self.tile_size)]

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Return the centers of the kernels that the strips represent, and the center of the tile."""
        along, across = self.kernel_size // 2, self.tile_size // 2
        return [(across, along), (along, across), (across, across)]

    def published_macs(self, height: int, width: int) -> int:
        """Count the tile convolutions of every path, which compute N - 1 additional pixels along each axis."""
        extra = self.tile_size - 1
        return sum(tiles.numel() for tiles in self.tiles) * (height + extra) * (width + extra)

    def extra_repr(self) -> str:
        """Return channels, sizes, paths and groups."""
        return f"{super().extra_repr()}, paths={len(self.tiles)}, groups={self.tile_at.shape[1]}"

    def seeded_tables(self) -> dict[str, Tensor]:
        """Return the tables as drawn by the authors' code, by buffer name."""
        _, groups, _, count = self.tile_at.shape
        tile_at, centre = tile_tables.draw_tables(self.channels, count, groups)
        return {"tile_at": tile_at, "centre": centre}

    def table_problem(self, name: str, tables: Mapping[str, Tensor]) -> str:
        """Return what is wrong with a table read from a file, "" if nothing is."""
        table, count = tables[name], self.tile_at.shape[-1]
        if name == "tile_at":
            return tile_tables.arrangement_problem(table)
        inside = bool(((table >= 0) & (table < count)).all())
        return "" if inside else f"names tiles outside 0..{count - 1}"

    def _gated(self, flat: Tensor, direction: int) -> Tensor:
        for d, gate in enumerate(self.gates):  # none, or two
            if d == direction:
                flat = flat * gate.sigmoid().unsqueeze(1)
        return flat

    def _arranged(self, flat: Tensor, direction: int) -> Tensor:
        arranged = tile_tables.take_sum(flat, self.tile_at[direction], self.channels)
        return arranged.view(self.channels, -1, self.tile_size, self.tile_size)
