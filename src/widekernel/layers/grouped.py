"""A folded large-kernel layer that convolves only some of its channels, in groups that share their rectangles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.layers.folding import Folded
from widekernel.layers.large_kernel import FoldedLargeKernel
from widekernel.layers.rect import Rect
from widekernel.layers.strict_loading import load_strictly
from widekernel.ops.jit_trace import is_tracing, tracing_paused
from widekernel.ops.problem import is_channels_last, memory_format


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are convolved together.

    Attributes:
        rects: kernels (n, 1, kh, kw).
        bias: (n,).
        inputs: the n input channels that are read.
        outputs: the n output channels that are written, in the same order.
    """

    rects: Sequence[Rect]
    bias: Tensor
    inputs: Sequence[int]
    outputs: Sequence[int]


class GroupedKernels(Folded, nn.Module):
    """Depthwise kernels in groups: one operator call per group, and no convolution for channels outside of all groups.

        y[:, outputs_g] = Σ_r depthwise(x[:, inputs_g], rect_gr) + bias_g      for every group g
        y[:, c]         = scale[c] · x[:, source[c]] + shift[c]                for every other channel c

    `widekernel.sparsity.compact` builds it from a folded layer with dead channels. It is meant for inference: gradients
    flow, but the removed parts are not trained again. The channel tables are buffers and part of the state dict; weights
    load only into a layer with the same tables.

    Args:
        groups: the groups, with disjoint `outputs`.
        scale: (C,), one factor per output channel; the entries of channels in a group are ignored.
        shift: (C,), one summand per output channel; entries of channels in a group are ignored, too.
        source: the input channel from which each output channel is computed, by default the one with the same index.

    Raises:
        ArgumentError: if two groups write the same channel, or a group writes a channel that does not exist.
    """

    def __init__(
        self, groups: Sequence[ChannelGroup], scale: Tensor, shift: Tensor, source: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        channels = scale.numel()
        written = [channel for group in groups for channel in group.outputs]
        if len(set(written)) != len(written) or any(not 0 <= channel < channels for channel in written):
            raise ArgumentError(f"the groups write {sorted(written)}: they must be different channels of 0..{channels - 1}")
        self.channels = channels
        self.kernels = nn.ModuleList(FoldedLargeKernel(group.rects, group.bias) for group in groups)
        # Python numbers, not tensors: a compiled forward pass must not depend on the contents of a table.
        self.complete = len(written) == channels
        outside = torch.ones(channels, dtype=torch.bool)
        outside[written] = False
        self.passes = bool((scale.detach().cpu() != 0)[outside].any())
        self.scale = nn.Parameter(scale.detach().clone())
        self.shift = nn.Parameter(shift.detach().clone())
        order = list(range(channels)) if source is None else list(source)
        self.reordered = order != list(range(channels))
        # For `_joined`: the position of every output channel in all channels followed by those that groups write.
        self.takes = [list(group.inputs) for group in groups]
        self.order = _positions(channels, written)
        self.runs = [(_run_start(group.inputs), _run_start(group.outputs)) for group in groups]
        device = scale.device
        self.source: Tensor
        self.register_buffer("source", torch.tensor(order, dtype=torch.int64, device=device))
        self.table_names = [(f"take_{i}", f"put_{i}") for i in range(len(groups))]
        for (take, put), group in zip(self.table_names, groups):
            self.register_buffer(take, torch.tensor(list(group.inputs), dtype=torch.int64, device=device))
            self.register_buffer(put, torch.tensor(list(group.outputs), dtype=torch.int64, device=device))
        self._tables = {name: table.tolist() for name, table in self.named_buffers(recurse=False)}
        load_strictly(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C', H, W) -> (N, C, H, W), in the layout of `x`."""
        if torch.jit.is_scripting():
            return self._joined(x)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._joined(x) if is_tracing() else self._written(x)

    def _joined(self, x: Tensor) -> Tensor:
        """Compute the layer without in-place writes, for graphs that other programs read: gather, convolve, join."""
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
        # Not `get_buffer`, which parses the name at every call.
        parts = [
            kernel(_gathered(x, getattr(self, take), start))
            for kernel, (take, _), (start, _) in zip(self.kernels, self.table_names, self.runs)
        ]
        dtype = parts[0].dtype if parts else x.dtype
        y = self._outside(x, dtype)
        for part, (_, put), (_, start) in zip(parts, self.table_names, self.runs):
            if start is not None:
                y.narrow(1, start, part.shape[1]).copy_(part)
            else:
                _scatter(y, getattr(self, put), part)
        return y

    def _outside(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a new tensor (N, C, H, W) in which the channels outside of all groups are computed."""
        layout = memory_format(x)
        shape = x.shape[0], self.channels, *x.shape[2:]
        if self.complete:
            return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
        shift = self.shift.to(dtype).view(-1, 1, 1)
        if not self.passes:
            y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
            return y.copy_(shift.expand(shape))
        seen = _gathered(x, self.source, None) if self.reordered else x
        return torch.addcmul(shift, seen.to(dtype), self.scale.to(dtype).view(-1, 1, 1))

    def table_misfits(self, state: Mapping[str, Tensor], prefix: str) -> list[str]:
        """List the tables of the state dict that describe groups of other channels than those of this layer."""
        found = []
        for name, own in self._tables.items():
            table = state.get(f"{prefix}{name}")
            if table is not None and not table.is_meta and table.tolist() != own:
                found.append(f"{prefix}{name} names other channels in the file: compact the same masked network")
        return found

    def macs(self) -> int:
        """Count the multiply-accumulates per pixel that the convolutions execute."""
        return sum(kernel.numel() for layer in self.kernels for kernel in layer.kernels)  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        """Return the numbers of channels, convolved channels and groups."""
        convolved = sum(len(table) for name, table in self._tables.items() if name.startswith("put_"))
        return f"{self.channels}, convolved={convolved}, groups={len(self.kernels)}"


def _table(numbers: list[int], x: Tensor) -> Tensor:
    """Return numbers as a tensor on the device of `x`; in a traced graph it is a constant."""
    if torch.jit.is_scripting():
        return torch.tensor(numbers, device=x.device)
    else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
        return _recorded_table(numbers, x)


def _recorded_table(numbers: list[int], x: Tensor) -> Tensor:
    with tracing_paused():
        return torch.tensor(numbers, device=x.device)


def _positions(channels: int, written: Sequence[int]) -> list[int]:
    """Return the position of every channel in the list of all channels followed by those that groups write."""
    place = {channel: channels + i for i, channel in enumerate(written)}
    return [place.get(channel, channel) for channel in range(channels)]


def _run_start(channels: Sequence[int]) -> int | None:
    """Return the first channel if the channels are consecutive, otherwise None."""
    channels = list(channels)
    return channels[0] if channels == list(range(channels[0], channels[0] + len(channels))) else None


def _gathered(x: Tensor, index: Tensor, start: int | None) -> Tensor:
    """Return some channels of `x`, in its layout.

    On a channels_last tensor, `index_select` along the channels returns a contiguous tensor and takes twice as long as along
    the last dimension of a matrix (measured on a CPU).

    Args:
        x: (N, C, H, W).
        index: the channels.
        start: the first of them if they are consecutive, otherwise None.
    """
    count = index.numel()
    if start is not None:
        return x.narrow(1, start, count).contiguous(memory_format=memory_format(x)) if count != x.shape[1] else x
    if not is_channels_last(x):
        return x.index_select(1, index)
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(1, index)
    return rows.view(batch, height, width, count).permute(0, 3, 1, 2)


def _scatter(y: Tensor, index: Tensor, part: Tensor) -> None:
    """Write the channels `index` of `y`.

    For channels_last, scattering into matrix rows takes two thirds of the time of `index_copy_` (measured on a CPU).
    """
    if not (is_channels_last(y) and is_channels_last(part)):
        y.index_copy_(1, index, part)
        return
    rows, values = (t.permute(0, 2, 3, 1).view(-1, t.shape[1]) for t in (y, part))
    rows.scatter_(1, index.expand_as(values), values)
