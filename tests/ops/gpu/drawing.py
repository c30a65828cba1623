"""Random small problems for each kernel, with a configuration that fits and images stored in various ways.

The kind, the type and a number determine what is drawn, so that a failure can be reproduced.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.ops.gpu.helpers import assert_exact, exact
from widekernel.ops import reference
from widekernel.ops.gpu.candidates import candidates, small_channels_last
from widekernel.ops.gpu.kernel_configs import (
    Chip,
    DirectNchw,
    DirectNhwc,
    DirectNhwcGrad,
    Flat,
    FlatGrad,
    KernelConfig,
    Toeplitz,
    ToeplitzGrad,
)
from widekernel.ops.gpu.launch import PreparedSum, PreparedWeightGrad
from widekernel.ops.gpu.launch_geometry import transposed
from widekernel.ops.problem import (
    DEPTHWISE_BRANCHES,
    DEPTHWISE_SUM,
    DEPTHWISE_SUM_OF_BRANCHES,
    DEPTHWISE_WEIGHT_GRAD,
    Problem,
)

NHWC = torch.channels_last
# Numbers of processors for which sums over images are split among several programs, or not.
PROCESSORS = (1, 4, 16, 40)
SHARED = (99 * 1024, 227 * 1024)


@dataclass(frozen=True)
class Kind:
    """An operator, the kernel that computes it, and whether its rectangles have gaps."""

    op: str
    method: type[KernelConfig]
    transposed: int = 0
    copied: int = 0
    dilated: bool = False

    def __str__(self) -> str:
        how = ["transposed"] * self.transposed + ["copied"] * self.copied + ["dilated"] * self.dilated
        return "-".join([self.op.removeprefix("depthwise_"), self.method.__name__.lower(), *how])

    def computes_by(self, config: KernelConfig) -> bool:
        how = getattr(config, "transposed", 0), getattr(config, "copied", 0)
        return isinstance(config, self.method) and how == (self.transposed, self.copied)


KINDS = [
    *[Kind(op, Toeplitz) for op in (DEPTHWISE_SUM, DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES)],
    *[Kind(op, Toeplitz, transposed=1) for op in (DEPTHWISE_SUM, DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES)],
    *[Kind(op, Flat) for op in (DEPTHWISE_SUM, DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES)],
    Kind(DEPTHWISE_SUM, DirectNchw),
    Kind(DEPTHWISE_SUM, DirectNhwc),
    *[Kind(DEPTHWISE_WEIGHT_GRAD, ToeplitzGrad, transposed, copied) for transposed in (0, 1) for copied in (0, 1)],
    Kind(DEPTHWISE_WEIGHT_GRAD, FlatGrad),
    Kind(DEPTHWISE_WEIGHT_GRAD, DirectNhwcGrad),
]
DILATED = [replace(kind, dilated=True) for kind in KINDS]


def _among(x: Tensor, shape: tuple[int, ...], part: tuple[slice, ...]) -> Tensor:
    """Store the images as a part of a larger tensor whose other elements are NaN and must not be read."""
    whole = torch.full(shape, float("nan"), dtype=x.dtype)
    whole[part] = x
    return whole[part]


ALL = slice(None)
STORED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=NHWC),
    "later-images": lambda x: _among(x, (len(x) + 3, *x.shape[1:]), (slice(2, len(x) + 2),)),
    "every-other-image": lambda x: _among(x, (2 * len(x), *x.shape[1:]), (slice(None, None, 2),)),
    "some-channels": lambda x: _among(x, (len(x), x.shape[1] + 3, *x.shape[2:]), (ALL, slice(1, x.shape[1] + 1))),
    "some-channels-last": lambda x: _among(
        x.permute(0, 2, 3, 1), (len(x), *x.shape[2:], x.shape[1] + 3), (ALL, ALL, ALL, slice(1, x.shape[1] + 1))
    ).permute(0, 3, 1, 2),
    "some-pixels": lambda x: _among(
        x, (*x.shape[:2], x.shape[2] + 3, x.shape[3] + 2), (ALL, ALL, slice(1, x.shape[2] + 1), slice(2, None))
    ),
    "one-image-repeated": lambda x: x[:1].expand_as(x),
}


@dataclass(frozen=True)
class Drawn:
    """A problem and how to compute it; `stored` names the way in which each image is stored."""

    problem: Problem
    config: KernelConfig
    chip: Chip
    stored: tuple[str, ...]

    def check(self) -> None:
        """Compute the problem and compare the results with float64."""
        problem = self.problem
        images = [STORED[name](torch.randn(problem.shape).to(problem.dtype)) for name in self.stored]
        channels = problem.shape[1]
        kernels = [torch.randn(channels, 1, *size).to(problem.dtype) for size in problem.kernels]
        if problem.op == DEPTHWISE_WEIGHT_GRAD:
            self._check_gradient(*images)
            return
        prepared, anchors = PreparedSum(problem, self.config, self.chip), problem.anchors
        rects = zip(images * len(kernels), kernels, anchors, problem.dilations)
        alone = [exact(x, [kernel], [anchor], (dilation,)) for x, kernel, anchor, dilation in rects]
        if problem.op == DEPTHWISE_SUM:
            bias, scale = (torch.randn(channels).to(problem.dtype) for _ in range(2))
            got = [prepared(images[0], kernels, anchors, bias, scale, True)]
            want = [reference.epilogue(sum(alone), scale.double(), bias.double(), True)]  # type: ignore[arg-type]
        elif problem.op == DEPTHWISE_BRANCHES:
            got, want = prepared.branches(images[0], kernels, anchors), alone
        else:
            got, want = [prepared.sum_of_branches(images, kernels, anchors)], [sum(alone)]
        assert len(got) == len(want)
        for one, of in zip(got, want):
            assert_exact(one, of)

    def _check_gradient(self, x: Tensor, grad: Tensor) -> None:
        (size,), (anchor,), (dilation,) = self.problem.kernels, self.problem.anchors, self.problem.dilations
        got = PreparedWeightGrad(self.problem, self.config, self.chip)(x, grad, size, anchor)
        assert_exact(got, reference.depthwise_weight_grad(x.double(), grad.double(), size, anchor, dilation))


def drawn(kind: Kind, dtype: torch.dtype, number: int, most: int) -> Drawn:
    """Draw until the kernel can compute the problem with about `most` accesses to memory, which determine the time."""
    rng = random.Random(f"{kind} {dtype} {number}")
    torch.manual_seed(rng.getrandbits(32))
    wide = rng.random() < 0.5
    # Every row of every image is a separate access, and only many of them are split among programs.
    most *= 2 if kind.method is DirectNhwcGrad or kind.dilated else 1
    while True:
        problem = _problem(rng, kind, dtype, wide)
        chip = Chip((9, 0), rng.choice(PROCESSORS), rng.choice(SHARED))
        if problem.op in (DEPTHWISE_BRANCHES, DEPTHWISE_SUM_OF_BRANCHES) and small_channels_last(problem):
            continue
        configs = [config for config in candidates(problem, chip) if kind.computes_by(config)]
        configs = [config for config in configs if _block(config) <= 128 * 64 and _accesses(problem, config) <= most]
        if configs:
            images = len(problem.kernels) if problem.op == DEPTHWISE_SUM_OF_BRANCHES else 1
            images += problem.op == DEPTHWISE_WEIGHT_GRAD
            return Drawn(problem, rng.choice(configs), chip, tuple(rng.choices(list(STORED), k=images)))


def _block(config: KernelConfig) -> int:
    held = [getattr(config, name, 1) for name in ("rows", "columns", "row_blocks", "images", "channels", "planes", "pixels")]
    return math.prod(held)


def _accesses(problem: Problem, config: KernelConfig) -> int:
    problem = transposed(problem) if getattr(config, "transposed", 0) else problem
    batch, channels, height, width = problem.shape
    taps = sum(map(math.prod, problem.kernels))
    kh, kw = map(max, zip(*problem.kernels))
    if isinstance(config, Toeplitz):
        reach = config.rows * config.row_blocks
        programs = (
            channels * math.ceil(batch / config.images) * math.ceil(height / reach) * math.ceil(width / config.columns)
        )
        band = config.columns + max(size[1] * dilation for size, dilation in zip(problem.kernels, problem.dilations))
        blocks = math.ceil(band / config.depth)
        return 2 * programs * len(problem.kernels) * min(height + reach, reach + kh) * blocks
    if isinstance(config, ToeplitzGrad):
        blocks = math.ceil(batch * height / config.depth) * math.ceil(width / config.outputs)
        return 2 * channels * math.ceil(kh / config.kernel_rows) * math.ceil(width / config.inputs) * blocks
    if isinstance(config, DirectNhwcGrad):
        return kh * (kw + 1) * batch * height * math.ceil(width / config.columns)
    if isinstance(config, DirectNhwc):
        tiles = math.ceil(height / config.rows) * math.ceil(width / config.columns)
        return batch * tiles * taps * (config.rows + 1)
    if isinstance(config, DirectNchw):
        return 2 * taps * math.ceil(batch * channels / config.planes) * math.ceil(height * width / config.pixels)
    return channels * (1 + 2 * math.ceil(batch / config.images))  # type: ignore[attr-defined]


# Sums are split among programs only for many images, and unevenly only for an odd number of them.
BATCHES: dict[type[KernelConfig], tuple[int, ...]] = {ToeplitzGrad: (1, 17, 97, 150), DirectNhwcGrad: (5, 9, 19)}
MOST_PIXELS = {ToeplitzGrad: 15000}
# Largest side of a kernel, and largest number of taps.
MOST_TAPS = {DirectNchw: (5, 50), DirectNhwc: (5, 50), DirectNhwcGrad: (3, 9)}


def _problem(rng: random.Random, kind: Kind, dtype: torch.dtype, wide: bool) -> Problem:
    direct = kind.method in MOST_TAPS
    flat = kind.method in (Flat, FlatGrad)
    longest, taps = (5, 50) if kind.dilated else MOST_TAPS.get(kind.method, (15, 300))
    # On smaller images, most dilated taps only ever meet padding.
    least = 4 if kind.dilated and rng.random() < 0.8 else 1
    while True:
        batch, channels = rng.choice(BATCHES.get(kind.method, (1, 2, 3, 5, 17, 33))), rng.randint(1, 3)
        height, width = rng.randint(least, 9 if flat else 12), rng.randint(least, 9 if flat else 12)
        if wide and not flat and kind.method is not DirectNhwcGrad:
            # More columns than a block has; if transposed, more rows.
            height, width = (width, height + 16) if not kind.transposed else (width + 16, height)
        rects = 1
        if kind.op == DEPTHWISE_SUM:
            rects = rng.choice((1, 1, 2))
        elif kind.op != DEPTHWISE_WEIGHT_GRAD:
            rects = rng.choice((2, 3))
        kernels = tuple(_size(rng, longest, kind.transposed) for _ in range(rects))
        pixels = batch * channels * height * width
        if pixels <= MOST_PIXELS.get(kind.method, 2500) and sum(map(math.prod, kernels)) <= taps:
            break
    anchors = tuple((_anchor(rng, kh), _anchor(rng, kw)) for kh, kw in kernels)
    last = kind.method in (DirectNhwc, DirectNhwcGrad) or (not direct and rng.random() < 0.2)
    made = Problem(kind.op, "cpu", dtype, (batch, channels, height, width), kernels, anchors, channels_last=last)
    if not kind.dilated:
        return made
    dilations = [rng.choice((2, 3, 4, 5, 9)), *[rng.choice((1, 2, 3, 4, 5)) for _ in kernels[1:]]]
    rng.shuffle(dilations)
    return replace(made, dilations=tuple(dilations))


def _size(rng: random.Random, most: int, tall: int) -> tuple[int, int]:
    long, short = rng.randint(1, rng.choice((most, 2 * most))), rng.randint(1, most)
    return (max(long, 7), rng.randint(1, 3)) if tall else (short, long)


def _anchor(rng: random.Random, size: int) -> int:
    return rng.choice((size // 2, size // 2, 0, size - 1, rng.randrange(size)))
