"""The operators under compilation, export, autocast, fake tensors and PyTorch's own checks of registered operators."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tests.native import NATIVE
from tests.ops.cases import CASES, DILATED, EMPTY, LAYOUTS, Case, assert_close, definition
from widekernel import ops

SUM, WEIGHT_GRAD = torch.ops.widekernel.depthwise_sum.default, torch.ops.widekernel.depthwise_weight_grad.default
CROSS = next(case for case in CASES if case.name == "crossed-strips")
GAPS = next(case for case in DILATED if case.name == "dilated-even-anchored")
BACKENDS = pytest.mark.parametrize(
    "backend",
    [
        NATIVE,
        "portable",
        "reference",
    ],
)
BOTH_LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


# All cases in one layout, and one of them in the other.
CHECKED = [
    pytest.param(name, layout, marks=[pytest.mark.slow] if number and layout == "contiguous" else [])
    for number, name in enumerate(["crossed-strips", "far-anchor-larger-than-image", "one-channel"])
    for layout in ("contiguous", "channels_last")
]


def ambiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(shape, strides).normal_()


# Where some dimension is 1, the same memory has several strides that mean the same.
AMBIGUOUS = {
    "one-channel-nhwc": ambiguous((2, 1, 5, 5), (25, 1, 5, 1)),
    "one-pixel-nhwc": ambiguous((2, 3, 1, 1), (3, 1, 3, 3)),
    "one-column-nhwc": ambiguous((2, 3, 4, 1), (12, 1, 3, 3)),
    "one-image-nhwc": ambiguous((1, 3, 4, 5), (1, 1, 15, 3)),
    "one-image": ambiguous((1, 3, 4, 5), (7, 20, 5, 1)),
    "one-row": ambiguous((2, 3, 1, 5), (15, 5, 9, 1)),
    "single-value": ambiguous((1, 1, 1, 1), (4, 3, 2, 1)),
}


def flat(anchors: list[tuple[int, int]]) -> list[int]:
    return [a for anchor in anchors for a in anchor]


def real_and_fake(
    x: Tensor,
    kernels: list[Tensor],
    anchors: list[tuple[int, int]],
    backend: str,
    dilations: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    mode = FakeTensorMode()
    fake = [mode.from_tensor(t) for t in (x, *kernels)]
    with mode:
        promised = ops.depthwise_sum(fake[0], fake[1:], anchors, backend=backend, dilations=dilations)
    return ops.depthwise_sum(x, kernels, anchors, backend=backend, dilations=dilations), promised


@BACKENDS
@pytest.mark.parametrize("case", CASES + DILATED + EMPTY, ids=str)
def test_strides_are_those_of_the_fake_implementation(case: Case, backend: str) -> None:
    image, kernels, _ = case.tensors(torch.float32)
    for layout, in_layout in LAYOUTS.items():
        x = in_layout(image)
        y, promised = real_and_fake(x, kernels, case.anchors, backend, case.dilations)
        assert (y.shape, y.dtype, y.stride()) == (promised.shape, promised.dtype, promised.stride()), layout
        if layout in ("contiguous", "channels_last"):
            assert y.stride() == x.stride() or 1 in x.shape or 0 in x.shape


@BACKENDS
@pytest.mark.parametrize("kernel", [(3, 3), (2, 11), (11, 2)], ids=["3x3", "2x11", "11x2"])
@pytest.mark.parametrize("stored", AMBIGUOUS)
def test_strides_where_dimensions_are_one(stored: str, kernel: tuple[int, int], backend: str) -> None:
    x = AMBIGUOUS[stored]
    y, promised = real_and_fake(x, [torch.randn(x.shape[1], 1, *kernel)], [(0, kernel[1] - 1)], backend)
    assert y.stride() == promised.stride()


@BACKENDS
@BOTH_LAYOUTS
@pytest.mark.parametrize("case", CASES + DILATED + EMPTY, ids=str)
def test_strides_of_the_weight_gradient(case: Case, layout: str, backend: str) -> None:
    x = LAYOUTS[layout](case.tensors(torch.float32)[0])
    mode, step = FakeTensorMode(), (case.dilations or (1,))[0]
    with mode:
        fake = mode.from_tensor(x)
        promised = ops.depthwise_weight_grad(fake, fake, case.rects[0][:2], case.anchors[0], dilation=step)
    w = ops.depthwise_weight_grad(x, x, case.rects[0][:2], case.anchors[0], backend=backend, dilation=step)
    assert (w.shape, w.stride()) == (promised.shape, promised.stride())


def test_meta_tensors() -> None:
    x = torch.empty(2, 3, 8, 8, device="meta")
    assert ops.depthwise_sum(x, [torch.empty(3, 1, 5, 5, device="meta")]).shape == x.shape
    assert ops.depthwise_weight_grad(x, x, (3, 5)).shape == (3, 1, 3, 5)
    assert ops.depthwise_sum(x, [torch.empty(3, 1, 5, 5, device="meta")], dilations=[3]).shape == x.shape
    assert ops.depthwise_weight_grad(x, x, (3, 5), dilation=3).shape == (3, 1, 3, 5)


@BACKENDS
@pytest.mark.parametrize(("name", "layout"), CHECKED)
def test_opcheck_of_the_sum(name: str, layout: str, backend: str) -> None:
    case = next(case for case in CASES if case.name == name)
    x, kernels, bias = case.tensors(torch.float32)
    arguments = (LAYOUTS[layout](x), kernels, flat(case.anchors))
    torch.library.opcheck(SUM, (*arguments, bias, None, False, backend, ""))
    torch.library.opcheck(SUM, (*arguments, None, bias, True, "", "direct"))


@BACKENDS
@BOTH_LAYOUTS
def test_opcheck_of_dilated_calls(layout: str, backend: str) -> None:
    x, kernels, bias = GAPS.tensors(torch.float32)
    x = LAYOUTS[layout](x)
    torch.library.opcheck(SUM, (x, kernels, flat(GAPS.anchors), bias, None, False, backend, None, list(GAPS.dilations)))
    torch.library.opcheck(WEIGHT_GRAD, (x, x, [3, 4, 0, 2], backend, None, [3]))


@BACKENDS
@BOTH_LAYOUTS
def test_opcheck_of_the_weight_gradient(layout: str, backend: str) -> None:
    x, grad = (LAYOUTS[layout](torch.randn(2, 3, 6, 7)) for _ in range(2))
    torch.library.opcheck(WEIGHT_GRAD, (x, grad, [3, 11, 0, 8], backend, ""))


def function(x: Tensor, kernels: list[Tensor], bias: Tensor) -> Tensor:
    return ops.depthwise_sum(x, kernels, CROSS.anchors, bias).sin()


@BOTH_LAYOUTS
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_forward_and_backward(dynamic: bool, layout: str) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [CROSS.shape, (3, 3, 11, 6)]:
        x, kernels, bias = Case("", shape, CROSS.rects).tensors()
        x = LAYOUTS[layout](x)
        inputs = [t.requires_grad_() for t in (x, *kernels, bias)]
        with torch._dynamo.config.patch(error_on_recompile=dynamic and shape != CROSS.shape), ops.trace() as trace:
            y = compiled(x, kernels, bias)
            got = torch.autograd.grad(y.sum(), inputs)
        assert trace.backends() == ["portable"] * (2 + len(kernels))
        truth = definition(x, kernels, CROSS.anchors, bias).sin()
        assert_close(y, truth)
        assert y.stride() == x.stride()
        for mine, want in zip(got, torch.autograd.grad(truth.sum(), inputs)):
            assert_close(mine, want)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_under_autocast() -> None:
    x, kernels, bias = CROSS.tensors(torch.float32)
    kernels = [k.requires_grad_() for k in kernels]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(x, kernels, bias)

    y = step(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {k.grad.dtype for k in kernels} == {torch.float32}


@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["dynamic", "static"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_dilations(dynamic: bool) -> None:
    """A dilation that is an argument of the compiled function may change from call to call."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(x: Tensor, kernels: list[Tensor], step: int) -> tuple[Tensor, Tensor]:
        branches = ops.depthwise_branches(x, kernels, GAPS.anchors, dilations=[step, 1, 2])
        return ops.depthwise_sum(x, kernels, GAPS.anchors, dilations=[1, step, 1]), branches[0] * branches[2]

    for step in (2, 1, 3):
        x, kernels, _ = GAPS.tensors()
        inputs = [t.requires_grad_() for t in (x, *kernels)]
        y, z = compiled(x, kernels, step)
        ys = [definition(x, [k], [a], None, [d]) for k, a, d in zip(kernels, GAPS.anchors, (step, 1, 2))]
        truth = definition(x, kernels, GAPS.anchors, None, [1, step, 1]), ys[0] * ys[2]
        for got, want in zip((y, z), truth):
            assert_close(got, want)
        got = torch.autograd.grad((y.sin() + z).sum(), inputs)
        for mine, want in zip(got, torch.autograd.grad((truth[0].sin() + truth[1]).sum(), inputs)):
            assert_close(mine, want)


