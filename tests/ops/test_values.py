"""Outputs and all gradients, over odd shapes, types and storage layouts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import CASES, DILATED, EMPTY, LAYOUTS, Case, assert_close, definition
from widekernel import ops
from widekernel.ops.cpu import library
from widekernel.ops.gpu.interpreter import is_interpreted

SYMMETRIC = [case for case in CASES if all(kh % 2 and kw % 2 and a is None for kh, kw, a in case.rects)]
REDUCED = [torch.float32, torch.float16, torch.bfloat16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def split(tensors: list[Tensor], kernels: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor | None]:
    x, rest = tensors[0], tensors[1:]
    return x, rest[: len(kernels)], rest[-1] if len(rest) > len(kernels) else None


def output_and_gradients(
    x: Tensor,
    kernels: list[Tensor],
    anchors: list[tuple[int, int]],
    bias: Tensor | None,
    grad: Tensor,
    backend: str,
    dilations: tuple[int, ...] | None = None,
) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in (x, *kernels, bias) if t is not None]
    leaf, taps, shift = split(inputs, kernels)
    with ops.trace() as trace:
        y = ops.depthwise_sum(leaf, taps, anchors, shift, backend=backend, dilations=dilations)
        gradients = torch.autograd.grad(y, inputs, grad)
    assert trace.backends() == [backend] * (2 + len(kernels))
    steps = dilations or (1,) * len(kernels)
    assert [problem.dilations for _, problem in trace.calls] == [steps, steps, *((step,) for step in steps)]
    return [y.detach(), *gradients]


def exact(
    x: Tensor,
    kernels: list[Tensor],
    anchors: list[tuple[int, int]],
    bias: Tensor | None,
    grad: Tensor,
    dilations: tuple[int, ...] | None = None,
) -> list[Tensor]:
    inputs = [t.detach().double().requires_grad_() for t in (x, *kernels, bias) if t is not None]
    leaf, taps, shift = split(inputs, kernels)
    y = definition(leaf, taps, anchors, shift, dilations)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.double())]


def check(case: Case, dtype: torch.dtype, layout: str, backend: str, bias: bool = True) -> None:
    x, kernels, shift = case.tensors(dtype, bias)
    x = LAYOUTS[layout](x)
    grad = torch.randn(case.shape, dtype=torch.float64).to(dtype)
    got = output_and_gradients(x, kernels, case.anchors, shift, grad, backend, case.dilations)
    for mine, truth in zip(got, exact(x, kernels, case.anchors, shift, grad, case.dilations), strict=True):
        assert mine.dtype == dtype
        assert_close(mine, truth)


@pytest.mark.parametrize("case", SYMMETRIC, ids=str)
def test_the_reference_is_conv2d(case: Case) -> None:
    x, kernels, bias = case.tensors()
    y = ops.depthwise_sum(x, kernels, bias=bias, backend="reference")
    parts = [F.conv2d(x, k, padding=(k.shape[2] // 2, k.shape[3] // 2), groups=x.shape[1]) for k in kernels]
    assert_close(y, sum(parts) + bias.view(-1, 1, 1))
    for step in (2, 5):
        y = ops.depthwise_sum(x, kernels, bias=bias, backend="reference", dilations=[step] * len(kernels))
        sides = [(k.shape[2] // 2 * step, k.shape[3] // 2 * step) for k in kernels]
        parts = [F.conv2d(x, k, padding=side, dilation=step, groups=x.shape[1]) for k, side in zip(kernels, sides)]
        assert_close(y, sum(parts) + bias.view(-1, 1, 1))


def test_the_definition_agrees_with_a_sum_by_hand() -> None:
    """One row of pixels and four taps, anchored at the second: every term is written out."""
    x = torch.tensor([[[[1.0, 10.0, 100.0]]]], dtype=torch.float64)
    kernel = torch.tensor([[[[2.0, 3.0, 5.0, 7.0]]]], dtype=torch.float64)
    by_hand = [3 * 1 + 5 * 10 + 7 * 100, 2 * 1 + 3 * 10 + 5 * 100, 2 * 10 + 3 * 100]
    for backend in ops.backends():
        # Our own kernels compute float32, in which these numbers are exact too.
        dtype = torch.float32 if backend in ("native", "triton") else torch.float64
        if (backend == "native" and library.load().reason) or (backend == "triton" and not is_interpreted()):
            continue
        y = ops.depthwise_sum(x.to(dtype), [kernel.to(dtype)], [(0, 1)], torch.tensor([0.5], dtype=dtype), backend=backend)
        assert y.flatten().tolist() == [term + 0.5 for term in by_hand]
    assert definition(x, [kernel], [(0, 1)]).flatten().tolist() == by_hand


@pytest.mark.parametrize("case", CASES + DILATED, ids=str)
def test_the_reference_and_its_gradients(case: Case) -> None:
    check(case, torch.float64, "contiguous", "reference")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES + DILATED, ids=str)
def test_portable_in_float64(case: Case, layout: str) -> None:
    check(case, torch.float64, layout, "portable")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", REDUCED, ids=name_of)
@pytest.mark.parametrize("case", CASES + DILATED, ids=str)
def test_portable_in_lower_precision(case: Case, dtype: torch.dtype, layout: str) -> None:
    check(case, dtype, layout, "portable")


@pytest.mark.parametrize("case", CASES + DILATED, ids=str)
def test_without_a_bias(case: Case) -> None:
    check(case, torch.float64, "channels_last", "portable", bias=False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", REDUCED, ids=name_of)
@pytest.mark.parametrize("shape", [(2, 3, 28, 30), (2, 3, 14, 7)], ids=["28x30", "14x7"])
@pytest.mark.parametrize("rects", [((31, 31, None), (5, 5, None)), ((51, 5, None), (5, 51, (2, 24)))], ids=["31", "51x5"])
def test_published_kernels(shape: tuple, rects: tuple, dtype: torch.dtype, layout: str) -> None:
    check(Case("published", shape, rects), dtype, layout, "portable")


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_nothing_to_compute(case: Case, layout: str, backend: str) -> None:
    x, kernels, bias = case.tensors()
    x = LAYOUTS[layout](x)
    steps = (3,) * len(kernels) if layout == "channels_last" else None
    y, for_x, *others = output_and_gradients(x, kernels, case.anchors, bias, torch.ones_like(x), backend, steps)
    assert y.shape == for_x.shape == x.shape
    for gradient, tensor in zip(others, [*kernels, bias]):
        assert gradient.shape == tensor.shape
        assert gradient.count_nonzero() == 0


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every tensor that is created without values with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES + DILATED, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_nothing_uninitialized_is_read(case: Case, layout: str, backend: str) -> None:
    check(case, torch.float64, layout, backend)


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("case", CASES + EMPTY, ids=str)
def test_the_input_is_left_alone(case: Case, layout: str, backend: str) -> None:
    x, kernels, bias = case.tensors()
    x = LAYOUTS[layout](x)
    before = [t.clone() for t in (x, *kernels, bias)]
    y = ops.depthwise_sum(x, kernels, case.anchors, bias, backend=backend)
    y.add_(1)  # the result is memory of its own
    ops.depthwise_weight_grad(x, x, kernels[0].shape[2:], case.anchors[0], backend=backend).add_(1)
    assert all(torch.equal(now, then) for now, then in zip((x, *kernels, bias), before))


@pytest.mark.parametrize("dtype", REDUCED, ids=name_of)
def test_the_reference_in_lower_precision(dtype: torch.dtype) -> None:
    """Each of its terms is rounded, so it is held to the tolerance only where there are few."""
    check(CASES[0], dtype, "contiguous", "reference")


def test_the_same_call_gives_the_same_bits() -> None:
    case = next(case for case in CASES if case.name == "crossed-strips")
    x, kernels, bias = case.tensors(torch.float32)
    runs = [output_and_gradients(x, kernels, case.anchors, bias, x, "portable") for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_the_gradient_of_a_sum_of_outputs(backend: str) -> None:
    """`y.sum().backward()` hands over a gradient that is one number expanded."""
    case = CASES[-1]
    x, kernels, bias = case.tensors()
    x.requires_grad_()
    ops.depthwise_sum(x, kernels, case.anchors, bias, backend=backend).sum().backward()
    want = exact(x.detach(), kernels, case.anchors, bias, torch.ones_like(x))[1]
    assert_close(x.grad, want)


@pytest.mark.parametrize(
    ("wanted", "calls"),
    [("x", ["depthwise_sum"]), ("kernels", ["depthwise_weight_grad"] * 3), ("bias", [])],
    ids=["x", "kernels", "bias"],
)
def test_only_the_gradients_asked_for_are_computed(wanted: str, calls: list[str]) -> None:
    case = CASES[-1]
    x, kernels, bias = case.tensors()
    for tensor in {"x": [x], "kernels": kernels, "bias": [bias]}[wanted]:
        tensor.requires_grad_()
    y = ops.depthwise_sum(x, kernels, case.anchors, bias)
    with ops.trace() as trace:
        y.sum().backward()
    assert [problem.op for _, problem in trace.calls] == calls
