"""Selection of the backend, what `explain` and `trace` say about it, and all error messages of the operators."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from tests.ops.backends import TestBackend, use_only, use_portable_and_reference
from widekernel import ops
from widekernel.errors import ArgumentError, WidekernelError
from widekernel.ops import call_trace, dispatch, reference
from widekernel.ops.backends.reference import ReferenceBackend
from widekernel.ops.cpu import library

SIZES = [(7, 3), (3, 7), (1, 1)]


def fake(*reasons: str, only: str | None = None) -> TestBackend:
    return TestBackend("fake", *reasons, only=only)


@pytest.fixture(autouse=True)
def _two_backends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test the rules of selection on the backends that run everywhere."""
    if "all_backends" not in request.fixturenames:
        use_portable_and_reference(monkeypatch)


@pytest.fixture
def all_backends() -> None:
    """Keep the list of backends unchanged."""


@pytest.fixture
def in_front(monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts a backend in front of the others during a test."""
    return lambda backend: use_only(monkeypatch, backend, *dispatch.registry.backends)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64).to(dtype).requires_grad_()
    return x, [torch.randn(3, 1, *size, dtype=torch.float64).to(dtype).requires_grad_() for size in SIZES]


def step(backend: str | None = None) -> call_trace.Trace:
    x, kernels = tensors()
    with ops.trace() as trace:
        ops.depthwise_sum(x, kernels, backend=backend).sum().backward()
    return trace


@pytest.mark.usefixtures("all_backends")
def test_the_order_of_preference() -> None:
    assert ops.backends() == ("native", "triton", "portable", "reference")


@pytest.mark.usefixtures("all_backends")
def test_native_kernels_run_where_they_exist() -> None:
    runs = "portable" if library.load().reason else "native"
    assert step().backends() == [runs] * 5
    double = ops.explain(*tensors(torch.float64))[0]
    assert double.backend == "portable"
    if runs == "native":
        assert "not torch.float64" in double.reasons["native"][0]


def test_no_choice_outlives_its_backend() -> None:
    """The next backend may get the memory, and therefore the id, of the previous one."""
    for i in range(50):
        ops.register(TestBackend(f"backend-{i}"))
        assert set(step().backends()) == {f"backend-{i}"}
        ops.unregister(f"backend-{i}")
    assert set(step().backends()) == {"portable"}


@pytest.mark.parametrize("call", ["depthwise_sum", "depthwise_weight_grad", "explain"])
def test_an_unknown_algorithm(call: str) -> None:
    x, kernels = tensors()
    arguments = (x, x, (3, 3)) if call == "depthwise_weight_grad" else (x, kernels)
    with pytest.raises(ArgumentError, match=r"unknown algorithm 'fast': ask for 'direct', or for None, the fastest"):
        getattr(ops, call)(*arguments, algorithm="fast")


def test_the_algorithm_is_part_of_every_problem_of_a_step() -> None:
    x, kernels = tensors()
    with ops.trace() as trace:
        ops.depthwise_sum(x, kernels, algorithm="direct").sum().backward()
    assert [problem.algorithm for _, problem in trace.calls] == ["direct"] * 5
    assert "algorithm 'direct'" in str(trace.calls[0][1])


@pytest.mark.parametrize(("asked", "runs"), [(None, "portable"), ("portable", "portable"), ("reference", "reference")])
def test_which_backend_ran_in_every_part_of_a_step(asked: str | None, runs: str) -> None:
    trace = step(asked)
    assert trace.backends() == [runs] * 5
    assert trace.backends("depthwise_sum") == [runs] * 2
    assert trace.backends("depthwise_weight_grad") == [runs] * 3
    forward, for_x, *for_kernels = [problem for _, problem in trace.calls]
    assert forward.op == for_x.op == "depthwise_sum"
    assert forward.kernels == for_x.kernels == tuple(SIZES)
    assert forward.shape == (2, 3, 8, 9)
    assert [problem.kernels for problem in for_kernels] == [(size,) for size in SIZES]


def test_the_input_gradient_has_mirrored_anchors() -> None:
    x, kernels = tensors()
    with ops.trace() as trace:
        ops.depthwise_sum(x, kernels, [(0, 0), (2, 1), (0, 0)]).sum().backward()
    assert trace.calls[0][1].anchors == ((0, 0), (2, 1), (0, 0))
    assert trace.calls[1][1].anchors == ((6, 2), (0, 5), (0, 0))


def test_the_second_derivative_stays_on_the_backend_asked_for() -> None:
    x, kernels = tensors()
    with ops.trace() as trace:
        y = ops.depthwise_sum(x, kernels, backend="reference")
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        g.square().sum().backward()
    assert len(trace.calls) > 5
    assert set(trace.backends()) == {"reference"}


def test_the_layout_is_part_of_the_problem() -> None:
    x, kernels = tensors()
    with ops.trace() as trace:
        ops.depthwise_sum(x, kernels)
        ops.depthwise_sum(x.contiguous(memory_format=torch.channels_last), kernels)
    assert [problem.channels_last for _, problem in trace.calls] == [False, True]
    assert "channels_last" in str(trace.calls[1][1])


def test_nothing_is_recorded_outside_the_block() -> None:
    with ops.trace() as trace:
        pass
    step()
    assert trace.calls == []
    assert call_trace.OPEN_TRACES == []


def test_traces_nest_and_close_on_errors() -> None:
    x, kernels = tensors()
    with ops.trace() as outer:
        ops.depthwise_sum(x, kernels)
        with ops.trace() as inner:
            ops.depthwise_sum(x, kernels)
        with pytest.raises(ValueError, match="x has shape"), ops.trace():
            ops.depthwise_sum(x[0], kernels)
    assert (len(outer.calls), len(inner.calls)) == (2, 1)
    assert call_trace.OPEN_TRACES == []


def test_traces_see_other_threads() -> None:
    x, kernels = tensors()
    with ops.trace() as trace:
        threads = [threading.Thread(target=ops.depthwise_sum, args=(x, kernels)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(trace.calls) == 4


def test_explain_agrees_with_what_runs() -> None:
    x, kernels = tensors()
    with ops.trace() as trace:
        explained = ops.explain(x, kernels)
        assert trace.calls == []
        ops.depthwise_sum(x, kernels).sum().backward()
    assert [(e.backend, e.problem) for e in explained] == trace.calls


def test_explain_gives_the_reasons_against_the_others() -> None:
    explanation = ops.explain(*tensors())[0]
    assert list(explanation.reasons) == ["reference"]
    assert "backend='reference'" in explanation.reasons["reference"][0]
    lines = str(explanation).splitlines()
    assert lines[0].startswith("depthwise_sum of (2, 3, 8, 9) torch.float32 contiguous on cpu with 7x3 anchored at (3, 1)")
    assert lines[1] == "  runs on: portable"
    assert lines[2].startswith("  not on reference: it is the slow definition")


def test_explain_of_a_backend_asked_for() -> None:
    explained = ops.explain(*tensors(), backend="reference")
    assert {e.backend for e in explained} == {"reference"}
    assert explained[0].reasons == {"portable": ["reference was asked for"]}


def test_a_backend_in_front_is_chosen(in_front) -> None:
    in_front(fake())
    assert step().backends() == ["fake"] * 5
    explained = ops.explain(*tensors())
    assert {e.backend for e in explained} == {"fake"}
    assert explained[0].reasons["portable"] == ["fake comes first"]


def test_a_backend_with_reasons_against_itself_is_skipped(in_front) -> None:
    in_front(fake("the moon is full", "it is Tuesday"))
    assert step().backends() == ["portable"] * 5
    explanation = ops.explain(*tensors())[0]
    assert explanation.reasons["fake"] == ["the moon is full", "it is Tuesday"]
    assert "  not on fake: the moon is full; it is Tuesday" in str(explanation)


@pytest.mark.parametrize("only", ["depthwise_sum", "depthwise_weight_grad"])
def test_a_backend_may_take_one_operator_only(in_front, only: str) -> None:
    in_front(fake(only=only))
    expected = ["fake" if op == only else "portable" for op in ["depthwise_sum"] * 2 + ["depthwise_weight_grad"] * 3]
    assert step().backends() == expected
    assert [e.backend for e in ops.explain(*tensors())] == expected


def test_results_of_a_careless_backend_have_the_layout_of_the_input(in_front) -> None:
    """The contract of the operator does not depend on how careful a backend is."""
    careless = fake()
    careless.compute["depthwise_sum"] = lambda *args: reference.depthwise_sum(*args).mT.contiguous().mT
    in_front(careless)
    x, kernels = tensors()
    assert ops.depthwise_sum(x, kernels).is_contiguous()
    y = ops.depthwise_sum(x.contiguous(memory_format=torch.channels_last), kernels)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_backend_without_dilations_is_not_asked_about_them(in_front) -> None:
    class Plain(TestBackend):
        computes_dilated = False

        def reasons_against(self, problem: ops.Problem) -> list[str]:
            assert not problem.dilated
            return []

    in_front(Plain("plain"))
    x, kernels = tensors()
    steps = [1] * (len(kernels) - 1) + [2]
    with ops.trace() as trace:
        ops.depthwise_sum(x, kernels, dilations=steps).sum().backward()
    weight_grads = ["portable" if step > 1 else "plain" for step in steps]
    assert trace.backends() == ["portable"] * 2 + weight_grads
    explanations = ops.explain(x, kernels, dilations=steps)
    assert [e.backend for e in explanations] == trace.backends()
    (reason,) = explanations[0].reasons["plain"]
    assert reason == f"it computes kernels without gaps between the taps, not with dilations {tuple(steps)}"
    assert "with dilation 2" in str(explanations[0])
    with pytest.raises(ops.NoBackendError, match=r"plain cannot compute .*with dilation 2.*without gaps"):
        ops.depthwise_sum(x, kernels, dilations=steps, backend="plain")
    with ops.trace() as trace:
        ops.depthwise_branches(x, kernels, dilations=steps)
    assert trace.backends() == weight_grads


def test_a_backend_that_cannot_run_says_why_when_asked_for(in_front) -> None:
    in_front(fake("the moon is full"))
    with pytest.raises(ops.NoBackendError, match=r"fake cannot compute depthwise_sum of .*: the moon is full"):
        ops.depthwise_sum(*tensors(), backend="fake")


def test_all_reasons_are_listed_when_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_only(monkeypatch, fake("the moon is full"), ReferenceBackend())
    with pytest.raises(ops.NoBackendError) as error:
        ops.depthwise_sum(*tensors())
    message = str(error.value)
    assert message.startswith("no backend can compute depthwise_sum of (2, 3, 8, 9)")
    assert "\n  fake: the moon is full" in message
    assert "\n  reference: it is the slow definition" in message


@pytest.mark.parametrize("call", ["depthwise_sum", "depthwise_weight_grad", "explain"])
def test_an_unknown_backend(call: str) -> None:
    x, kernels = tensors()
    arguments = (x, x, (3, 3)) if call == "depthwise_weight_grad" else (x, kernels)
    message = r"unknown backend 'portabel': .*portable, reference\. Did you mean 'portable'\?"
    with pytest.raises(ops.NoBackendError, match=message):
        getattr(ops, call)(*arguments, backend="portabel")
    with pytest.raises(ops.NoBackendError) as error:
        getattr(ops, call)(*arguments, backend="zzz")
    assert "Did you mean" not in str(error.value)
    assert isinstance(error.value, WidekernelError)


X, K = torch.zeros(2, 3, 5, 6), torch.zeros(3, 1, 3, 3)
WRONG_SUMS = {
    "three-dimensions": ((X[0], [K]), r"x has shape \(3, 5, 6\): .*four dimensions \(N, C, H, W\)"),
    "integers": ((X.long(), [K.long()]), r"x has dtype torch.int64: .*floating-point type; convert"),
    "complex": ((X.cfloat(), [K.cfloat()]), r"x has dtype torch.complex64: .*floating-point type"),
    "no-kernel": ((X, []), "kernels is empty"),
    "missing-anchor": ((X, [K, K], [(1, 1)]), "2 kernels but 1 anchors"),
    "three-dimensional-kernel": (
        (X, [K[0]]),
        r"kernels\[0\] has shape \(1, 3, 3\): an input with 3 channels needs \(3, 1, kh, kw\)",
    ),
    "one-dimensional-kernel": ((X, [K[0, 0, 0]]), r"kernels\[0\] has shape \(3,\)"),
    "other-channels": ((X, [K, K[:2]]), r"kernels\[1\] has shape \(2, 1, 3, 3\): an input with 3 channels"),
    "dense-kernel": ((X, [K.expand(3, 3, 3, 3)]), r"kernels\[0\] has shape \(3, 3, 3, 3\)"),
    "no-tap": ((X, [K[..., :0]]), r"kernels\[0\] has shape \(3, 1, 3, 0\): .*at least one tap"),
    "anchor-outside": ((X, [K], [(1, 3)]), r"anchor \(1, 3\) lies outside the 3x3 kernel: .*0 <= column < 3"),
    "negative-anchor": ((X, [K], [(-1, 0)]), r"anchor \(-1, 0\) lies outside"),
    "float-anchor": ((X, [K], [(1.0, 1)]), r"anchor \(1\.0, 1\) lies outside .*whole numbers"),
    "half-an-anchor": ((X, [K], [(0, 0.5)]), r"anchor \(0, 0\.5\) lies outside .*whole numbers"),
    "bare-kernel": ((X, K), r"kernels is a tensor: .*write \[kernel\]"),
    "bare-kernel-with-anchor": ((X, K, [(1, 1)]), r"kernels is a tensor: .*write \[kernel\]"),
    "long-anchor": ((X, [K], [(1, 1, 1)]), r"anchor \(1, 1, 1\) lies outside"),
    "kernel-type": (
        (X, [K.double()]),
        r"kernels\[0\] .*torch.float64.* but x .*torch.float32.*: convert.*autocast",
    ),
    "kernel-device": ((X, [K.to("meta")]), r"kernels\[0\] is on meta but x is on cpu: move one of them$"),
    "bias-shape": ((X, [K], None, torch.zeros(1)), r"bias has shape \(1,\): .*needs \(3,\)"),
    "bias-device": ((X, [K], None, torch.zeros(3, device="meta")), "bias is on meta but x is on cpu: move one of them$"),
    "bias-type": ((X, [K], None, torch.zeros(3).half()), r"bias .*torch.float16.* but x .*torch.float32.*autocast"),
}
WRONG_DILATIONS = {
    "bool": ([1, True], r"dilations\[1\] is True: a distance between taps must be a positive whole number"),
    "zero": ([0, 1], r"dilations\[0\] is 0: .*positive whole number; 1 leaves no gaps"),
    "negative": ([2, -2], r"dilations\[1\] is -2: .*positive whole number"),
    "float": ([2.0, 1], r"dilations\[0\] is 2\.0: .*positive whole number"),
    "text": (["2", 1], r"dilations\[0\] is '2': .*positive whole number"),
    "too-few": ([2], "2 kernels but 1 dilations: every rectangle needs one dilation"),
    "too-many": ((1, 1, 1), "2 kernels but 3 dilations: every rectangle needs one dilation"),
    "bare": (2, "dilations is 2: it must be a list with one whole number for each kernel, or None"),
}
WRONG_WEIGHT_GRADIENTS = {
    "three-dimensions": ((X[0], X[0], (3, 3)), r"x has shape \(3, 5, 6\) and grad \(3, 5, 6\): both must be the same"),
    "other-shape": ((X, X[:1], (3, 3)), r"x has shape \(2, 3, 5, 6\) and grad \(1, 3, 5, 6\)"),
    "integers": (
        (X.long(), X.long(), (3, 3)),
        r"x has dtype torch.int64: depthwise_weight_grad needs a floating-point type",
    ),
    "one-size": ((X, X, (3,)), r"kernel size \(3,\) must be two positive numbers"),
    "no-tap": ((X, X, (3, 0)), r"kernel size \(3, 0\) must be two positive numbers"),
    "float-anchor": ((X, X, (3, 3), (1.5, 0)), r"anchor \(1\.5, 0\) lies outside .*whole numbers"),
    "gradient-device": ((X, X.to("meta"), (3, 3)), "grad is on meta but x is on cpu: move one of them$"),
    "anchor-outside": ((X, X, (3, 3), (3, 0)), r"anchor \(3, 0\) lies outside the 3x3 kernel: .*0 <= row < 3"),
    "gradient-type": ((X, X.double(), (3, 3)), r"grad .*torch.float64.* but x .*torch.float32.*: convert"),
}


@pytest.mark.parametrize("wrong", WRONG_SUMS)
def test_wrong_arguments_of_the_sum(wrong: str) -> None:
    arguments, message = WRONG_SUMS[wrong]
    with pytest.raises(ValueError, match=message):
        ops.depthwise_sum(*arguments)
    if len(arguments) < 4:
        with pytest.raises(ValueError, match=message):
            ops.explain(*arguments)


@pytest.mark.parametrize("wrong", WRONG_DILATIONS)
def test_wrong_dilations(wrong: str) -> None:
    dilations, message = WRONG_DILATIONS[wrong]
    for call in (ops.depthwise_sum, ops.depthwise_branches, ops.explain):
        with pytest.raises(ArgumentError, match=message):
            call(X, [K, K], dilations=dilations)


@pytest.mark.parametrize("dilation", [True, 0, -1, 2.0, "2", None], ids=str)
def test_a_wrong_dilation_of_the_weight_gradient(dilation: object) -> None:
    with pytest.raises(ArgumentError, match=f"dilation is {dilation!r}: .*positive whole number"):
        ops.depthwise_weight_grad(X, X, (3, 3), dilation=dilation)


def test_wrong_dilations_of_a_problem_and_of_an_operator() -> None:
    with pytest.raises(ArgumentError, match="2 kernels but 3 dilations"):
        ops.Problem.of_sum(X, [K, K], [(1, 1)] * 2, None, (1, 2, 3))
    operator = torch.ops.widekernel.depthwise_sum.default
    with pytest.raises(ArgumentError, match="1 kernels but 2 dilations"):
        operator(X, [K], [1, 1], None, None, False, None, None, [2, 3])
    with pytest.raises(ArgumentError, match=r"dilations\[0\] is 0"):
        operator(X, [K], [1, 1], None, None, False, None, None, [0])


@pytest.mark.parametrize("wrong", WRONG_WEIGHT_GRADIENTS)
def test_wrong_arguments_of_the_weight_gradient(wrong: str) -> None:
    arguments, message = WRONG_WEIGHT_GRADIENTS[wrong]
    with pytest.raises(ValueError, match=message):
        ops.depthwise_weight_grad(*arguments)


def test_a_bare_kernel_under_autocast() -> None:
    for call in (ops.depthwise_sum, ops.explain):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"write \[kernel\]"):
            call(X, K)


# ---- Backends from elsewhere


@pytest.fixture
def _own_list(monkeypatch: pytest.MonkeyPatch) -> None:
    use_only(monkeypatch, *dispatch.registry.backends)


@pytest.mark.usefixtures("_own_list")
def test_registered_backends_stand_where_they_were_put() -> None:
    ops.register(TestBackend("first"))
    assert ops.backends() == ("first", "portable", "reference")
    ops.register(TestBackend("second"), before="portable")
    ops.register(TestBackend("last"), before="reference")
    ops.register(TestBackend("zeroth"))
    assert ops.backends() == ("zeroth", "first", "second", "portable", "last", "reference")
    assert step().backends() == ["zeroth"] * 5
    assert step("last").backends() == ["last"] * 5


@pytest.mark.usefixtures("_own_list")
def test_unregistered_backends_are_gone() -> None:
    before = ops.backends()
    for name in ("first", "second"):
        ops.register(TestBackend(name))
    ops.unregister("second")
    assert step().backends() == ["first"] * 5
    ops.unregister("first")
    assert ops.backends() == before
    with pytest.raises(ops.NoBackendError, match="unknown backend 'first'"):
        ops.explain(*tensors(), backend="first")
    ops.register(TestBackend("first"))  # its name is free again
    assert ops.backends()[0] == "first"


@pytest.mark.usefixtures("_own_list")
def test_names_of_backends_are_unique() -> None:
    before = ops.backends()
    for name in before:
        with pytest.raises(ArgumentError, match=f"a backend named '{name}' is already registered"):
            ops.register(TestBackend(name))
    assert ops.backends() == before


@pytest.mark.usefixtures("_own_list")
def test_registering_in_front_of_no_backend() -> None:
    before = ops.backends()
    with pytest.raises(ArgumentError, match="no backend is named 'portabel': the backends are portable, reference"):
        ops.register(TestBackend("first"), before="portabel")
    assert ops.backends() == before
