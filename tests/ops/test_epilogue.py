"""Scale, bias and rectifier of a sum: values and derivatives; our kernels apply them, so nothing is computed afterwards."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.profiler import ProfilerActivity, profile

import widekernel
from tests.layers.helpers import randomized
from tests.native import NATIVE
from tests.ops.cases import CASES, LAYOUTS, assert_close, definition
from widekernel import ops
from widekernel.layers import FoldedLargeKernel

SUM = torch.ops.widekernel.depthwise_sum.default
CROSS = next(case for case in CASES if case.name == "crossed-strips")
EVERY = list(itertools.product([False, True], repeat=3))


def epilogue_id(which: tuple[bool, ...]) -> str:
    return "+".join(name for name, there in zip(("scale", "bias", "relu"), which) if there) or "none"


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    x, kernels, bias = CROSS.tensors(dtype)
    # Negative factors too: a rectifier before the scale would give something else.
    scale = torch.linspace(-2, 2, x.shape[1], dtype=torch.float64).to(dtype) + 0.25
    return x, kernels, bias, scale


def truth(x: Tensor, kernels: list[Tensor], bias: Tensor | None, scale: Tensor | None, relu: bool) -> Tensor:
    y = definition(x.double(), [k.double() for k in kernels], CROSS.anchors)
    y = y if scale is None else y * scale.double().view(-1, 1, 1)
    y = y if bias is None else y + bias.double().view(-1, 1, 1)
    return y.clamp(min=0) if relu else y


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ["reference", "portable", NATIVE, pytest.param("triton", marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("which", EVERY, ids=epilogue_id)
def test_values(which: tuple[bool, bool, bool], backend: str, layout: str) -> None:
    dtype = torch.float32 if backend in ("native", "triton") else torch.float64
    x, kernels, bias, scale = drawn(dtype)
    x = LAYOUTS[layout](x)
    factor, shift = scale if which[0] else None, bias if which[1] else None
    with ops.trace() as trace:
        y = ops.depthwise_sum(x, kernels, CROSS.anchors, shift, scale=factor, relu=which[2], backend=backend)
    assert trace.backends() == [backend]
    assert y.stride() == x.stride()
    assert_close(y, truth(x, kernels, shift, factor, which[2]))


def names_of(backend: str, requires_grad: bool) -> set[str]:
    x, kernels, bias, scale = drawn(torch.float32)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        ops.depthwise_sum(
            x, [k.requires_grad_(requires_grad) for k in kernels], bias=bias, scale=scale, relu=True, backend=backend
        )
    return {event.key for event in profiled.key_averages()}


@pytest.mark.parametrize("backend", [NATIVE])
def test_our_kernels_apply_the_epilogue(backend: str) -> None:
    after = {"aten::relu", "aten::mul", "aten::add", "aten::clamp_min"}
    assert not names_of(backend, False) & after
    assert {"aten::relu", "aten::mul", "aten::add"} <= names_of(backend, True), "with gradients PyTorch does"


def test_after_pytorchs_convolutions_pytorch_applies_the_epilogue() -> None:
    assert {"aten::relu", "aten::mul", "aten::add"} <= names_of("portable", False)


@pytest.mark.parametrize("backend", ["reference", "portable", NATIVE])
def test_nan_stays_nan(backend: str) -> None:
    x, kernels, bias, scale = drawn(torch.float32)
    x[0, 1] = float("nan")
    y = ops.depthwise_sum(x, kernels, CROSS.anchors, bias, scale=scale, relu=True, backend=backend)
    assert y[0, 1].isnan().all() and not y[1:].isnan().any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty_images(shape: tuple[int, ...]) -> None:
    x, numbers = torch.randn(shape), torch.randn(shape[1])
    y = ops.depthwise_sum(x, [torch.randn(shape[1], 1, 3, 3)], bias=numbers, scale=numbers, relu=True)
    assert y.shape == shape


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients(check, relu: bool) -> None:
    x, kernels, bias, scale = (torch.randn(*s, dtype=torch.float64) for s in [(2, 2, 3, 3), (2, 1, 2, 4), (2,), (2,)])
    inputs = [t.requires_grad_() for t in (x, kernels, bias, scale)]
    assert check(lambda x, k, b, s: ops.depthwise_sum(x, [k], bias=b, scale=s, relu=relu), inputs, fast_mode=True)


@pytest.mark.parametrize("trained", ["x", "kernels", "bias", "scale"])
def test_each_argument_alone_may_have_a_gradient(trained: str) -> None:
    tensors = dict(zip(("x", "kernels", "bias", "scale"), drawn()))
    wanted = tensors[trained] if isinstance(tensors[trained], list) else [tensors[trained]]
    for tensor in wanted:
        tensor.requires_grad_()
    x, kernels, bias, scale = tensors.values()
    y = ops.depthwise_sum(x, kernels, CROSS.anchors, bias, scale=scale, relu=True)
    got = torch.autograd.grad(y.square().sum(), wanted)
    want = torch.autograd.grad(truth(x, kernels, bias, scale, True).square().sum(), wanted)
    for mine, theirs in zip(got, want):
        assert_close(mine, theirs)


def test_per_sample_gradients() -> None:
    x, kernels, bias, scale = drawn()
    scales = torch.stack([scale, -scale, scale * 3])

    def loss(function, x: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return function(x, kernels, bias, scale).square().sum()

    def ours(x: Tensor, kernels: list[Tensor], bias: Tensor, scale: Tensor) -> Tensor:
        return ops.depthwise_sum(x, kernels, CROSS.anchors, bias, scale=scale, relu=True)

    got = vmap(grad(lambda *args: loss(ours, *args), (0, 1, 2)), (None, None, 0))(x, bias, scales)
    for i, one in enumerate(scales):
        want = grad(lambda *args: loss(lambda *a: truth(*a, True), *args), (0, 1, 2))(x, bias, one)
        for mine, theirs in zip(got, want):
            assert_close(mine[i], theirs)


MAPPED = [which for which in itertools.product([False, True], repeat=4) if any(which)]


@pytest.mark.parametrize("which", MAPPED, ids=str)
def test_vmap_of_the_operator(which: tuple[bool, ...]) -> None:
    """The operator is called as a compiled or exported network calls it."""
    x, kernels, bias, scale = drawn()
    args = [x, kernels[0], bias, scale]
    many = [torch.stack([t, 2 * t, -t], -1) if mapped else t for t, mapped in zip(args, which)]
    numbers = list(CROSS.anchors[0])

    def one(x: Tensor, kernel: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return SUM(x, [kernel], numbers, bias, scale, True, "", "")

    got = vmap(one, tuple(-1 if mapped else None for mapped in which))(*many)
    for i, factor in enumerate((1, 2, -1)):
        assert_close(got[i], one(*[factor * t if mapped else t for t, mapped in zip(args, which)]))


def test_under_autocast() -> None:
    x, kernels, bias, scale = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.depthwise_sum(x, kernels, CROSS.anchors, bias, scale=scale, relu=True)
    assert y.dtype == torch.bfloat16
    rounded = [t.bfloat16() for t in (x, *kernels, bias, scale)]
    assert_close(y, truth(rounded[0], rounded[1:-2], *rounded[-2:], True))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled(requires_grad: bool) -> None:
    def function(x: Tensor, kernels: list[Tensor], bias: Tensor, scale: Tensor) -> Tensor:
        return ops.depthwise_sum(x, kernels, CROSS.anchors, bias, scale=scale, relu=True)

    args = drawn()
    args[3].requires_grad_(requires_grad)
    torch._dynamo.reset()
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(*args)
    assert_close(y.detach(), truth(*args, True).detach())
    if requires_grad:
        (mine,), (theirs,) = (torch.autograd.grad(out.sum(), [args[3]]) for out in (y, truth(*args, True)))
        assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.randn(2), r"scale has shape \(2,\): an input with 3 channels needs \(3,\)"),
        (torch.randn(3, 1, 1), r"scale has shape \(3, 1, 1\): an input with 3 channels needs \(3,\)"),
        (torch.randn(3).double(), "scale has dtype torch.float64 but x has torch.float32"),
        (torch.randn(3, device="meta"), "scale is on meta but x is on cpu"),
        (2.0, r"scale is 2\.0: it must be a tensor with one number for each channel"),
    ],
)
def test_wrong_scales(scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.depthwise_sum(torch.randn(1, 3, 4, 4), [torch.randn(3, 1, 3, 3)], scale=scale)


@pytest.mark.parametrize("trained", [False, True])
def test_a_wrong_rectifier(trained: bool) -> None:
    kernel = torch.randn(3, 1, 3, 3, requires_grad=trained)
    with pytest.raises(ValueError, match="relu is 'no': it must be True or False"):
        ops.depthwise_sum(torch.randn(1, 3, 4, 4), [kernel], relu="no")  # type: ignore[arg-type]


def block(act: nn.Module) -> nn.Module:
    block = timm.create_model("replknet_nano").double().stages[1].blocks[0]
    block.act = act
    return randomized(block).eval()


def test_a_folded_replknet_rectifies_in_the_operator() -> None:
    whole = block(nn.ReLU())
    folded = widekernel.fold(whole)
    assert isinstance(folded.large_kernel, FoldedLargeKernel)
    x = torch.randn(2, whole.pw2.conv.out_channels, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        nodes = [n for n in torch.export.export(folded, (x,)).graph.nodes if n.op == "call_function"]
    (call,) = [node for node in nodes if node.target is SUM]
    assert call.args[5] is True
    # The other one follows the 1x1 convolution before the large kernel.
    assert [str(node.target) for node in nodes].count("aten.relu.default") == 1
    assert_close(folded(x), whole(x))


class Leaky(nn.ReLU):
    """Activation whose class derives from a rectifier, but which is not one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x / 10)


