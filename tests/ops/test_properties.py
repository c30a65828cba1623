"""Laws that hold for all shapes, kernels and anchors, tested on random ones."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import assert_close
from widekernel import ops
from widekernel.layers import Rect, maximal_rectangles

SETTINGS = settings(max_examples=40, deadline=None)
TOLERANCE = 1e-12


@st.composite
def rectangles(draw: st.DrawFn, channels: int, largest: int = 12) -> list[Rect]:
    rects = []
    for _ in range(draw(st.integers(1, 3))):
        kh, kw = draw(st.integers(1, largest)), draw(st.integers(1, largest))
        anchor = draw(st.integers(0, kh - 1)), draw(st.integers(0, kw - 1))
        rects.append(Rect(torch.randn(channels, 1, kh, kw, dtype=torch.float64), anchor))
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
    return ops.depthwise_sum(x, [rect.kernel for rect in rects], [rect.anchor for rect in rects], backend=backend)


@given(problems())
@SETTINGS
def test_portable_is_the_definition(problem) -> None:
    x, rects = problem
    assert_close(apply(x, rects, "portable"), apply(x, rects, "reference"), TOLERANCE)
    for rect in rects:
        g = torch.randn_like(x)
        got, want = (ops.depthwise_weight_grad(x, g, rect.size, rect.anchor, backend=b) for b in ("portable", "reference"))
        assert_close(got, want, TOLERANCE)


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
    others = [Rect(torch.randn_like(rect.kernel), rect.anchor) for rect in rects]
    mixed = [Rect(a.kernel + factor * b.kernel, a.anchor) for a, b in zip(rects, others)]
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
    mirrored = [Rect(r.kernel.flip(-1, -2), (r.size[0] - 1 - r.anchor[0], r.size[1] - 1 - r.anchor[1])) for r in rects]
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
        w = ops.depthwise_weight_grad(x, g, rect.size, rect.anchor)
        assert ((y * g).sum() - (rect.kernel * w).sum()).abs() <= TOLERANCE * y.norm() * g.norm()


@given(problems(largest=4), st.integers(0, 3), st.integers(0, 3))
@SETTINGS
def test_moves_with_the_image_in_the_interior(problem, down: int, right: int) -> None:
    """Two crops of one picture give the same output where every tap lies in both."""
    _, rects = problem
    channels = rects[0].kernel.shape[0]
    picture = torch.randn(1, channels, 15, 16, dtype=torch.float64)
    first, second = picture[..., :12, :12], picture[..., down : down + 12, right : right + 12]
    up, low, left, far = (max(reach) for reach in zip(*(rect.reach for rect in rects)))
    rows, columns = slice(up + down, 12 - low), slice(left + right, 12 - far)
    want = apply(first, rects)[..., rows, columns]
    got = apply(second, rects)[..., up : 12 - low - down, left : 12 - far - right]
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
        alone = apply(x[:, c : c + 1], [Rect(rect.kernel[c : c + 1], rect.anchor) for rect in rects])
        assert_close(apply(x, rects)[:, c : c + 1], alone, TOLERANCE)


@given(problems())
@SETTINGS
def test_padding_a_kernel_with_zeros_changes_nothing(problem) -> None:
    x, rects = problem
    padded = [
        Rect(torch.nn.functional.pad(rect.kernel, (2, 1, 3, 0)), (rect.anchor[0] + 3, rect.anchor[1] + 2)) for rect in rects
    ]
    assert_close(apply(x, padded), apply(x, rects), TOLERANCE)
