"""How long a layer takes either way, measured once for each situation and then remembered."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widekernel import ops
from widekernel.layers.rebuilding import layer_like
from widekernel.transforms.acceleration.input_capture import Situation

# Two ways within this factor are the same: what is measured varies by a few percent.
LEAST_GAIN = 1.05
# Each way is timed so often at least, and until these seconds are over, but never once the last ones are.
ROUNDS, SECONDS, PATIENCE = 9, 0.03, 0.5
# Gains within these are timed so many times as often, because a wrong decision is near.
CLOSE, TIMES_AS_OFTEN = (0.95, 1.25), 3


class Timing(NamedTuple):
    """Milliseconds of one call, or of several together, before and after."""

    before: float
    after: float

    @property
    def is_gain(self) -> bool:
        """Whether the change is worth making."""
        return self.before > LEAST_GAIN * self.after


_KNOWN: dict[Hashable, Timing] = {}


def compare(layer: Any, replacement: type[nn.Module], situation: Situation, backward: bool) -> Timing:
    """Time a layer as it is, and computed as `replacement` does; with its backward pass if asked to.

    What has been timed before in the same circumstances is not timed again.
    """
    # Of the same data, but without hooks, which are not to run, and gradients.
    before, after = (layer_like(layer, layer.weight, layer.bias, kind) for kind in (type(layer), replacement))
    trained = tuple(parameter.requires_grad for parameter in before.parameters()) if backward else None
    device = situation.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    circumstances = (torch.get_num_threads(), torch.backends.mkldnn.enabled, ops.backends(), autocast)
    like = before.weight.dtype, before.weight.stride()
    key = (replacement, before.extra_repr(), like, trained, situation, circumstances)
    if key not in _KNOWN:
        _KNOWN[key] = Timing(*measure(before, after, _input(situation), backward))
    return _KNOWN[key]


def forget() -> None:
    """Forget what has been measured."""
    _KNOWN.clear()


def measure(before: nn.Module, after: nn.Module, x: Tensor, backward: bool) -> tuple[float, float]:
    """Time two layers on one input, taking turns, and give the milliseconds of each: the lower quartile of its times."""
    runs = [_run(layer, x, backward) for layer in (before, after)]
    first = [_seconds(run, x.device) for run in runs]
    samples: list[list[float]] = [[], []]
    spent = sum(first)
    while spent < PATIENCE and not _is_enough(samples, spent):
        # Each goes first every other time, so that neither always finds the caches as the other left them.
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
    # Not the median: other programs only ever add to a time, and on a busy machine to more than half of them.
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
        # Not `backward`, which would add to gradients.
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


def _input(situation: Situation) -> Tensor:
    """Make a tensor as the layer was given it; from a generator of its own, as nobody expects random numbers to be used."""
    overlapping = any(size > 1 and step == 0 for size, step in zip(situation.shape, situation.stride))
    stride = torch.empty(situation.shape, device="meta").stride() if overlapping else situation.stride
    x = torch.empty_strided(situation.shape, stride, dtype=situation.dtype, device=situation.device)
    return x.normal_(generator=torch.Generator(situation.device).manual_seed(0))
