"""The problems that are checked on a GPU: layers of networks, in every type and pass, by every kernel that can run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from widekernel.ops.gpu.config_choice import choose_config, ranked_configs
from widekernel.ops.gpu.kernel_configs import Chip, KernelConfig
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Problem,
)

BATCH = 64
TRIED = 8
"""Number of configurations that tuning tries for a problem."""
KINDS = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
PASSES = {
    DEPTHWISE_SUM: "forward, folded",
    DEPTHWISE_BRANCHES: "forward",
    DEPTHWISE_SUM_OF_BRANCHES: "input gradient",
    DEPTHWISE_WEIGHT_GRAD: "weight gradient",
}

Size = tuple[int, int]
DILATED_BLOCK = ((13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
"""Sizes and dilations of the branches of UniRepLKNet's dilated block."""


@dataclass(frozen=True)
class Layer:
    """A layer: images (N, C, H, W), the rectangles to convolve them with, and whether its network is tuned.

    Without `dilations`, all of them are 1.
    """

    name: str
    shape: tuple[int, int, int, int]
    kernels: tuple[Size, ...]
    channels_last: bool = False
    tuned: bool = False
    dilations: tuple[int, ...] = ()

    def small(self) -> Layer:
        """Return a tiny layer of the same kind: a few images, channels and pixels, and kernels in proportion."""
        _, _, height, width = self.shape
        sides = min(height, 9), min(width, 12)
        kernels = tuple((min(kh, 2 * sides[0] - 1), min(kw, 13)) for kh, kw in self.kernels)
        return replace(self, shape=(2, 2, *sides), kernels=kernels)


def _square(name: str, channels: int, extent: int, *kernels: Size, last: bool = False, tuned: bool = False) -> Layer:
    return Layer(name, (BATCH, channels, extent, extent), kernels, last, tuned)


def layers() -> list[Layer]:
    """Return the layers: those of the networks, and shapes that are not multiples of block shapes."""
    found = []
    for stage, (channels, extent, size) in enumerate([(128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13)], 1):
        found.append(_square(f"replknet-{stage}", channels, extent, (size, size), (5, 5), tuned=True))
    for stage, (channels, extent, size) in enumerate([(124, 56, 51), (249, 28, 49), (499, 14, 47), (998, 7, 13)], 1):
        found.append(_square(f"slak-{stage}", channels, extent, (size, 5), (5, size), (5, 5), tuned=True))
    for stage, channels, extent in ((2, 160, 28), (4, 640, 7)):
        block = _square(f"unireplknet-{stage}", channels, extent, *((size, size) for size, _ in DILATED_BLOCK))
        found.append(replace(block, dilations=tuple(dilation for _, dilation in DILATED_BLOCK)))
    return [
        *found,
        _square("convnext-1-channels_last", 96, 56, (7, 7), last=True),
        _square("convnext-4-channels_last", 768, 7, (7, 7), last=True),
        _square("slak-1-channels_last", 124, 56, (51, 5), (5, 51), (5, 5), last=True),
        _square("convnext-2", 192, 28, (7, 7)),
        _square("small-kernels", 64, 28, (5, 5), (3, 3)),
        Layer("odd-sizes", (5, 19, 29, 37), ((17, 23), (3, 3))),
        Layer("tall-and-narrow", (3, 33, 57, 10), ((31, 3), (3, 5))),
        Layer("one-image", (1, 40, 100, 96), ((31, 31), (5, 5))),
        Layer("dilated-odd-sizes", (5, 19, 29, 37), ((7, 7), (3, 5), (4, 2)), dilations=(2, 5, 7)),
        Layer("dilated-channels_last", (16, 96, 28, 28), ((5, 5),), channels_last=True, dilations=(2,)),
    ]


@dataclass(frozen=True)
class Job:
    """A problem and the configuration to compute it with; `chosen` if that configuration is in use."""

    layer: str
    kind: str
    problem: Problem
    config: KernelConfig
    chosen: bool

    @property
    def direction(self) -> str:
        """Name of the pass."""
        return PASSES[self.problem.op]


def problems(layer: Layer, kind: str, device: str) -> Iterator[Problem]:
    """Yield the problems of a layer: folded, forward in training, and gradients."""
    dtype, tf32 = KINDS[kind]
    anchors = tuple((kh // 2, kw // 2) for kh, kw in layer.kernels)
    dilations = layer.dilations or (1,) * len(anchors)

    def problem(op: str, chosen: Sequence[int]) -> Problem:
        kernels, at, apart = (tuple(values[i] for i in chosen) for values in (layer.kernels, anchors, dilations))
        return Problem(op, device, dtype, layer.shape, kernels, at, layer.channels_last, tf32=tf32, dilations=apart)

    every = range(len(layer.kernels))
    yield problem(DEPTHWISE_SUM, maximal(layer.kernels, dilations))
    if len(every) > 1:
        yield problem(DEPTHWISE_BRANCHES, every)
        yield problem(DEPTHWISE_SUM_OF_BRANCHES, every)
    for number in every:
        yield problem(DEPTHWISE_WEIGHT_GRAD, [number])


def maximal(kernels: Sequence[Size], dilations: Sequence[int]) -> list[int]:
    """Return the indices of the rectangles of the folded layer: rectangles inside one without gaps are added to it."""
    rects = list(zip(kernels, dilations))
    distinct = sorted({rect: number for number, rect in reversed(list(enumerate(rects)))}.values())
    return [i for i in distinct if not any(i != j and _covers(*rects[j], *rects[i]) for j in distinct)]


def _covers(outer: Size, gaps: int, inner: Size, dilation: int) -> bool:
    inside = all((size - 1) * dilation < around for size, around in zip(inner, outer))
    return gaps == 1 and inside


def jobs(device: str, chip: Chip, name: str, small: bool = False) -> list[Job]:
    """Return all jobs, the most important first.

    First come the configurations in use, by type; then the best of every other kernel; then, in bfloat16, those that tuning
    will try for the networks. Tuning has a single process, and uses the programs that the many processes here compiled.

    Args:
        device: "cuda", or "cpu" if kernels are interpreted.
        chip: the GPU.
        name: its full name.
        small: use tiny problems of the same kinds.
    """
    used: list[Job] = []
    others: list[Job] = []
    promising: list[tuple[int, Job]] = []
    for kind in KINDS:
        seen: set[tuple] = set()
        for layer in layers():
            each = layer.small() if small else layer
            for problem in problems(each, kind, device):
                configs = ranked_configs(problem, chip)
                if not configs:
                    # Branches of small kernels on channels_last images are computed one by one.
                    continue
                chosen = choose_config(problem, chip, name).config
                used.append(Job(layer.name, kind, problem, chosen, True))
                seen.add(_kernel_of(problem, chosen))
                fresh = [config for config in configs if config != chosen]
                if kind == "bfloat16" and layer.tuned and not small:
                    promising += [(r, Job(layer.name, kind, problem, c, False)) for r, c in enumerate(fresh[: TRIED - 1])]
                for config in fresh:
                    if _kernel_of(problem, config) not in seen:
                        seen.add(_kernel_of(problem, config))
                        others.append(Job(layer.name, kind, problem, config, False))
    once = dict.fromkeys([*used, *others, *(job for _, job in sorted(promising, key=lambda pair: pair[0]))])
    return list(once)


def _kernel_of(problem: Problem, config: KernelConfig) -> tuple:
    """Return a key that differs for different programs, but not for different block shapes."""
    return problem.op, config.method, getattr(config, "transposed", 0), getattr(config, "copied", 0)
