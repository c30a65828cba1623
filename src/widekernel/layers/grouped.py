"""A large kernel that is computed for some of its channels only, in groups that share their rectangles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.layers.guarding import guard
from widekernel.layers.large_kernel import FoldedLargeKernel
from widekernel.layers.rect import Rect
from widekernel.ops.jit_trace import is_tracing, tracing_paused
from widekernel.ops.problem import is_channels_last, memory_format


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are convolved together.

    Attributes:
        rects: kernels (n, 1, kh, kw).
        bias: (n,).
        take: the n channels of the input that are read.
        put: the n channels of the output that are written, in the same order.
    """

    rects: Sequence[Rect]
    bias: Tensor
    take: Sequence[int]
    put: Sequence[int]


class GroupedKernels(nn.Module):
    """Depthwise kernels in groups: one operator call a group, and no convolution for channels outside of all groups.

        y[:, put_g] = Σ_r depthwise(x[:, take_g], rect_gr) + bias_g      for every group g
        y[:, c]     = scale[c] · x[:, source[c]] + shift[c]              for every other channel c

    What `widekernel.sparsity.compact` makes of a folded layer with dead channels. For inference: gradients flow, but what
    was removed is not trained again. The tables are buffers and part of the state dict; weights are loaded only into a
    layer with the same tables.

    Args:
        groups: with disjoint `put`.
        scale: (C,), one factor an output channel; what it says of channels of a group does not matter.
        shift: (C,), one summand an output channel; likewise.
        source: for every output channel the input channel that it is computed from, by default the one of its own number.

    Raises:
        ArgumentError: if groups write the same channel, or one that there is not.
    """

    def __init__(
        self, groups: Sequence[ChannelGroup], scale: Tensor, shift: Tensor, source: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        channels = scale.numel()
        written = [channel for group in groups for channel in group.put]
        if len(set(written)) != len(written) or any(not 0 <= channel < channels for channel in written):
            raise ArgumentError(f"the groups write {sorted(written)}: they must be different channels of 0..{channels - 1}")
        self.channels = channels
        self.kernels = nn.ModuleList(FoldedLargeKernel(group.rects, group.bias) for group in groups)
        # Asked as numbers, not tensors: a compiled forward pass must not depend on the contents of a table.
        self.complete = len(written) == channels
        outside = torch.ones(channels, dtype=torch.bool)
        outside[written] = False
        self.passes = bool((scale.detach().cpu() != 0)[outside].any())
        self.scale = nn.Parameter(scale.detach().clone())
        self.shift = nn.Parameter(shift.detach().clone())
        order = list(range(channels)) if source is None else list(source)
        self.reordered = order != list(range(channels))
        # For `_joined`: where every channel of the output stands behind the channels that no group writes.
        self.takes = [list(group.take) for group in groups]
        self.order = _order(channels, written)
        self.runs = [(_run(group.take), _run(group.put)) for group in groups]
        device = scale.device
        self.source: Tensor
        self.register_buffer("source", torch.tensor(order, dtype=torch.int64, device=device))
        for i, group in enumerate(groups):
            self.register_buffer(f"take_{i}", torch.tensor(list(group.take), dtype=torch.int64, device=device))
            self.register_buffer(f"put_{i}", torch.tensor(list(group.put), dtype=torch.int64, device=device))
        self._tables = {name: table.tolist() for name, table in self.named_buffers(recurse=False)}
        guard(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C', H, W) -> (N, C, H, W), in the layout of `x`."""
        if torch.jit.is_scripting():
            return self._joined(x)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._joined(x) if is_tracing() else self._written(x)

    def _joined(self, x: Tensor) -> Tensor:
        """Compute the layer without writing into a map, for other programs to read: take, convolve, join, put in order."""
        shift, scale = self.shift.to(x.dtype).view(-1, 1, 1), self.scale.to(x.dtype).view(-1, 1, 1)
        if self.passes:
            parts = [torch.addcmul(shift, x.index_select(1, self.source) if self.reordered else x, scale)]
        else:
            parts = [torch.zeros_like(x[:, :1]) + shift]
        for i, kernel in enumerate(self.kernels):
            parts.append(kernel(x.index_select(1, _table(self.takes[i], x))))
        return torch.cat(parts, 1).index_select(1, _table(self.order, x))

    @torch.jit.unused
    def _written(self, x: Tensor) -> Tensor:
        parts = [
            kernel(_taken(x, self.get_buffer(f"take_{i}"), run[0]))
            for i, (kernel, run) in enumerate(zip(self.kernels, self.runs))
        ]
        dtype = parts[0].dtype if parts else x.dtype
        y = self._outside(x, dtype)
        for i, (part, run) in enumerate(zip(parts, self.runs)):
            if run[1] is not None:
                y.narrow(1, run[1], part.shape[1]).copy_(part)
            else:
                _write(y, self.get_buffer(f"put_{i}"), part)
        return y

    def _outside(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Give a map (N, C, H, W) of its own memory in which the channels outside of all groups are right."""
        layout = memory_format(x)
        shape = x.shape[0], self.channels, *x.shape[2:]
        if self.complete:
            return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
        shift = self.shift.to(dtype).view(-1, 1, 1)
        if not self.passes:
            y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
            return y.copy_(shift.expand(shape))
        seen = _taken(x, self.source, None) if self.reordered else x
        return torch.addcmul(shift, seen.to(dtype), self.scale.to(dtype).view(-1, 1, 1))

    def table_misfits(self, state: Mapping[str, Tensor], prefix: str) -> list[str]:
        """Say if the weights are of a layer whose groups hold other channels."""
        found = []
        for name, own in self._tables.items():
            table = state.get(f"{prefix}{name}")
            if table is not None and not table.is_meta and table.tolist() != own:
                found.append(f"{prefix}{name} names other channels in the file: compact the same masked network")
        return found

    def macs(self) -> int:
        """Count the multiply-accumulates a pixel that the convolutions execute."""
        return sum(kernel.numel() for layer in self.kernels for kernel in layer.kernels)  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        """Name channels: all, and those that are convolved."""
        worked = sum(len(table) for name, table in self._tables.items() if name.startswith("put_"))
        return f"{self.channels}, convolved={worked}, groups={len(self.kernels)}"


def _table(numbers: list[int], x: Tensor) -> Tensor:
    """Give numbers as a tensor beside `x`; it is a constant of a recorded graph."""
    if torch.jit.is_scripting():
        return torch.tensor(numbers, device=x.device)
    else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
        return _recorded_table(numbers, x)


def _recorded_table(numbers: list[int], x: Tensor) -> Tensor:
    with tracing_paused():
        return torch.tensor(numbers, device=x.device)


def _order(channels: int, written: Sequence[int]) -> list[int]:
    """Give for every channel where it stands in all of them followed by those written once more."""
    place = {channel: channels + i for i, channel in enumerate(written)}
    return [place.get(channel, channel) for channel in range(channels)]


def _run(channels: Sequence[int]) -> int | None:
    """Give the first of consecutive channels, None if they are not consecutive."""
    channels = list(channels)
    return channels[0] if channels == list(range(channels[0], channels[0] + len(channels))) else None


def _taken(x: Tensor, index: Tensor, start: int | None) -> Tensor:
    """Give some channels of `x` in its layout.

    `index_select` along the channels of a channels_last tensor takes twice the time of one along the last dimension of a
    matrix (measured on a CPU), and returns a contiguous tensor.
    """
    count = index.numel()
    if start is not None:
        return x.narrow(1, start, count).contiguous(memory_format=memory_format(x)) if count != x.shape[1] else x
    if not is_channels_last(x):
        return x.index_select(1, index)
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(1, index)
    return rows.view(batch, height, width, count).permute(0, 3, 1, 2)


def _write(y: Tensor, index: Tensor, part: Tensor) -> None:
    """Write the channels `index` of `y`.

    For channels_last, scattering into the rows of a matrix takes two thirds of the time of `index_copy_` (on a CPU).
    """
    if not (is_channels_last(y) and is_channels_last(part)):
        y.index_copy_(1, index, part)
        return
    rows, values = (t.permute(0, 2, 3, 1).view(-1, t.shape[1]) for t in (y, part))
    rows.scatter_(1, index.expand_as(values), values)
