"""Laws that hold for all shapes, kernels, anchors and dilations, tested on random ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import assert_close
from widekernel import ops
from widekernel.layers import Rect, maximal_rectangles

SETTINGS = settings(max_examples=40, deadline=None)
TOLERANCE = 1e-12
MOST_APART = 6
"""The largest dilation of the rectangles."""


@st.composite
def rectangles(draw: st.DrawFn, channels: int, largest: int = 12) -> list[Rect]:
    rects = []
    for _ in range(draw(st.integers(1, 3))):
        kh, kw = draw(st.integers(1, largest)), draw(st.integers(1, largest))
        anchor = draw(st.integers(0, kh - 1)), draw(st.integers(0, kw - 1))
        dilation = draw(st.integers(1, MOST_APART))
        rects.append(Rect(torch.randn(channels, 1, kh, kw, dtype=torch.float64), anchor, dilation))
    return rects


@st.composite
def problems(draw: st.DrawFn, largest: int = 12) -> tuple[Tensor, list[Rect]]:
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    x = torch.randn(batch, channels, height, width, dtype=torch.float64)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, draw(rectangles(channels, largest))


def apply(x: Tensor, rects: list[Rect], backend: str | None = None) -> Tensor:
    kernels, anchors, dilations = zip(*((rect.kernel, rect.anchor, rect.dilation) for rect in rects))
    return ops.depthwise_sum(x, kernels, anchors, backend=backend, dilations=dilations)


@given(problems())
@SETTINGS
def test_portable_is_the_definition(problem) -> None:
    x, rects = problem
    assert_close(apply(x, rects, "portable"), apply(x, rects, "reference"), TOLERANCE)
    for rect in rects:
        g = torch.randn_like(x)
        got, want = (
            ops.depthwise_weight_grad(x, g, rect.size, rect.anchor, backend=b, dilation=rect.dilation)
            for b in ("portable", "reference")
        )
        assert_close(got, want, TOLERANCE)


@given(problems())
@SETTINGS
def test_a_dilated_kernel_is_a_kernel_with_zeros_in_its_gaps(problem) -> None:
    """In its gradient, the taps have those of the kernel with zeros, and the gaps have none."""
    x, rects = problem
    g = torch.randn_like(x)
    for rect in rects:
        dense = rect.dense()
        assert (dense.reach, dense.dilation) == (rect.reach, 1)
        assert_close(apply(x, [rect]), apply(x, [dense]), TOLERANCE)
        w = ops.depthwise_weight_grad(x, g, rect.size, rect.anchor, dilation=rect.dilation)
        wide = ops.depthwise_weight_grad(x, g, dense.size, dense.anchor)
        assert_close(w, wide[:, :, :: rect.dilation, :: rect.dilation], TOLERANCE)


@given(problems())
@SETTINGS
def test_branches_are_sums_of_one_rectangle(problem) -> None:
    x, rects = problem
    leaf = x.clone().requires_grad_()
    kernels, anchors, dilations = zip(*((rect.kernel, rect.anchor, rect.dilation) for rect in rects))
    ys = ops.depthwise_branches(leaf, kernels, anchors, dilations=dilations)
    for y, rect in zip(ys, rects, strict=True):
        assert_close(y, apply(x, [rect]), TOLERANCE)
    (together,) = torch.autograd.grad(sum(ys), leaf, x, retain_graph=True)
    (at_once,) = torch.autograd.grad(apply(leaf, rects), leaf, x)
    assert_close(together, at_once, TOLERANCE)


@given(problems(), st.floats(-3, 3))
@SETTINGS
def test_linear_in_the_image(problem, factor: float) -> None:
    x, rects = problem
    other = torch.randn_like(x)
    assert_close(apply(x + factor * other, rects), apply(x, rects) + factor * apply(other, rects), TOLERANCE)


@given(problems(), st.floats(-3, 3))
@SETTINGS
def test_linear_in_the_kernels(problem, factor: float) -> None:
    x, rects = problem
    others = [rect.with_kernel(torch.randn_like(rect.kernel)) for rect in rects]
    mixed = [a.with_kernel(a.kernel + factor * b.kernel) for a, b in zip(rects, others)]
    assert_close(apply(x, mixed), apply(x, rects) + factor * apply(x, others), TOLERANCE)


@given(problems())
@SETTINGS
def test_the_input_gradient_is_the_adjoint(problem) -> None:
    """<A x, g> = <x, Aᵀ g>, where Aᵀ comes from automatic differentiation."""
    x, rects = problem
    g = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (adjoint,) = torch.autograd.grad(apply(leaf, rects), leaf, g)
    left, right = (apply(x, rects) * g).sum(), (x * adjoint).sum()
    size = apply(x, rects).norm() * g.norm()
    assert (left - right).abs() <= TOLERANCE * size


@given(problems())
@SETTINGS
def test_the_adjoint_of_the_adjoint_is_the_operator(problem) -> None:
    x, rects = problem
    mirrored = [
        Rect(r.kernel.flip(-1, -2), (r.size[0] - 1 - r.anchor[0], r.size[1] - 1 - r.anchor[1]), r.dilation) for r in rects
    ]
    leaf = x.clone().requires_grad_()
    (twice,) = torch.autograd.grad(apply(leaf, mirrored), leaf, x)
    assert_close(twice, apply(x, rects), TOLERANCE)


@given(problems())
@SETTINGS
def test_the_weight_gradient_is_the_adjoint(problem) -> None:
    """<A_k x, g> = <k, W(x, g)> for every rectangle."""
    x, rects = problem
    g = torch.randn_like(x)
    for rect in rects:
        y = apply(x, [rect])
        w = ops.depthwise_weight_grad(x, g, rect.size, rect.anchor, dilation=rect.dilation)
        assert ((y * g).sum() - (rect.kernel * w).sum()).abs() <= TOLERANCE * y.norm() * g.norm()


@given(problems(largest=2), st.integers(0, 3), st.integers(0, 3))
@SETTINGS
def test_moves_with_the_image_in_the_interior(problem, down: int, right: int) -> None:
    """Two crops of one picture give the same output where every tap lies in both."""
    _, rects = problem
    channels = rects[0].kernel.shape[0]
    picture = torch.randn(1, channels, 23, 24, dtype=torch.float64)
    first, second = picture[..., :20, :20], picture[..., down : down + 20, right : right + 20]
    up, low, left, far = (max(reach) for reach in zip(*(rect.reach for rect in rects)))
    rows, columns = slice(up + down, 20 - low), slice(left + right, 20 - far)
    want = apply(first, rects)[..., rows, columns]
    got = apply(second, rects)[..., up : 20 - low - down, left : 20 - far - right]
    assert want.numel()
    assert_close(got, want, TOLERANCE)


@given(problems())
@SETTINGS
def test_the_order_of_rectangles_does_not_matter(problem) -> None:
    x, rects = problem
    assert_close(apply(x, rects[::-1]), apply(x, rects), TOLERANCE)


@given(problems())
@SETTINGS
def test_merged_rectangles_are_the_same_operator(problem) -> None:
    x, rects = problem
    one_by_one = sum(apply(x, [rect]) for rect in rects)
    merged = maximal_rectangles(rects)
    assert len(merged) <= len(rects)
    assert_close(apply(x, rects), one_by_one, TOLERANCE)
    assert_close(apply(x, merged), one_by_one, TOLERANCE)


@given(problems())
@SETTINGS
def test_channels_do_not_mix(problem) -> None:
    x, rects = problem
    for c in range(x.shape[1]):
        alone = apply(x[:, c : c + 1], [rect.with_kernel(rect.kernel[c : c + 1]) for rect in rects])
        assert_close(apply(x, rects)[:, c : c + 1], alone, TOLERANCE)


@given(problems())
@SETTINGS
def test_padding_a_kernel_with_zeros_changes_nothing(problem) -> None:
    x, rects = problem
    padded = [
        Rect(F.pad(rect.kernel, (2, 1, 3, 0)), (rect.anchor[0] + 3, rect.anchor[1] + 2), rect.dilation) for rect in rects
    ]
    assert_close(apply(x, padded), apply(x, rects), TOLERANCE)
