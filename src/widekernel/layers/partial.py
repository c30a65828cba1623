"""Layers that work on some of the channels and pass the others on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.layers.alterations import alterations
from widekernel.layers.folding import Fusable, is_trained
from widekernel.layers.large_kernel import LargeKernel
from widekernel.ops.jit_trace import static_shape

GHOST_SEED = 123  # the seed that the Shift-wise authors' code picks the untouched channels with


def seeded_selection(channels: int, count: int) -> list[int]:
    """Give the sorted indices of the `count` of `channels` channels that are worked on, picked as the authors' code does."""
    ghosts = np.random.RandomState(GHOST_SEED).choice(channels, channels - count, replace=False)
    return sorted(set(range(channels)) - set(ghosts.tolist()))


class PartialChannels(Fusable, nn.Module):
    """Applies a large kernel to some channels; the output holds these first, then the others untouched ("ghosts").

    Args:
        layer: large kernel for `len(selected)` channels.
        selected: sorted indices of the channels it works on.
        channels: C, the number of channels of the input.
    """

    def __init__(self, layer: LargeKernel, selected: Sequence[int], channels: int) -> None:
        super().__init__()
        if len(selected) != layer.source.channels or len(set(selected)) != len(selected):
            raise ArgumentError(
                f"{len(selected)} selected channels for a layer of {layer.source.channels}: give as many, all different"
            )
        if selected and not 0 <= min(selected) <= max(selected) < channels:
            raise ArgumentError(
                f"selected channels {min(selected)}..{max(selected)} must lie in 0..{channels - 1}, those of the input"
            )
        rest = sorted(set(range(channels)) - set(selected))
        self.layer = layer
        self.selected: Tensor
        self.ghosts: Tensor
        self.register_buffer("selected", torch.tensor(list(selected), dtype=torch.int32))
        self.register_buffer("ghosts", torch.tensor(rest, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), channels reordered."""
        worked = self.layer(x.index_select(1, self.selected))
        if static_shape(self.ghosts)[0] == 0:
            return worked
        return torch.cat([worked, x.index_select(1, self.ghosts)], 1)

    def foldable(self) -> bool:
        """Whether the large kernel can be folded."""
        return getattr(self.layer, "foldable", lambda: False)() and not self.alterations()

    def alterations(self) -> list[str]:
        """List hooks and replaced methods that keep it from being folded."""
        return alterations(self, ("", "layer"))

    def seeded_tables(self) -> dict[str, Tensor]:
        """Give the tables of the channels picked by the authors' code, by the name of their buffer."""
        worked, channels = self.selected.numel(), self.selected.numel() + self.ghosts.numel()
        selected = seeded_selection(channels, worked)
        rest = sorted(set(range(channels)) - set(selected))
        return {
            "selected": torch.tensor(selected, dtype=torch.int32, device="cpu"),
            "ghosts": torch.tensor(rest, dtype=torch.int32, device="cpu"),
        }

    def table_problem(self, name: str, tables: Mapping[str, Tensor]) -> str:
        """Say what is wrong with a table of a file, "" if nothing is."""
        return _channels_problem(name, tables)

    @torch.no_grad()
    def folded(self, scale: Tensor | None = None, shift: Tensor | None = None) -> FoldedPartialChannels:
        """Fold the large kernel and, if given, an affine map (C,) of the layer's output."""
        channels, dtype = self.selected.numel() + self.ghosts.numel(), next(self.layer.parameters()).dtype
        device = self.selected.device
        scale = torch.ones(channels, device=device, dtype=torch.float64) if scale is None else scale.double()
        shift = torch.zeros(channels, device=device, dtype=torch.float64) if shift is None else shift.double()
        worked = self.selected.numel()
        layer = self.layer.folded(scale[:worked], shift[:worked])
        ghosts = scale[worked:].to(dtype), shift[worked:].to(dtype)
        result = FoldedPartialChannels(layer, self.selected, self.ghosts, *ghosts)
        return result.requires_grad_(is_trained(self))


class FoldedPartialChannels(nn.Module):
    """The folded form of `PartialChannels`; an affine map that followed it also acts on the untouched channels.

    Args:
        layer: folded large kernel.
        selected: indices of the channels it works on.
        ghosts: indices of the others.
        scale: one factor a ghost channel.
        shift: one summand a ghost channel.
    """

    def __init__(self, layer: nn.Module, selected: Tensor, ghosts: Tensor, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.selected: Tensor
        self.ghosts: Tensor
        self.register_buffer("selected", selected.clone())
        self.register_buffer("ghosts", ghosts.clone())
        self.scale = nn.Parameter(scale.view(-1, 1, 1).clone())
        self.shift = nn.Parameter(shift.view(-1, 1, 1).clone())

    def table_problem(self, name: str, tables: Mapping[str, Tensor]) -> str:
        """Say what is wrong with a table of a file, "" if nothing is."""
        return _channels_problem(name, tables)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), channels reordered."""
        worked = self.layer(x.index_select(1, self.selected))
        if static_shape(self.ghosts)[0] == 0:
            return worked
        rest = torch.addcmul(self.shift.to(x.dtype), x.index_select(1, self.ghosts), self.scale.to(x.dtype))
        return torch.cat([worked, rest], 1)


def _channels_problem(name: str, tables: Mapping[str, Tensor]) -> str:
    """Say what is wrong with one of the tables `selected` and `ghosts` of a file, which share the channels between them."""
    channels = sum(table.numel() for table in tables.values())
    own = tables[name].tolist()
    if len(set(own)) != len(own) or not all(0 <= channel < channels for channel in own):
        return f"must name different channels of 0..{channels - 1}"
    both = name == "ghosts" and set(own) & set(tables["selected"].tolist())
    return "names channels of the other table" if both else ""