class Cross(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        _, kernels, bias = CROSS.tensors(dtype)
        self.kernels, self.bias = nn.ParameterList(kernels), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise_sum(x, list(self.kernels), CROSS.anchors, self.bias)


@BOTH_LAYOUTS
def test_export_with_a_dynamic_batch(layout: str) -> None:
    module = Cross().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    x = LAYOUTS[layout](torch.randn(2, 3, 9, 8, dtype=torch.float64))
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    calls = [node.target for node in program.graph.nodes if "widekernel" in str(node.target)]
    assert calls == [SUM]
    for size in (1, 2, 5):
        x = LAYOUTS[layout](torch.randn(size, 3, 9, 8, dtype=torch.float64))
        assert_close(program.module()(x), definition(x, list(module.kernels), CROSS.anchors, module.bias))


def test_export_with_a_dynamic_image() -> None:
    module = Cross().eval()
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    program = torch.export.export(
        module, (torch.randn(2, 3, 9, 8, dtype=torch.float64),), dynamic_shapes=({2: height, 3: width},)
    )
    for size in [(4, 20), (30, 3)]:
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert_close(program.module()(x), definition(x, list(module.kernels), CROSS.anchors, module.bias))


def test_calls_without_dilations_are_exported_as_before() -> None:
    """Then earlier versions, whose operators had no such argument, can load the program."""

    class Layer(Cross):
        def forward(self, x: Tensor) -> Tensor:
            return ops.depthwise_sum(x, list(self.kernels), CROSS.anchors, self.bias, dilations=[1, 1, 1])

    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    (call,) = (node for node in torch.export.export(Layer().eval(), (x,)).graph.nodes if node.target is SUM)
    assert len(call.args) == 8
    assert not call.kwargs


def test_export_with_dilations() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
            return ops.depthwise_sum(x, [kernel], [(0, 1)], dilations=[3])

    x, kernel = torch.randn(2, 3, 9, 8, dtype=torch.float64), torch.randn(3, 1, 2, 4, dtype=torch.float64)
    program = torch.export.export(Layer(), (x, kernel))
    (call,) = (node for node in program.graph.nodes if node.target is SUM)
    assert call.args[-1] == [3]
    assert_close(program.module()(x, kernel), definition(x, [kernel], [(0, 1)], None, [3]))


def test_copies_and_pickles() -> None:
    module, x = Cross().eval(), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))


