"""Kernel sources whose strips are made of square tiles: separate for each direction, shared by both, or shuffled (SLaK).

Shifting and adding the outputs of the tiles, as in the papers, equals one depthwise convolution with the strip, borders
included. So the sources yield strips, and no feature map is ever nk times as large as its input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, empty, nn

import widekernel.layers.tile_tables as tile_tables
from widekernel.deprecation import renamed_arguments
from widekernel.errors import ArgumentError
from widekernel.layers.sources import RectSource
from widekernel.layers.tiles import check_tiles, num_tiles, side_by_side, stacked, tile_convolution_padding


class TileSource(RectSource):
    """A source of strips of K taps that are made of N x N tiles.

    Args:
        channels: C.
        kernel_size: K, odd.
        tile_size: N, odd, smaller than K.
    """

    def __init__(self, channels: int, kernel_size: int, tile_size: int) -> None:
        super().__init__()
        check_tiles(kernel_size, tile_size)
        self.channels, self.kernel_size, self.tile_size = channels, kernel_size, tile_size
        self.places = tuple(range(self.num_branches))

    def extra_repr(self) -> str:
        """Return channels and sizes."""
        return f"{self.channels}, kernel_size={self.kernel_size}, tile_size={self.tile_size}"

    def responses(self, x: Tensor) -> list[Tensor]:
        """Convolve with every kernel, in one call if a backend has a fused operator."""
        if torch.jit.is_scripting():
            kernels, anchors, dilations = self.branch_kernels(), self.branch_anchors(), self.branch_dilations()
            responses: list[Tensor] = []
            for i in self.places:  # TorchScript unrolls this loop
                responses.append(self.scripted_response(x, kernels[i], anchors[i], dilations[i]))
            return responses
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return super().responses(x)

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Return the centers of the kernels that the wide and the tall strip represent."""
        return [(self.tile_size // 2, self.kernel_size // 2), (self.kernel_size // 2, self.tile_size // 2)]


class SplitStrips(TileSource):
    """Two strips, K x N and N x K, each with its own tiles (SLaK_reg).

    Args:
        channels: C.
        kernel_size: K, odd.
        tile_size: N, odd, smaller than K.
    """

    num_branches = 2

    @renamed_arguments(big="kernel_size", small="tile_size")
    def __init__(self, channels: int, kernel_size: int, tile_size: int) -> None:
        super().__init__(channels, kernel_size, tile_size)
        count = num_tiles(kernel_size, tile_size)
        self.tall = nn.Parameter(empty(channels * count, 1, tile_size, tile_size))
        self.wide = nn.Parameter(empty(channels * count, 1, tile_size, tile_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tiles as `nn.Conv2d` does."""
        for tiles in (self.tall, self.wide):
            nn.init.kaiming_uniform_(tiles, a=math.sqrt(5))

    def branch_kernels(self) -> list[Tensor]:
        """Return the tall and the wide strip."""
        shape = [self.channels, -1, self.tile_size, self.tile_size]
        return [stacked(self.tall.view(shape)), side_by_side(self.wide.view(shape))]

    def branch_anchors(self) -> list[tuple[int, int]]:
        """Return the centers of the kernels that the strips represent."""
        return [(self.kernel_size // 2, self.tile_size // 2), (self.tile_size // 2, self.kernel_size // 2)]

    def published_macs(self, height: int, width: int) -> int:
        """Count the tile convolutions, which run on an image padded along the strip."""
        extra = 2 * tile_convolution_padding(self.kernel_size, self.tile_size) - self.tile_size + 1
        return self.tall.numel() * ((height + extra) * width + height * (width + extra))


class SharedStrips(TileSource):
    """A wide and a tall strip of the same tiles, weighted by a sigmoid gate per tile and direction (SLaK_pww).

    Args:
        channels: C.
        kernel_size: K, odd.
        tile_size: N, odd, smaller than K.
    """

    num_branches = 2

    @renamed_arguments(big="kernel_size", small="tile_size")
    def __init__(self, channels: int, kernel_size: int, tile_size: int) -> None:
        super().__init__(channels, kernel_size, tile_size)
        count = num_tiles(kernel_size, tile_size)
        self.tiles = nn.Parameter(empty(channels * count, 1, tile_size, tile_size))
        self.gates = nn.ParameterList(nn.Parameter(empty(1, channels * count, 1, 1)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tiles as `nn.Conv2d` does, and the gate logits uniformly from (-1, 1)."""
        nn.init.kaiming_uniform_(self.tiles, a=math.sqrt(5))
        for gate in self.gates:
            nn.init.uniform_(gate, -1.0, 1.0)

    def branch_kernels(self) -> list[Tensor]:
        """Return the wide and the tall strip of the gated tiles."""
        shape = [self.channels, -1, self.tile_size, self.tile_size]
        wide = self.tiles * self.gates[0].sigmoid().view(-1, 1, 1, 1)
        tall = self.tiles * self.gates[1].sigmoid().view(-1, 1, 1, 1)
        return [side_by_side(wide.view(shape)), stacked(tall.view(shape))]

    def published_macs(self, height: int, width: int) -> int:
        """Count the tile convolution that both directions share, on an image padded on all sides."""
        extra = 2 * tile_convolution_padding(self.kernel_size, self.tile_size) - self.tile_size + 1
        return self.tiles.numel() * (height + extra) * (width + extra)


class ShuffledStrips(TileSource):
    """A wide strip of tiles in order and a tall strip of the same tiles, shuffled (SLaK_pw).

    Every further branch adds the same tiles again, shuffled anew in both directions (the multi-branch variant).
    No official code of these variants is public; this follows their description.

    Args:
        channels: C.
        kernel_size: K, odd.
        tile_size: N, odd, smaller than K.
        branches: number of arrangements of the tiles that are added up in each direction.

    Raises:
        ArgumentError: if there are fewer than one branch, or K and N do not fit.
    """

    num_branches = 2

    @renamed_arguments(big="kernel_size", small="tile_size")
    def __init__(self, channels: int, kernel_size: int, tile_size: int, branches: int = 1) -> None:
        super().__init__(channels, kernel_size, tile_size)
        if branches < 1:
            raise ArgumentError(f"branches={branches} must be at least 1")
        count = num_tiles(kernel_size, tile_size)
        self.tiles = nn.Parameter(empty(channels * count, 1, tile_size, tile_size))
        self.tile_at: Tensor
        tile_at = tile_tables.draw_ordered_table(channels, count, branches)
        self.register_buffer("tile_at", tile_at.to(torch.get_default_device()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tiles as `nn.Conv2d` does; the table stays."""
        nn.init.kaiming_uniform_(self.tiles, a=math.sqrt(5))

    def seeded_tables(self) -> dict[str, Tensor]:
        """Return the table as drawn at construction, by buffer name."""
        _, branches, _, count = self.tile_at.shape
        return {"tile_at": tile_tables.draw_ordered_table(self.channels, count, branches)}

    def table_problem(self, name: str, tables: Mapping[str, Tensor]) -> str:
        """Return what is wrong with a table read from a file, "" if nothing is."""
        return tile_tables.arrangement_problem(tables[name])

    def arranged(self) -> tuple[Tensor, Tensor]:
        """Return the tiles (C, nk, N, N) of the wide and of the tall strip, in slot order."""
        flat = self.tiles.flatten(1)
        shape = [self.channels, -1, self.tile_size, self.tile_size]
        wide = tile_tables.take_sum(flat, self.tile_at[0], self.channels).view(shape)
        tall = tile_tables.take_sum(flat, self.tile_at[1], self.channels).view(shape)
        return wide, tall

    def branch_kernels(self) -> list[Tensor]:
        """Return the wide and the tall strip."""
        wide, tall = self.arranged()
        return [side_by_side(wide), stacked(tall)]

    def published_macs(self, height: int, width: int) -> int:
        """Count one tile convolution on an image padded by N - 1 on every side."""
        extra = self.tile_size - 1
        return self.tiles.numel() * (height + extra) * (width + extra)

    def extra_repr(self) -> str:
        """Return channels, sizes and branches."""
        return f"{super().extra_repr()}, branches={self.tile_at.shape[1]}"
