"""Calls that go straight to the kernel: only if nothing needs the operator, and only with checked arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.native import thread_count
from tests.ops.cases import CASES, assert_close
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.ops import dispatch, eager
from widekernel.ops.backends.torch_conv import TorchConvBackend

SUM = torch.ops.widekernel.depthwise_sum.default
X, K, B = torch.randn(2, 3, 5, 6), torch.randn(3, 1, 3, 3), torch.randn(3)


@pytest.fixture(autouse=True)
def _warm() -> None:
    """Make every call of the tests below once before, with correct arguments."""
    for options in ({}, {"scale": B}, {"bias": B}, {"backend": "portable"}):
        ops.depthwise_sum(X, [K], [(1, 1)], **options)
        ops.depthwise_sum(X, [K], **options)


def found(x: Tensor = X, kernels: Any = (K,), anchors: Any = ((1, 1),), bias: Any = None) -> bool:
    return eager.find_sum(x, kernels, anchors, bias, None, None, None) is not None


def test_the_second_call_is_found() -> None:
    assert found()
    assert found(anchors=[(1, 1)])
    assert found(anchors=None)
    assert found(kernels=[torch.nn.Parameter(K)], bias=B)
    assert not found(X[:1])
    assert not found(X.contiguous(memory_format=torch.channels_last))
    assert not found(anchors=((0, 1),))


WRONG = {
    "float-anchor": ({"anchors": [(1.0, 1)]}, r"anchor \(1\.0, 1\) lies outside .*whole numbers"),
    "long-anchor": ({"anchors": [(1, 1, 1)]}, "lies outside"),
    "missing-anchor": ({"anchors": []}, "1 kernels but 0 anchors"),
    "relu": ({"relu": 1}, "relu is 1: it must be True or False"),
    "kernel-type": ({"kernels": [K.double()]}, r"kernels\[0\] has dtype torch.float64"),
    "kernel-device": ({"kernels": [K.to("meta")]}, r"kernels\[0\] is on meta but x is on cpu"),
    "bare-kernel": ({"kernels": K}, r"write \[kernel\]"),
    "no-kernel": ({"kernels": [], "anchors": []}, "kernels is empty"),
    "bias-type": ({"bias": B.half()}, "bias has dtype torch.float16"),
    "bias-shape": ({"bias": B[:2]}, r"bias has shape \(2,\)"),
    "bias-number": ({"bias": 2.0}, r"bias is 2\.0"),
    "scale-type": ({"scale": B.double()}, "scale has dtype torch.float64"),
    "scale-shape": ({"scale": B[:1]}, r"scale has shape \(1,\)"),
    "algorithm": ({"algorithm": "fast"}, "unknown algorithm 'fast'"),
    "bool-dilation": ({"dilations": [True]}, r"dilations\[0\] is True: .*positive whole number"),
    "float-dilation": ({"dilations": [1.0]}, r"dilations\[0\] is 1\.0: .*positive whole number"),
    "no-dilation": ({"dilations": [0]}, r"dilations\[0\] is 0: .*positive whole number"),
    "missing-dilation": ({"dilations": []}, "1 kernels but 0 dilations: every rectangle needs one"),
    "bare-dilation": ({"dilations": 2}, "dilations is 2: it must be a list with one whole number for each kernel"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused_after_right_ones(wrong: str, grad: bool) -> None:
    change, message = WRONG[wrong]
    arguments = {"x": X.clone().requires_grad_(grad), "kernels": [K], "anchors": [(1, 1)], **change}
    with pytest.raises(ArgumentError, match=message):
        ops.depthwise_sum(**arguments)


WRONG_BRANCHES = [name for name in WRONG if not name.startswith(("relu", "bias", "scale"))]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("wrong", WRONG_BRANCHES)
def test_wrong_arguments_of_branches_are_refused_after_right_ones(wrong: str, grad: bool) -> None:
    change, message = WRONG[wrong]
    if isinstance(kernels := change.get("kernels", [K]), list) and kernels:
        change = {**change, "kernels": [K, *kernels], "anchors": [(1, 1), *change.get("anchors", [(1, 1)])]}
        if isinstance(dilations := change.get("dilations"), list):
            change["dilations"] = [1, *dilations]
        message = message.replace("[0", "[1").replace("1 kernels but 0", "2 kernels but 1")
    arguments = {"x": X.clone().requires_grad_(grad), **change}
    ops.depthwise_branches(arguments["x"], [K, K])
    with pytest.raises(ArgumentError, match=message):
        ops.depthwise_branches(**arguments)


def test_dilated_calls_are_found_and_told_apart() -> None:
    wide = torch.randn(3, 1, 2, 5)
    for _ in range(2):
        for dilations in (None, [1, 1], [1, 2], (2, 1)):
            steps = tuple(dilations or (1, 1))
            with ops.trace() as trace:
                y = ops.depthwise_sum(X, [K, wide], dilations=dilations)
                ys = ops.depthwise_branches(X, [K, wide], dilations=dilations)
            # A backend computes branches together or one by one.
            assert [step for _, problem in trace.calls for step in problem.dilations] == [*steps, *steps]
            assert eager.find_sum(X, [K, wide], None, None, None, None, None, dilations).problem.dilations == steps
            want = [ops.depthwise_sum(X, [k], backend="reference", dilations=[d]) for k, d in zip((K, wide), steps)]
            assert_close(y, sum(want))
            for branch, truth in zip(ys, want, strict=True):
                assert_close(branch, truth)
    assert eager.find_sum(X, [K, wide], None, None, None, None, None, [1, 3]) is None


def test_branches_that_were_called_before() -> None:
    kernels, anchors = [K, torch.randn(3, 1, 1, 5)], [(1, 1), (0, 4)]
    want = [ops.depthwise_sum(X, [k], [a], backend="reference") for k, a in zip(kernels, anchors)]
    for _ in range(2):
        with ops.trace() as trace:
            ys = ops.depthwise_branches(X, kernels, anchors)
        # A backend computes branches together or one by one.
        assert [anchor for _, problem in trace.calls for anchor in problem.anchors] == anchors
        for y, truth in zip(ys, want):
            assert_close(y, truth)


def test_an_unknown_backend_is_refused_after_a_known_one() -> None:
    with pytest.raises(ops.NoBackendError, match="unknown backend 'portabel'"):
        ops.depthwise_sum(X, [K], backend="portabel")


def test_a_call_follows_the_number_of_threads_and_the_backends() -> None:
    class Other(TorchConvBackend):  # type: ignore[misc]
        name = "other"

    ops.register(Other())
    try:
        assert not found()
        with ops.trace() as trace:
            ops.depthwise_sum(X, [K])
        assert trace.backends() == ["other"]
    finally:
        ops.unregister("other")
    with thread_count(torch.get_num_threads() + 1):
        assert not found()


# ---- Whoever looks at operators sees them


class Seeing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class SeeingFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seeing, SeeingFunctions])
def test_modes_see_the_operator(mode: Any) -> None:
    with mode() as seeing:
        y = ops.depthwise_sum(X, [K])
    assert SUM in seeing.seen
    assert_close(y, ops.depthwise_sum(X, [K]))


def test_modes_see_the_operators_of_a_step() -> None:
    x, k = X.clone().requires_grad_(), K.clone().requires_grad_()
    with Seeing() as seeing:
        ops.depthwise_sum(x, [k]).sum().backward()
    assert seeing.seen.count(SUM) == 2
    assert seeing.seen.count(torch.ops.widekernel.depthwise_weight_grad.default) == 1


def test_profilers_see_the_operator() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ops.depthwise_sum(X, [K])
    assert "widekernel::depthwise_sum" in {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_recorded_graphs_hold_the_operator(tracing: str, pre_dispatch: bool) -> None:
    def call(x: Tensor, k: Tensor) -> Tensor:
        return ops.depthwise_sum(x, [k])

    with torch.no_grad():
        graph = make_fx(call, tracing_mode=tracing, pre_dispatch=pre_dispatch)(X, K)
    assert SUM in [node.target for node in graph.graph.nodes]
    assert_close(graph(X + 1, K), call(X + 1, K))


def test_subclasses_see_the_operator() -> None:
    class Sub(Tensor):
        seen: list[Any] = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    for arguments in ((X.as_subclass(Sub), [K]), (X, [K.as_subclass(Sub)]), (X, [K], None, B.as_subclass(Sub))):
        Sub.seen.clear()
        y = ops.depthwise_sum(*arguments)
        assert SUM in Sub.seen
        assert type(y) is Sub


def test_the_operator_runs_in_inference_mode_and_without_gradients_alike() -> None:
    want = ops.depthwise_sum(X, [K], backend="reference")
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(), ops.trace() as trace:
            y = ops.depthwise_sum(X, [K])
        assert_close(y, want)
        assert len(trace.calls) == 1
        assert y.is_inference() == (mode is torch.inference_mode)
        assert not y.requires_grad


def test_the_meta_device_has_no_numbers() -> None:
    meta = [t.to("meta") for t in (X, K)]
    for _ in range(2):
        assert ops.depthwise_sum(meta[0], meta[1:]).is_meta
        x, k = (t.clone().requires_grad_() for t in meta)
        assert torch.autograd.grad(ops.depthwise_sum(x, [k]).sum(), k)[0].is_meta


def test_negated_views_are_read_correctly() -> None:
    x = torch._neg_view(X)
    assert_close(ops.depthwise_sum(x, [K]), ops.depthwise_sum(-X, [K]))
    assert_close(ops.depthwise_sum(X, [torch._neg_view(K)]), ops.depthwise_sum(X, [-K]))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_zeros_without_memory(grad: bool) -> None:
    x, k, b = (torch._efficientzerotensor(t.shape) for t in (X, K, B))
    leaf = X.clone().requires_grad_(grad)
    zeros = torch.zeros(X.shape)
    assert torch.equal(ops.depthwise_sum(x, [K.clone().requires_grad_(grad)]), zeros)
    for y in (ops.depthwise_sum(leaf, [k]), *ops.depthwise_branches(leaf, [k, k])):
        assert torch.equal(y, zeros)
    assert_close(ops.depthwise_sum(leaf, [K], bias=b), ops.depthwise_sum(X, [K]))
    assert torch.equal(ops.depthwise_sum(leaf, [K], scale=b), zeros)
    assert torch.equal(ops.depthwise_weight_grad(leaf, x, (3, 3)), torch.zeros(K.shape))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_an_empty_string_means_none_as_in_programs_of_0_4_0(case) -> None:
    x, kernels, bias = case.tensors(torch.float32)
    flat = [number for anchor in case.anchors for number in anchor]
    assert_close(SUM(x, kernels, flat, bias, None, False, "", ""), SUM(x, kernels, flat, bias, None, False, None, None))


def test_arguments_of_the_operator_itself_are_checked() -> None:
    with pytest.raises(ArgumentError, match=r"bias has shape \(2,\)"):
        SUM(X, [K], [1, 1], B[:2], None, False, None, None)


def test_the_number_of_choices_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "registry", dispatch.Registry(dispatch.registry.backends))
    monkeypatch.setattr(dispatch, "MOST_CHOICES", 3)
    for height in range(1, 8):
        ops.depthwise_sum(torch.randn(1, 3, height, 4), [K])
        assert len(dispatch.registry.choices) <= 3


# ---- A step copies no kernels


def kernels_of_a_step(step: Any) -> set[str]:
    x, kernels = X.clone().requires_grad_(), [torch.randn(3, 1, *size, requires_grad=True) for size in [(3, 3), (1, 5)]]
    step(x, kernels).backward()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(x, kernels).backward()
    return {event.key for event in profiler.key_averages()}


def test_kernels_are_not_joined_in_a_step() -> None:
    names = kernels_of_a_step(lambda x, kernels: ops.depthwise_sum(x, kernels).sin().sum())
    assert "widekernel::depthwise_sum" in names
    assert not {"aten::cat", "aten::split_with_sizes"} & names


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("call", [ops.depthwise_sum, lambda x, kernels: sum(ops.depthwise_branches(x, kernels))])
def test_kernels_that_change_before_the_backward_pass_are_an_error(call: Any, frozen: bool) -> None:
    x, kernels = (
        X.clone().requires_grad_(),
        [torch.randn(3, 1, *size, requires_grad=not frozen) for size in [(3, 3), (1, 5)]],
    )
    y = call(x, kernels).sum()
    with torch.no_grad():
        kernels[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_kernels_are_not_joined_in_compiled_code() -> None:
    graphs: list[Any] = []

    def recording(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=recording, bw_compiler=recording)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *ks: ops.depthwise_sum(x, ks).sin().sum(), backend=backend, fullgraph=True)
    x, kernels = X.clone().requires_grad_(), [torch.randn(3, 1, *size, requires_grad=True) for size in [(3, 3), (1, 5)]]
    compiled(x, *kernels).backward()
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(SUM) == 2
    assert torch.ops.aten.cat.default not in targets
    torch._dynamo.reset()
