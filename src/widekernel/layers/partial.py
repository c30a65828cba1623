"""Layers that convolve some of the channels and pass the others through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from widekernel.errors import ArgumentError
from widekernel.layers.alterations import alterations, replaced_method
from widekernel.layers.folding import Folded, Fusable, is_trained
from widekernel.layers.large_kernel import FoldedLargeKernel, LargeKernel
from widekernel.layers.sources import tensors_of
from widekernel.ops.eager import is_ordinary_call
from widekernel.ops.jit_trace import static_shape
from widekernel.ops.partial import Selection, native_partial_sum

GHOST_SEED = 123  # the seed with which the Shift-wise authors' code selects the untouched channels


def seeded_selection(channels: int, count: int) -> list[int]:
    """Return the sorted indices of the `count` (of `channels`) channels to which the authors' code applies the kernel."""
    ghosts = np.random.RandomState(GHOST_SEED).choice(channels, channels - count, replace=False)
    return sorted(set(range(channels)) - set(ghosts.tolist()))


class PartialChannels(Fusable, nn.Module):
    """Applies a large kernel to some channels; the output holds these first, then the untouched ones ("ghosts").

    Args:
        layer: large-kernel layer for `len(selected)` channels.
        selected: sorted indices of the channels that it is applied to.
        channels: C, the number of channels of the input.

    Raises:
        ArgumentError: if the indices do not fit the layer or the input.
    """

    def __init__(self, layer: LargeKernel, selected: Sequence[int], channels: int) -> None:
        super().__init__()
        if len(selected) != layer.source.channels or len(set(selected)) != len(selected):
            raise ArgumentError(
                f"{len(selected)} selected channels for a layer of {layer.source.channels}: give that many, all different"
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
        convolved = self.layer(x.index_select(1, self.selected))
        if static_shape(self.ghosts)[0] == 0:
            return convolved
        return torch.cat([convolved, x.index_select(1, self.ghosts)], 1)

    def foldable(self) -> bool:
        """Return whether the large kernel can be folded."""
        return getattr(self.layer, "foldable", lambda: False)() and not self.alterations()

    def alterations(self) -> list[str]:
        """List the hooks and replaced methods that prevent folding."""
        return alterations(self, ("", "layer"))

    def seeded_tables(self) -> dict[str, Tensor]:
        """Return the tables of the channels that the authors' code selects, by buffer name."""
        count, channels = self.selected.numel(), self.selected.numel() + self.ghosts.numel()
        selected = seeded_selection(channels, count)
        rest = sorted(set(range(channels)) - set(selected))
        return {
            "selected": torch.tensor(selected, dtype=torch.int32, device="cpu"),
            "ghosts": torch.tensor(rest, dtype=torch.int32, device="cpu"),
        }

    def table_problem(self, name: str, tables: Mapping[str, Tensor]) -> str:
        """Return what is wrong with a table read from a file, "" if nothing is."""
        return _channels_problem(name, tables)

    @torch.no_grad()
    def folded(self, scale: Tensor | None = None, shift: Tensor | None = None) -> FoldedPartialChannels:
        """Return the layer with its large kernel folded.

        Args:
            scale: (C,), applied to the output of the layer and folded in, too; by default ones.
            shift: (C,), added after the scale; by default zeros.
        """
        channels, dtype = self.selected.numel() + self.ghosts.numel(), next(self.layer.parameters()).dtype
        device = self.selected.device
        scale = torch.ones(channels, device=device, dtype=torch.float64) if scale is None else scale.double()
        shift = torch.zeros(channels, device=device, dtype=torch.float64) if shift is None else shift.double()
        count = self.selected.numel()
        layer = self.layer.folded(scale[:count], shift[:count])
        ghosts = scale[count:].to(dtype), shift[count:].to(dtype)
        result = FoldedPartialChannels(layer, self.selected, self.ghosts, *ghosts)
        return result.requires_grad_(is_trained(self))


class FoldedPartialChannels(Folded, nn.Module):
    """The folded form of `PartialChannels`; a following affine map that is folded in also acts on the untouched channels.

    Args:
        layer: folded large-kernel layer.
        selected: indices of the channels that it is applied to.
        ghosts: indices of the other channels.
        scale: one factor per ghost channel.
        shift: one summand per ghost channel.
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
        """Return what is wrong with a table read from a file, "" if nothing is."""
        return _channels_problem(name, tables)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), channels reordered."""
        if torch.jit.is_scripting():
            return self._by_parts(x)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            y = self._native(x)
            return self._by_parts(x) if y is None else y

    @torch.jit.unused
    def _native(self, x: Tensor) -> Tensor | None:
        """Return the result of one native call; None if the call is not covered, or `layer` has to be called."""
        layer: Any = self.layer
        if not is_ordinary_call() or type(layer) is not FoldedLargeKernel or _is_observed(layer):
            return None
        selection = Selection(self.selected, self.ghosts, self.scale, self.shift)
        return native_partial_sum(x, tensors_of(layer.kernels), layer.anchors, layer.bias, selection)

    def _by_parts(self, x: Tensor) -> Tensor:
        convolved = self.layer(x.index_select(1, self.selected))
        if static_shape(self.ghosts)[0] == 0:
            return convolved
        rest = torch.addcmul(self.shift.to(x.dtype), x.index_select(1, self.ghosts), self.scale.to(x.dtype))
        return torch.cat([convolved, rest], 1)


def _is_observed(layer: nn.Module) -> bool:
    """Return whether a layer has to be called, because of a hook or of another computation than that of its class."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    altered = bool(hooks) or bool(replaced_method(layer)) or layer._compiled_call_impl is not None
    return altered or torch_module._has_any_global_hook()


def _channels_problem(name: str, tables: Mapping[str, Tensor]) -> str:
    """Return what is wrong with `selected` or `ghosts`, tables of a file that together must name every channel."""
    channels = sum(table.numel() for table in tables.values())
    own = tables[name].tolist()
    if len(set(own)) != len(own) or not all(0 <= channel < channels for channel in own):
        return f"must name different channels of 0..{channels - 1}"
    both = name == "ghosts" and set(own) & set(tables["selected"].tolist())
    return "names channels of the other table" if both else ""
