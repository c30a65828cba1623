"""Every kernel against the definition in float64: shapes that do not fill blocks, several configurations, all types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cases import CASES, Case
from tests.ops.gpu.helpers import DEVICE, DTYPES, assert_exact, draw, exact, prepared_grad, prepared_sum
from widekernel.ops import reference
from widekernel.ops.gpu.kernel_configs import (
    DirectNchw,
    DirectNhwc,
    DirectNhwcGrad,
    Flat,
    FlatGrad,
    KernelConfig,
    Toeplitz,
    ToeplitzGrad,
)
from widekernel.ops.problem import Anchor

pytestmark = pytest.mark.interpreted

MORE = [
    Case("wider-than-a-block", (3, 2, 9, 21), ((7, 13, None),)),
    Case("cross", (2, 2, 12, 18), ((11, 3, None), (3, 17, None), (5, 5, (0, 4)))),
]
ALL = CASES + MORE
# An anchor outside the middle, an image smaller than the kernel, several rectangles, blocks that do not fill the image.
SOME = [*[case for case in CASES if case.name in ("wide-anchored-left", "kernel-larger-than-image")], *MORE]
# Rows in M only, rows in N as well, images and rows in N, and blocks of columns narrower than their input.
TOEPLITZ = [
    Toeplitz(4, 3, rows=4, columns=16, row_blocks=1, images=16, depth=16),
    Toeplitz(4, 3, rows=1, columns=16, row_blocks=16, images=1, depth=32),
    Toeplitz(4, 3, rows=2, columns=8, row_blocks=4, images=4, depth=16),
    Toeplitz(4, 3, rows=1, columns=16, row_blocks=16, images=2, depth=16, transposed=1),
]
TOEPLITZ_GRADS = [
    ToeplitzGrad(4, 3, kernel_rows=2, inputs=16, outputs=16, depth=32),
    ToeplitzGrad(4, 3, kernel_rows=1, inputs=32, outputs=16, depth=16),
    ToeplitzGrad(4, 3, kernel_rows=8, inputs=16, outputs=32, depth=32),
    ToeplitzGrad(4, 3, kernel_rows=2, inputs=16, outputs=16, depth=32, transposed=1),
    ToeplitzGrad(4, 3, kernel_rows=4, inputs=16, outputs=16, depth=16, copied=1),
    ToeplitzGrad(4, 3, kernel_rows=2, inputs=16, outputs=16, depth=32, transposed=1, copied=1),
]
FLAT_GRAD = FlatGrad(4, 2, pixels=64, images=16)
PLANES = DirectNchw(4, 1, planes=8, pixels=64)
FLAT = Flat(4, 2, pixels=64, images=16)
NHWC = torch.channels_last


def fits(config: KernelConfig, case: Case) -> bool:
    few_taps = max(kh * kw for kh, kw, _ in case.rects) <= 40
    if isinstance(config, (Flat, FlatGrad)):
        return case.shape[2] * case.shape[3] <= config.pixels
    return few_taps or not isinstance(config, (DirectNchw, DirectNhwc, DirectNhwcGrad))


def pairs(configs: list[KernelConfig], cases: list[Case]) -> list[tuple[Case, KernelConfig]]:
    return [(case, config) for config in configs for case in cases if fits(config, case)]


def in_turn(configs: list[KernelConfig], cases: list[Case]) -> list[Any]:
    """Return all pairs; in the short tests, the cases that several configurations fit are shared out among them."""
    found = []
    for number, case in enumerate(cases):
        fitting = [config for config in configs if fits(config, case)]
        for place, config in enumerate(fitting):
            is_short = case in SOME or place == number % len(fitting)
            found.append(pytest.param(case, config, marks=[] if is_short else [pytest.mark.slow]))
    return found


def check_sum(case: Case, config: KernelConfig, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, kernels = draw(case, dtype, layout)
    scale = torch.rand(x.shape[1]).to(DEVICE) + 0.5
    shift = torch.randn(x.shape[1]).to(DEVICE)
    prepared = prepared_sum(x, kernels, case.anchors, config)
    want = exact(x, kernels, case.anchors)
    plain = prepared(x, kernels, case.anchors, None)
    assert_exact(plain, want)
    assert plain.is_contiguous(memory_format=layout)
    affine = (scale.view(-1, 1, 1) * want.cpu().to(DEVICE) + shift.view(-1, 1, 1)).relu()
    assert_exact(prepared(x, kernels, case.anchors, shift, scale, True), affine)


@pytest.mark.parametrize(
    ("case", "config"), pairs(TOEPLITZ[:1], ALL) + in_turn([FLAT, PLANES], ALL) + pairs(TOEPLITZ[1:], SOME), ids=str
)
def test_sum_of_planes(case: Case, config: KernelConfig) -> None:
    check_sum(case, config, torch.float32, torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("case", "config"), pairs([TOEPLITZ[0], TOEPLITZ[3], FLAT, PLANES], [SOME[0], SOME[2]]), ids=str)
def test_sum_of_planes_in_short_types(case: Case, config: KernelConfig, dtype: torch.dtype) -> None:
    check_sum(case, config, dtype, torch.contiguous_format)


NHWC_SUMS = [DirectNhwc(4, 1, rows=2, columns=8, channels=4), DirectNhwc(2, 1, 4, 4, 4)]
SMALL = [case for case in CASES if max(max(r[:2]) for r in case.rects) <= 5]
# Each case with float32 and one of the other types, each type with both configurations, and the first case with all.
TYPED = [
    pytest.param(case, dtype, config, id=f"{case}-{dtype}-{config}", marks=[] if often else [pytest.mark.slow])
    for at, case in enumerate(SMALL)
    for number, dtype in enumerate(DTYPES)
    for place, config in enumerate(NHWC_SUMS)
    for often in [at == 0 or (place == at // 2 % 2 and number in (0, 1 + at % 2))]
]


@pytest.mark.parametrize(("case", "dtype", "config"), TYPED)
def test_sum_of_channels_last(case: Case, dtype: torch.dtype, config: DirectNhwc) -> None:
    check_sum(case, config, dtype, NHWC)


@pytest.mark.parametrize("config", [TOEPLITZ[0], FLAT], ids=str)
def test_large_kernels_return_channels_last_images(config: KernelConfig) -> None:
    check_sum(Case("large", (2, 3, 7, 6), ((13, 11, None),)), config, torch.float32, NHWC)


def check_grad(case: Case, config: KernelConfig, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, _ = draw(case, dtype, layout)
    grad = torch.randn(x.shape).to(x)
    for (kh, kw, _), anchor in zip(case.rects, case.anchors):
        got = prepared_grad(x, (kh, kw), anchor, config)(x, grad, (kh, kw), anchor)
        want = reference.depthwise_weight_grad(x.double(), grad.double(), (kh, kw), anchor)
        assert got.shape == (x.shape[1], 1, kh, kw)
        assert_exact(got, want)


@pytest.mark.parametrize(
    ("case", "config"), in_turn([TOEPLITZ_GRADS[0], FLAT_GRAD], ALL) + pairs(TOEPLITZ_GRADS[1:], SOME), ids=str
)
def test_weight_gradient(case: Case, config: KernelConfig) -> None:
    check_grad(case, config, torch.float32, torch.contiguous_format)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("case", "config"), pairs([TOEPLITZ_GRADS[0], TOEPLITZ_GRADS[4], FLAT_GRAD], SOME[1:]), ids=str)
def test_weight_gradient_in_short_types(case: Case, config: KernelConfig, dtype: torch.dtype) -> None:
    check_grad(case, config, dtype, torch.contiguous_format)


def test_weight_gradient_of_more_columns_than_one_launch_computes() -> None:
    check_grad(Case("wide", (2, 1, 3, 80), ((2, 150, (1, 70)),)), TOEPLITZ_GRADS[1], torch.float32, torch.contiguous_format)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[] if dtype == DTYPES[0] or (at, dtype) == (0, DTYPES[1]) else [pytest.mark.slow])
        for at, case in enumerate([CASES[0], CASES[6], CASES[10]])
        for dtype in DTYPES
    ],
    ids=str,
)
def test_weight_gradient_of_channels_last(case: Case, dtype: torch.dtype) -> None:
    check_grad(case, DirectNhwcGrad(4, 1, columns=4, channels=2), dtype, NHWC)


@pytest.mark.parametrize("config", [TOEPLITZ[0], FLAT], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_branches_and_their_adjoint(dtype: torch.dtype, config: KernelConfig) -> None:
    case = Case("branches", (3, 2, 7, 8), ((7, 3, None), (3, 7, None), (3, 2, (0, 1))))
    x, kernels = draw(case, dtype)
    prepared = prepared_sum(x, kernels, case.anchors, config)
    ys = prepared.branches(x, kernels, case.anchors)
    assert len(ys) == len(kernels)
    for y, kernel, anchor in zip(ys, kernels, case.anchors):
        assert_exact(y, exact(x, [kernel], [anchor]))
    # The inputs may be stored in different ways.
    xs = [x, torch.randn(x.shape).to(x).contiguous(memory_format=NHWC), torch.randn(3, 5, 7, 8).to(x)[:, 1:3]]
    want = sum(exact(image, [kernel], [anchor]) for image, kernel, anchor in zip(xs, kernels, case.anchors))
    assert_exact(prepared.sum_of_branches(xs, kernels, case.anchors), want)


def _strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), 7.0, dtype=x.dtype, device=x.device)
    wide[..., ::2, 1::2] = x
    return wide[..., ::2, 1::2]


STORED = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch-inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": _strided,
    "some-channels": lambda x: torch.cat([x, x, x], 1)[:, 3:6],
    "expanded": lambda x: x[:1].expand_as(x),
    "negative": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("config", "layout"),
    [(TOEPLITZ[0], torch.contiguous_format), (FLAT, torch.contiguous_format), (DirectNhwc(4, 1, 2, 4, 2), NHWC)],
    ids=lambda value: str(value),
)
def test_any_strides(config: KernelConfig, layout: torch.memory_format, stored: str) -> None:
    case = Case("strides", (2, 3, 5, 5), ((2, 3, None),))
    x, kernels = draw(case, torch.float32, layout)
    x = STORED[stored](x)
    # The problem determines the layout of the result; each call adapts to the strides of its images.
    prepared = prepared_sum(
        torch.empty(case.shape, device=DEVICE).contiguous(memory_format=layout), kernels, case.anchors, config
    )
    assert_exact(prepared(x, kernels, case.anchors, None), exact(x, kernels, case.anchors))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("config", [TOEPLITZ_GRADS[0], DirectNhwcGrad(4, 1, 4, 2)], ids=str)
def test_any_strides_of_weight_gradients(config: KernelConfig, stored: str) -> None:
    x, grad = (STORED[stored](torch.randn(2, 3, 5, 5).to(DEVICE)) for _ in range(2))
    size: Anchor = (2, 3)
    got = prepared_grad(x.contiguous(), size, (1, 2), config)(x, grad, size, (1, 2))
    assert_exact(got, reference.depthwise_weight_grad(x.double(), grad.double(), size, (1, 2)))


@pytest.mark.parametrize("config", [TOEPLITZ_GRADS[0], DirectNhwcGrad(4, 1, 4, 2)], ids=str)
def test_two_runs_are_bitwise_equal(config: KernelConfig) -> None:
    x, grad = torch.randn(5, 3, 6, 4).to(DEVICE), torch.randn(5, 3, 6, 4).to(DEVICE)
    prepared = prepared_grad(x, (3, 3), (1, 1), config)
    first, second = (prepared(x, grad, (3, 3), (1, 1)) for _ in range(2))
    assert torch.equal(first, second)
