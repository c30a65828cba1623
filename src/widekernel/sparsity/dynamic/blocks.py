"""Blocks of weights that are pruned and grow together, and groups of parameters whose blocks correspond."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.layers import LargeKernel, ShiftTiles
from widekernel.layers.sources import KernelSource
from widekernel.sparsity.dynamic.config import DynamicSparsityConfig


@dataclass(frozen=True)
class Blocks:
    """Division of a parameter into blocks.

    Attributes:
        shape: shape of the parameter.
        count: number of blocks.
        tile: height and width of a block within the kernel window; None if blocks are runs of consecutive elements, all of
            the same length.
    """

    shape: tuple[int, ...]
    count: int
    tile: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """Either "element" or "block"; scores are compared only among blocks of one kind, which have the same scale."""
        return "element" if self.count == _numel(self.shape) else "block"

    def sums(self, values: Tensor) -> Tensor:
        """Sum `values` (of the parameter's shape) within each block: (count,)."""
        if self.kind == "element":
            return values.reshape(-1)
        if self.tile is None:
            return values.reshape(self.count, -1).sum(1)
        return F.avg_pool2d(self._padded(values), self.tile, divisor_override=1).reshape(-1)

    def sizes(self) -> Tensor:
        """Count the elements of each block: (count,) int64."""
        return self.sums(torch.ones(self.shape, dtype=torch.float64)).round().long()

    def live(self, mask: Tensor) -> Tensor:
        """Return which blocks have a live element in `mask` (of the parameter's shape): (count,) bool."""
        if self.kind == "element":
            return mask.reshape(-1)
        if self.tile is None:
            return mask.reshape(self.count, -1).any(1)
        return F.max_pool2d(self._padded(mask.float()), self.tile).reshape(-1) > 0

    def expand(self, live: Tensor) -> Tensor:
        """Return the mask of the parameter's shape in which exactly the elements of the live blocks are True."""
        if self.tile is None:
            return live.view(-1, 1).expand(self.count, _numel(self.shape) // self.count).reshape(self.shape)
        (height, width), (kh, kw) = self.tile, self.shape[-2:]
        grid = live.view(*self.shape[:-2], -(-kh // height), -(-kw // width))
        return grid.repeat_interleave(height, -2).repeat_interleave(width, -1)[..., :kh, :kw]

    def _padded(self, values: Tensor) -> Tensor:
        assert self.tile is not None
        (height, width), (kh, kw) = self.tile, self.shape[-2:]
        return F.pad(values.reshape(1, -1, kh, kw), (0, -kw % width, 0, -kh % height))


@dataclass(frozen=True)
class Group:
    """Parameters with corresponding blocks, so that the blocks can be ranked together and share a mask.

    Attributes:
        names: names of the parameters.
        blocks: blocks of each parameter, in the same order; all have the same count.
        always_shared: whether they share their mask at every update, or only at every `share_every`-th.
    """

    names: tuple[str, ...]
    blocks: tuple[Blocks, ...]
    always_shared: bool = True

    @property
    def count(self) -> int:
        """Number of blocks of each parameter."""
        return self.blocks[0].count

    def split(self) -> list[Group]:
        """Return one group per parameter."""
        return [Group((name,), (blocks,)) for name, blocks in zip(self.names, self.blocks)]


def groups_of(model: nn.Module, parameters: dict[str, nn.Parameter], config: DynamicSparsityConfig) -> list[Group]:
    """Divide the parameters into blocks, and group parameters whose blocks correspond, in the order of `parameters`."""
    by_id = {id(parameter): name for name, parameter in parameters.items()}
    joined: dict[str, Group] = {}
    for module in model.modules():
        found = None
        if config.block == "channel" and isinstance(module, LargeKernel):
            found = _channel_group(module.source, by_id)
        elif config.block in ("kernel", "branch") and isinstance(module, ShiftTiles):
            found = _tile_sets(module, by_id, str(config.block))
        if found is not None:
            joined.update(dict.fromkeys(found.names, found))
    branches = _branch_channels(model) if config.block == "branch" else {}
    groups, done = [], set()
    for name, parameter in parameters.items():
        group = joined.get(name) or Group((name,), (_blocks(parameter, config.block, branches.get(id(parameter))),))
        if group.names[0] not in done:
            done.add(group.names[0])
            groups.append(group)
    return groups


def _blocks(parameter: Tensor, block: object, branch_channels: int | None) -> Blocks:
    shape = tuple(parameter.shape)
    has_window = parameter.dim() == 4 and shape[2] * shape[3] > 1
    if isinstance(block, tuple) and has_window:
        grid = [-(-side // tile) for side, tile in zip(shape[2:], block)]
        return Blocks(shape, shape[0] * shape[1] * grid[0] * grid[1], block)
    if block == "kernel" and has_window:
        return Blocks(shape, shape[0] * shape[1])
    if block == "branch" and branch_channels is not None:
        return Blocks(shape, branch_channels)
    if block == "channel":
        return Blocks(shape, shape[0])
    return Blocks(shape, _numel(shape))


def _tile_sets(source: ShiftTiles, by_id: dict[int, str], block: str) -> Group | None:
    names = tuple(by_id[id(tiles)] for tiles in source.tiles if id(tiles) in by_id)
    if not names:
        return None
    shape = tuple(source.tiles[0].shape)
    count = source.channels if block == "branch" else shape[0]
    return Group(names, (Blocks(shape, count),) * len(names), always_shared=False)


def _channel_group(source: KernelSource, by_id: dict[int, str]) -> Group | None:
    # Gates have no window and are never masked; every kernel of a source holds its channels in the same order.
    found = [parameter for parameter in source.parameters() if id(parameter) in by_id]
    if not found:
        return None
    names = tuple(by_id[id(parameter)] for parameter in found)
    return Group(names, tuple(Blocks(tuple(parameter.shape), source.channels) for parameter in found))


def _branch_channels(model: nn.Module) -> dict[int, int]:
    """Return the number of channels of the source that each kernel belongs to, by the id of the kernel."""
    sources = [module for module in model.modules() if isinstance(module, KernelSource)]
    return {id(parameter): source.channels for source in sources for parameter in source.parameters()}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
