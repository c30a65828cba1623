"""Whole networks: a training step and inference, ours against the same network on PyTorch's convolutions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.analysis.benchmark.checking import check_agreement
from widekernel.analysis.benchmark.errors import BenchmarkError
from widekernel.analysis.benchmark.operators import LAYOUTS
from widekernel.analysis.benchmark.plain import on_pytorch
from widekernel.analysis.benchmark.shares import depthwise_share
from widekernel.analysis.benchmark.timing import Timing, first_calls, interleave
from widekernel.transforms.acceleration import accelerate
from widekernel.transforms.fold import Foldable, fold

TRAIN, INFER = MODES = ("train", "infer")
PYTORCH, PYTORCH_FOLDED = "PyTorch", "PyTorch, folded"
OURS, FOLDED, ACCELERATED = "ours", "ours, folded", "ours, accelerated"
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 1e-2
"""Largest difference allowed, relative to the largest output and to the norm of all gradients."""

# Seconds of one call beyond which there is one more, and none.
_PATIENCE = 10.0, 60.0
_LEARNING_RATE = 1e-6  # steps are timed, not taken: the numbers must not run away
# A scale that a block's output is multiplied with starts so small that nothing wrong within the block would be seen.
_TINY, _SEEN = 0.01, 0.5


@dataclass(frozen=True)
class NetworkRow:
    """One rival in one mode and layout; times in milliseconds.

    Attributes:
        model: its name.
        mode: `train` (forward, loss, backward, step of SGD) or `infer`.
        batch: images in a call.
        size: their height and width.
        rival: what runs.
        layout: of images and weights.
        compiled: whether by `torch.compile`.
        ms: median.
        spread: half the distance between the quartiles, relative to the median.
        calls: that count.
        times_nhwc: how many times faster it is than the network on PyTorch's convolutions with channels_last.
        times_default: how many times faster it is than that in PyTorch's default layout.
        images_per_second: at the median.
        depthwise_share: of the time, in depthwise convolutions; None if compiled, where the profiler cannot tell.
    """

    model: str
    mode: str
    batch: int
    size: int
    rival: str
    layout: str
    compiled: bool
    ms: float
    spread: float
    calls: int
    times_nhwc: float
    times_default: float
    images_per_second: float
    depthwise_share: float | None


@dataclass(frozen=True)
class _Rival:
    rival: str
    layout: str
    compiled: bool
    network: nn.Module
    forward: Callable[[Tensor], Tensor]
    images: Tensor

    @property
    def name(self) -> str:
        return f"{self.rival} {self.layout}{' compiled' if self.compiled else ''}"


def measure_network(
    name: str,
    model: nn.Module,
    *,
    batch: int,
    size: int,
    modes: Sequence[str] = MODES,
    compiled: bool = False,
    seconds: float = 3.0,
    rounds: int | None = None,
) -> Iterator[NetworkRow]:
    """Time a network, all rivals in turns.

    Args:
        name: for the table.
        model: takes (N, C, size, size) and gives (N, classes); left as it is.
        batch: N.
        size: height and width of the images.
        modes: those to time.
        compiled: whether `torch.compile` takes part.
        seconds: for each rival.
        rounds: calls of each rival, instead.

    Raises:
        BenchmarkError: if rivals give different outputs or gradients, or the network cannot run.
    """
    model = _with_visible_blocks(model)
    images = torch.randn(batch, getattr(model, "in_chans", 3), size, size, generator=torch.Generator().manual_seed(0))
    for mode in modes:
        rivals = _rivals(model, mode, images, compiled)
        target = torch.arange(batch) % _classes(name, model, images)
        calls = {rival.name: _call(rival, mode, target) for rival in rivals}
        _check(name, rivals, mode, target)
        timings = interleave(calls, first_calls(calls)[1], seconds, rounds, _PATIENCE)
        for rival in rivals:
            share = None if rival.compiled else depthwise_share(calls[rival.name])
            yield _row(name, mode, rival, timings, share)


def _rivals(model: nn.Module, mode: str, images: Tensor, compiled: bool) -> list[_Rival]:
    """Build the networks to compare; those that would be the same network twice are left out."""
    rivals = []
    for layout, memory_format in LAYOUTS.items():
        x = images.contiguous(memory_format=memory_format)
        for name, network in _networks(model, mode, x).items():
            network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
            rivals.append(_Rival(name, layout, False, network, network, x))
            if compiled:
                twin = copy.deepcopy(network)
                rivals.append(_Rival(name, layout, True, twin, _compiled(twin, len(rivals)), x))
    return rivals


def _networks(model: nn.Module, mode: str, x: Tensor) -> dict[str, nn.Module]:
    base = copy.deepcopy(model).train(mode == TRAIN)
    plain, is_ours = on_pytorch(base)
    networks = {PYTORCH: plain}
    if is_ours:
        networks[OURS] = base
    fast = copy.deepcopy(base)
    if mode == INFER and any(isinstance(module, Foldable) and module.foldable() for module in base.modules()):
        with warnings.catch_warnings():
            # Of layers that stay as they are, which is a result and no news.
            warnings.simplefilter("ignore")
            fast = fold(base)
        if is_ours:
            networks[PYTORCH_FOLDED] = on_pytorch(fast)[0]
        networks[FOLDED] = copy.deepcopy(fast)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    with torch.set_grad_enabled(mode == TRAIN):
        networks[ACCELERATED], _ = accelerate(fast.to(memory_format=layout), x)  # type: ignore[call-overload]
    return networks


def _compiled(network: nn.Module, number: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return network(x)

    # PyTorch keeps what it has compiled by code, a few forms of each. Rivals with the same code would take these from each
    # other, and every call would have to find its own.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{number}")
    return torch.compile(forward, dynamic=False)


def _call(rival: _Rival, mode: str, target: Tensor) -> Callable[[], None]:
    forward, x = rival.forward, rival.images
    if mode == INFER:

        def infer() -> None:
            with torch.inference_mode():
                forward(x)

        return infer
    optimizer = torch.optim.SGD(rival.network.parameters(), lr=_LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), target).backward()
        optimizer.step()

    return step


def _check(name: str, rivals: Sequence[_Rival], mode: str, target: Tensor) -> None:
    """Compare outputs, or the gradients of one step; compiles what is to be compiled."""
    yardstick = f"{PYTORCH} NHWC"
    wanted: list[Tensor] = []
    for rival in sorted(rivals, key=lambda rival: rival.name != yardstick):
        torch.manual_seed(0)  # for networks that drop something at random
        if mode == INFER:
            with torch.inference_mode():
                got = [rival.forward(rival.images)]
            wanted = wanted or got
            outputs = {rival.name: got[0], yardstick: wanted[0]}
            check_agreement(outputs, yardstick, f"the output of {name}", OUTPUT_TOLERANCE)
            continue
        try:
            F.cross_entropy(rival.forward(rival.images), target).backward()
        except (RuntimeError, ValueError) as error:
            shape = tuple(rival.images.shape)
            raise BenchmarkError(
                f"{name} ({rival.name}) cannot be trained on images {shape}: {error}. Give another batch or size, or "
                "time inference only."
            ) from error
        got = [p.grad for p in rival.network.parameters() if p.grad is not None]
        wanted = wanted or [grad.clone() for grad in got]
        apart = _distance(got, wanted)
        if not apart <= GRADIENT_TOLERANCE:
            raise BenchmarkError(
                f"the gradients of {name}: {rival.name} and {yardstick} differ by {apart:.2g} of their norm, more than "
                f"{GRADIENT_TOLERANCE:g}. Nothing is reported: find out which of the two is wrong, or time inference only."
            )


def _distance(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Give the norm of the difference of all gradients relative to their norm; infinity if they are not the same ones."""
    if [g.shape for g in got] != [w.shape for w in wanted]:
        return float("inf")
    apart = sum((g - w).double().square().sum().item() for g, w in zip(got, wanted))
    norm = sum(w.double().square().sum().item() for w in wanted)
    return (apart / (norm or 1.0)) ** 0.5