@pytest.mark.parametrize("act", [nn.GELU(), Leaky(), nn.Identity()], ids=lambda act: type(act).__name__)
def test_another_activation_is_kept(act: nn.Module) -> None:
    whole = block(act)
    x = torch.randn(2, whole.pw2.conv.out_channels, 8, 8, dtype=torch.float64)
    assert_close(widekernel.fold(whole)(x), whole(x))
    assert not torch.allclose(whole(x), block_with_relu(whole)(x))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_an_activation_with_a_hook_is_called(register: str) -> None:
    folded = widekernel.fold(block(nn.ReLU()))
    seen = []
    getattr(folded.act, register)(lambda *args: seen.append(args))
    folded(torch.randn(1, folded.pw2.conv.out_channels, 8, 8, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert len(seen) == 1


def test_a_subclass_of_a_folded_layer_is_called_like_any_module() -> None:
    class Doubled(FoldedLargeKernel):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    folded = widekernel.fold(block(nn.ReLU()))
    x = torch.randn(1, folded.pw2.conv.out_channels, 8, 8, dtype=torch.float64)
    plain = folded(x)
    folded.large_kernel.__class__ = Doubled
    assert not torch.allclose(folded(x), plain)


def block_with_relu(whole: nn.Module) -> nn.Module:
    act, whole.act = whole.act, nn.ReLU()
    twin = widekernel.fold(whole)
    whole.act = act
    return twin
