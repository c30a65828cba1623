"""Timing a layer in both implementations, once for each input; results are cached."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widekernel import ops
from widekernel.layers.rebuilding import layer_like, norm_like
from widekernel.transforms.acceleration.input_capture import InputSpec

# Times that differ by less than this factor count as equal: measurements vary by a few percent.
LEAST_GAIN = 1.05
# Each implementation is timed at least ROUNDS times and for SECONDS, but never longer than PATIENCE (in seconds).
ROUNDS, SECONDS, PATIENCE = 9, 0.03, 0.5
# Gains within this interval are timed TIMES_AS_OFTEN as long, because the decision is close.
CLOSE, TIMES_AS_OFTEN = (0.95, 1.25), 3


class Timing(NamedTuple):
    """Time of one call, or of several together, before and after, in milliseconds."""

    before: float
    after: float

    @property
    def is_gain(self) -> bool:
        """Whether the change is worth making."""
        return self.before > LEAST_GAIN * self.after


_KNOWN: dict[Hashable, Timing] = {}


def compare(layer: Any, replacement: type[nn.Module], spec: InputSpec, backward: bool) -> Timing:
    """Time a layer as it is, and in the implementation of the class `replacement`.

    A pair that has been timed before under the same conditions is not timed again.

    Args:
        layer: a convolution, linear layer or batch norm.
        replacement: class of the alternative implementation.
        spec: description of the input for the timing.
        backward: whether to time the backward pass, too.
    """
    # The timed copies share the data of the layer, but neither its hooks, which must not run, nor its gradients.
    if isinstance(layer, nn.BatchNorm2d):
        before, after = (norm_like(layer, kind) for kind in (type(layer), replacement))
    else:
        before, after = (layer_like(layer, layer.weight, layer.bias, kind) for kind in (type(layer), replacement))
    trained = tuple(parameter.requires_grad for parameter in before.parameters()) if backward else None
    like = tuple((parameter.dtype, parameter.stride()) for parameter in before.parameters())
    key = (replacement, before.extra_repr(), like, trained)
    return _timed(key, before, after, spec, backward)


def compare_block(block: nn.Module, fused: nn.Module, spec: InputSpec) -> Timing:
    """Time a block as it is, and its fused form, without gradients; the same rules hold as for `compare`."""
    strides = tuple(parameter.stride() for parameter in block.parameters())
    return _timed((type(fused), repr(block), strides), block, fused, spec, False)


def _timed(key: Hashable, before: nn.Module, after: nn.Module, spec: InputSpec, backward: bool) -> Timing:
    device = spec.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    circumstances = (torch.get_num_threads(), torch.backends.mkldnn.enabled, ops.backends(), autocast)
    key = (key, spec, circumstances)
    if key not in _KNOWN:
        _KNOWN[key] = Timing(*measure(before, after, _input(spec), backward))
    return _KNOWN[key]


def forget() -> None:
    """Clear the cached measurements."""
    _KNOWN.clear()


def measure(before: nn.Module, after: nn.Module, x: Tensor, backward: bool) -> tuple[float, float]:
    """Time two layers on one input in turn, and return the lower quartile of the times of each, in milliseconds."""
    runs = [_run(layer, x, backward) for layer in (before, after)]
    first = [_seconds(run, x.device) for run in runs]
    samples: list[list[float]] = [[], []]
    spent = sum(first)
    while spent < PATIENCE and not _is_enough(samples, spent):
        # The order alternates, so that neither always runs with the caches in the state that the other has left.
        for way in (0, 1) if len(samples[0]) % 2 else (1, 0):
            samples[way].append(_seconds(runs[way], x.device))
            spent += samples[way][-1]
    return _milliseconds(samples[0] or first[:1]), _milliseconds(samples[1] or first[1:])


def _is_enough(samples: list[list[float]], spent: float) -> bool:
    rounds = len(samples[0])
    if rounds < ROUNDS or spent < SECONDS:
        return False
    gain = _milliseconds(samples[0]) / _milliseconds(samples[1])
    return not CLOSE[0] < gain < CLOSE[1] or (rounds >= TIMES_AS_OFTEN * ROUNDS and spent >= TIMES_AS_OFTEN * SECONDS)


def _milliseconds(seconds: list[float]) -> float:
    # Not the median: other programs only ever make runs slower, and on a busy machine they affect more than half of them.
    return 1e3 * sorted(seconds)[len(seconds) // 4]


def _run(layer: nn.Module, x: Tensor, backward: bool) -> Callable[[], None]:
    if not backward:

        def forward_only() -> None:
            with torch.no_grad():
                layer(x)

        return forward_only
    x.requires_grad_()
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    with torch.no_grad():
        grad = torch.ones_like(layer(x))

    def both_ways() -> None:
        # Not `backward`, which would accumulate into the gradients of parameters.
        torch.autograd.grad(layer(x), wanted, grad)

    return both_ways


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _input(spec: InputSpec) -> Tensor:
    """Make an input of the layer, from a private generator: the global random numbers must not change."""
    overlapping = any(size > 1 and step == 0 for size, step in zip(spec.shape, spec.stride))
    stride = torch.empty(spec.shape, device="meta").stride() if overlapping else spec.stride
    x = torch.empty_strided(spec.shape, stride, dtype=spec.dtype, device=spec.device)
    return x.normal_(generator=torch.Generator(spec.device).manual_seed(0))
