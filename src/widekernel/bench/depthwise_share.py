"""Which share of a network's time goes into depthwise convolutions.

Operators are timed as they are called, forward and backward. PyTorch's profiler would say the same and more, but not without
messages on the error stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

_OURS = "widekernel.depthwise_"
# Of each operator of PyTorch's the places of the kernel and of the number of groups among its arguments.
_PYTORCH = {
    torch.ops.aten.convolution: (1, 8),
    torch.ops.aten.conv2d: (1, 6),  # seen whole in inference mode only
    torch.ops.aten.convolution_backward: (2, 9),
}


def depthwise_share(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """Run one call and give the share of depthwise convolutions in its time, between 0 and 1.

    On a CUDA device the host must be ahead of it, as it is with batches that are worth timing: otherwise what passes
    between two launches counts as well.

    Args:
        call: what to run.
        device: where it computes; by default on the CPU.
    """
    marks = _Events(device) if device is not None and device.type == "cuda" else _Times()
    with _Watch(marks) as watch:
        start = marks.now()
        call()
        end = marks.now()
    return marks.seconds(watch.spans) / marks.seconds([(start, end)])


class _Times:
    """Marks in the time of the host."""

    def now(self) -> Any:
        return time.perf_counter()

    def seconds(self, spans: Sequence[tuple[Any, Any]]) -> float:
        return sum(end - start for start, end in spans)


class _Events:
    """Marks in the queue of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, spans: Sequence[tuple[Any, Any]]) -> float:
        torch.cuda.synchronize(self._device)
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3


class _Watch(TorchDispatchMode):
    """Marks the spans of depthwise convolutions; what an operator calls in turn is not seen."""

    def __init__(self, marks: _Times | _Events) -> None:
        super().__init__()
        self.spans: list[tuple[Any, Any]] = []
        self._marks = marks

    @override
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_depthwise(function.overloadpacket, args):
            return function(*args, **(kwargs or {}))
        start = self._marks.now()
        result = function(*args, **(kwargs or {}))
        self.spans.append((start, self._marks.now()))
        return result


def _is_depthwise(operator: Any, args: Any) -> bool:
    if str(operator).startswith(_OURS):
        return True
    if operator not in _PYTORCH:
        return False
    of_kernel, of_groups = _PYTORCH[operator]
    kernel, groups = args[of_kernel], args[of_groups] if len(args) > of_groups else 1
    # A single group is an ordinary convolution, whatever its channels.
    return kernel.dim() == 4 and kernel.shape[1] == 1 and groups > 1