@torch.no_grad()
def _with_visible_blocks(model: nn.Module) -> nn.Module:
    """Give a copy whose blocks all have an influence on the output, as after training, so that errors in them show."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if 0 < parameter.abs().max() <= _TINY and parameter.unique().numel() == 1:
            parameter.fill_(_SEEN)
    return model


def _classes(name: str, model: nn.Module, images: Tensor) -> int:
    """Run one image, which is also how one learns that the network does not take this size."""
    try:
        with torch.inference_mode():
            output = copy.deepcopy(model).eval()(images[:1])
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = tuple(images.shape[1:])
        raise BenchmarkError(f"{name} does not run on images of {shape}: {error}. Give another size.") from error
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise BenchmarkError(f"{name} gives no table (N, classes) but {type(output).__name__}: only classifiers are timed.")
    return output.shape[1]


def _row(name: str, mode: str, rival: _Rival, timings: dict[str, Timing], share: float | None) -> NetworkRow:
    timing = timings[rival.name]
    batch, size = rival.images.shape[0], rival.images.shape[2]
    return NetworkRow(
        model=name,
        mode=mode,
        batch=batch,
        size=size,
        rival=rival.rival,
        layout=rival.layout,
        compiled=rival.compiled,
        ms=1e3 * timing.median,
        spread=timing.spread,
        calls=timing.calls,
        times_nhwc=timings[f"{PYTORCH} NHWC"].median / timing.median,
        times_default=timings[f"{PYTORCH} NCHW"].median / timing.median,
        images_per_second=batch / timing.median,
        depthwise_share=share,
    )
