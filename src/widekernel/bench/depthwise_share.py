"""The share of a network's time that is spent in depthwise convolutions.

Operators are timed when they are called, forward and backward. PyTorch's profiler would report the same and more, but it
also prints messages to standard error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

_OURS = "widekernel.depthwise_"
# Positions of the kernel and of the number of groups among the arguments of PyTorch's operators.
_PYTORCH = {
    torch.ops.aten.convolution: (1, 8),
    torch.ops.aten.conv2d: (1, 6),  # dispatched as a whole in inference mode only
    torch.ops.aten.convolution_backward: (2, 9),
}


def depthwise_share(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """Make one call and return the share of its time spent in depthwise convolutions, between 0 and 1.

    On a CUDA device, the host must be ahead of the device, as it is for batches of a realistic size. Otherwise the gaps
    between launches are counted as well.

    Args:
        call: the call to make.
        device: the device on which it computes; by default the CPU.
    """
    marks = _DeviceMarks(device) if device is not None and device.type == "cuda" else _HostMarks()
    with _Recorder(marks) as recorder:
        start = marks.now()
        call()
        end = marks.now()
    return marks.seconds(recorder.spans) / marks.seconds([(start, end)])


class _HostMarks:
    """Marks of points in time, by the clock of the host."""

    def now(self) -> Any:
        return time.perf_counter()

    def seconds(self, spans: Sequence[tuple[Any, Any]]) -> float:
        return sum(end - start for start, end in spans)


class _DeviceMarks:
    """Marks of points in time, by events in the queue of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, spans: Sequence[tuple[Any, Any]]) -> float:
        torch.cuda.synchronize(self._device)
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3


class _Recorder(TorchDispatchMode):
    """A mode that records when depthwise convolutions start and end; operators that an operator calls are not recorded."""

    def __init__(self, marks: _HostMarks | _DeviceMarks) -> None:
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
    kernel_at, groups_at = _PYTORCH[operator]
    kernel, groups = args[kernel_at], args[groups_at] if len(args) > groups_at else 1
    # With a single group, it is an ordinary convolution, whatever the number of channels.
    return kernel.dim() == 4 and kernel.shape[1] == 1 and groups > 1
