"""How many images PyTorch can convolve in a given time, found by calls of growing size.

Some of PyTorch's gradients take minutes on large tensors. Their time is proportional to the number of images, so that of a
call on some of the images is an estimate of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from widekernel.bench.calls import Call
from widekernel.bench.cases import Case
from widekernel.bench.timing import Stopwatch

SURE_RATE = 2e8
"""Multiply-accumulates per second that every implementation exceeds, so that smaller cases need no trial."""
MOST = 3.0
"""Largest time of a single image, as a multiple of the given time."""
_CHANNELS = 16  # per thread, in the first trial: a block of channels for each


def affordable_images(call_on: Callable[[int, int], Call], case: Case, longest: float, stopwatch: Stopwatch) -> int:
    """Return the number of images, at most N, that a call can take to stay within `longest` seconds.

    The result is at least 1 if a call on one image takes at most `MOST` times as long, else 0.

    Args:
        call_on: returns a call on the first images and the first channels, given how many of each.
        case: the whole call.
        longest: seconds.
        stopwatch: times the trials.
    """
    if case.macs <= SURE_RATE * longest:
        return case.batch
    few = min(case.channels, _CHANNELS * torch.get_num_threads())
    seconds = _shortest(call_on(1, few), longest * few / case.channels, stopwatch)
    if few < case.channels:
        if seconds * case.channels / few > MOST * longest:
            return 0
        seconds = _shortest(call_on(1, case.channels), longest / case.batch, stopwatch)
    elif seconds > MOST * longest:
        return 0
    return max(1, min(case.batch, int(longest / seconds)))


def _shortest(call: Call, enough: float, stopwatch: Stopwatch) -> float:
    """Time a call; if it took longer than `enough` seconds, time it again, because the first one includes preparations."""
    seconds = stopwatch.time(call)[1]
    return seconds if seconds <= enough else min(seconds, stopwatch.time(call)[1])
