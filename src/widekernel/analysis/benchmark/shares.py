"""Which share of a network's time goes into depthwise convolutions.

Operators are timed as they are called, forward and backward. PyTorch's profiler would say the same and more, but not without
messages on the error stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

# Of each operator of PyTorch's the places of the kernel and of the number of groups among its arguments.
_PYTORCH = {
    torch.ops.aten.convolution: (1, 8),
    torch.ops.aten.conv2d: (1, 6),  # seen whole in inference mode only
    torch.ops.aten.convolution_backward: (2, 9),
}


def depthwise_share(call: Callable[[], Any]) -> float:
    """Run one call and give the share of depthwise convolutions in its time, between 0 and 1."""
    with _Watch() as watch:
        start = time.perf_counter()
        call()
        total = time.perf_counter() - start
    return watch.seconds / total


class _Watch(TorchDispatchMode):
    """Adds up the time of depthwise convolutions; what an operator calls in turn is not seen."""

    seconds = 0.0

    @override
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        if _is_depthwise(function.overloadpacket, args):
            self.seconds += time.perf_counter() - start
        return result


def _is_depthwise(operator: Any, args: Any) -> bool:
    if operator in (torch.ops.widekernel.depthwise_sum, torch.ops.widekernel.depthwise_weight_grad):
        return True
    if operator not in _PYTORCH:
        return False
    of_kernel, of_groups = _PYTORCH[operator]
    kernel, groups = args[of_kernel], args[of_groups] if len(args) > of_groups else 1
    # A single group is an ordinary convolution, whatever its channels.
    return kernel.dim() == 4 and kernel.shape[1] == 1 and groups > 1