def test_autocast_computes_in_bfloat16_and_differentiates_in_float32() -> None:
    x, kernels, bias = CROSS.tensors(torch.float32)
    inputs = [t.requires_grad_() for t in (x, *kernels, bias)]
    with ops.trace() as trace:
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.depthwise_sum(x, kernels, CROSS.anchors, bias)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {problem.dtype for _, problem in trace.calls} == {torch.bfloat16}
    assert len(trace.calls) == 2 + len(kernels)
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in inputs]
    truth = definition(rounded[0], rounded[1:4], CROSS.anchors, rounded[4])
    assert_close(y, truth)
    for tensor, want in zip(inputs, torch.autograd.grad(truth.sum(), rounded)):
        assert tensor.grad.dtype == torch.float32
        assert_close(tensor.grad.bfloat16(), want)


def test_autocast_mixes_types() -> None:
    """The output of an autocast convolution meets float32 kernels."""
    x, kernels, bias = CROSS.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            ops.depthwise_sum(x.bfloat16(), kernels, CROSS.anchors, bias), ops.depthwise_sum(x, kernels, CROSS.anchors, bias)
        )


def test_autocast_leaves_float64_alone() -> None:
    x, kernels, bias = CROSS.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.depthwise_sum(x, kernels, CROSS.anchors, bias).dtype == torch.float64


def test_autocast_switched_off_inside() -> None:
    x, kernels, bias = CROSS.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert ops.depthwise_sum(x, kernels, CROSS.anchors, bias).dtype == torch.float32


def test_explain_speaks_of_the_autocast_type() -> None:
    x, kernels, _ = CROSS.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert {e.problem.dtype for e in ops.explain(x, kernels, CROSS.anchors)} == {torch.bfloat16}
        assert {e.problem.dtype for e in ops.explain(x.bfloat16(), kernels, CROSS.anchors)} == {torch.bfloat16}
