"""Which backend computes branches, whether at once, and what `explain` says about it; and TF32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.layers.helpers import image
from tests.ops.backends import (
    BRANCHES,
    SUM_OF_BRANCHES,
    Fused,
    Kernels,
    OnlyBackward,
    OnlyForward,
    registered,
    use_portable_and_reference,
)
from widekernel import ops
from widekernel.layers import LargeKernel, Rectangles, SharedStrips, ShuffledStrips, SourceGroup, TruncatedTiles
from widekernel.ops import dispatch, problem
from widekernel.ops.backends.base import Backend
from widekernel.ops.problem import Problem

SUM, WEIGHT_GRAD = "depthwise_sum", "depthwise_weight_grad"
SIZES = [(7, 3), (3, 7), (1, 1)]


@pytest.fixture(autouse=True)
def _two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test the rules of selection on the backends that run everywhere."""
    use_portable_and_reference(monkeypatch)


def tensors() -> tuple[Tensor, list[Tensor]]:
    return torch.randn(2, 3, 8, 9, requires_grad=True), [torch.randn(3, 1, *s, requires_grad=True) for s in SIZES]


def step(backend: str | None = None, **options: Any) -> list[tuple[str, str]]:
    x, kernels = tensors()
    with ops.trace() as trace:
        ys = ops.depthwise_branches(x, kernels, backend=backend, **options)
        sum(y.square().sum() for y in ys).backward()
    return [(name, of.op) for name, of in trace.calls]


def each(name: str, op: str) -> list[tuple[str, str]]:
    return [(name, op)] * 3


def alternating(for_x: str, for_kernels: str) -> list[tuple[str, str]]:
    return [(for_x, SUM), (for_kernels, WEIGHT_GRAD)] * 3


def test_without_a_fused_backend() -> None:
    assert step() == [*each("portable", SUM), *alternating("portable", "portable")]
    assert step("reference") == [*each("reference", SUM), *alternating("reference", "reference")]


def test_a_fused_backend_in_front() -> None:
    with registered(Fused()):
        assert step() == [("fused", BRANCHES), ("fused", SUM_OF_BRANCHES), *each("fused", WEIGHT_GRAD)]
        assert step("portable")[:3] == each("portable", SUM)
    assert step()[:3] == each("portable", SUM)


def test_a_fused_backend_further_down_runs_when_asked_for() -> None:
    with registered(Fused(), before="reference"):
        assert step()[:3] == each("portable", SUM)
        assert step("fused")[0] == ("fused", BRANCHES)


def test_a_backend_that_is_fused_in_one_direction() -> None:
    with registered(OnlyForward()):
        assert step() == [("fused", BRANCHES), *each("fused", SUM), *each("fused", WEIGHT_GRAD)]
    with registered(OnlyBackward()):
        assert step() == [*each("fused", SUM), ("fused", SUM_OF_BRANCHES), *each("fused", WEIGHT_GRAD)]


def test_a_fused_backend_that_does_not_take_the_problem() -> None:
    with registered(Fused(reasons=["the moon is full"], against=[BRANCHES, SUM_OF_BRANCHES])):
        assert step() == [*each("fused", SUM), *alternating("fused", "fused")]
        assert step("fused") == step()
    with registered(Fused(reasons=["the moon is full"], against=[BRANCHES, SUM, WEIGHT_GRAD])):
        expected = [*each("portable", SUM), ("fused", SUM_OF_BRANCHES), *each("portable", WEIGHT_GRAD)]
        assert step() == expected


def test_every_branch_is_chosen_for_by_itself() -> None:
    """A backend that takes some branches only leaves the others to the next one."""

    class NotWide(Fused):
        operators = Backend.operators

        def reasons_against(self, of: Problem) -> list[str]:
            return ["too wide"] if of.kernels[0][1] == 7 else []

    with registered(NotWide("narrow")):
        assert step()[:3] == [("narrow", SUM), ("portable", SUM), ("narrow", SUM)]
        with registered(Fused(), before="portable"):
            assert step()[0] == ("fused", BRANCHES)  # the one in front of it does not take all


def test_operators_of_a_backend_of_kernels() -> None:
    with registered(Kernels()) as backend:
        assert step()[:2] == [("fused", BRANCHES), ("fused", SUM_OF_BRANCHES)]
        assert [received[0] for received in backend.received] == [BRANCHES, SUM_OF_BRANCHES]
        assert ops.explain(*tensors(), branches=True)[0].details == "3 fused"


def test_the_algorithm_is_part_of_the_problems() -> None:
    with registered(Fused()), ops.trace() as trace:
        step(algorithm="direct")
    assert {of.algorithm for _, of in trace.calls} == {"direct"}


def test_results_have_the_layout_of_the_input() -> None:
    class Careless(Fused):
        def branches(self, *arguments: Any) -> list[Tensor]:
            return [y.transpose(2, 3).contiguous().transpose(2, 3) for y in super().branches(*arguments)]

        def sum_of_branches(self, *arguments: Any) -> Tensor:
            return super().sum_of_branches(*arguments).transpose(2, 3).contiguous().transpose(2, 3)

    with registered(Careless()):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, kernels = tensors()
            x = x.detach().contiguous(memory_format=layout).requires_grad_()
            ys = ops.depthwise_branches(x, kernels)
            (for_x,) = torch.autograd.grad(ys, x, [torch.randn_like(y) for y in ys])
            assert all(y.is_contiguous(memory_format=layout) for y in (*ys, for_x))


# ---- What `explain` says


def explained(**options: Any) -> list[ops.Explanation]:
    return ops.explain(*tensors(), branches=True, **options)


def test_explain_agrees_with_what_runs() -> None:
    for backend in (Fused(), OnlyForward(), OnlyBackward()):
        with registered(backend):
            assert [(e.backend, e.problem.op) for e in explained()] == step()
    plain = [(e.backend, e.problem.op) for e in explained()]
    assert plain == [*each("portable", SUM), *each("portable", SUM), *each("portable", WEIGHT_GRAD)]
    assert sorted(plain) == sorted(step())


def test_explain_of_a_fused_backend() -> None:
    with registered(Fused()):
        first = explained()[0]
        assert first.reasons == {name: ["it does not implement depthwise_branches"] for name in ("portable", "reference")}
        assert str(first).startswith("depthwise_branches of (2, 3, 8, 9) torch.float32 contiguous on cpu with 7x3 anchored")
        assert explained(backend="fused")[1].problem.op == SUM_OF_BRANCHES


def test_explain_of_a_call_one_by_one() -> None:
    assert explained()[0].details == "one branch of depthwise_branches"
    assert explained()[3].details == "one branch of depthwise_sum_of_branches"
    with registered(Fused(reasons=["the moon is full"], against=[BRANCHES])):
        details = explained()[0].details
        assert details == "one branch of depthwise_branches; not fused on fused: the moon is full"
        assert explained(backend="portable")[0].details == "one branch of depthwise_branches"
    with registered(Fused(), before="reference"):
        assert explained()[0].details.endswith("not fused on fused: a preferred backend accepts every branch")


def test_explain_of_a_single_branch() -> None:
    x, kernels = tensors()
    assert ops.explain(x, kernels[:1], branches=True) == ops.explain(x, kernels[:1])


# ---- Layers


def layer() -> LargeKernel:
    source = SourceGroup([SharedStrips(3, 13, 5), Rectangles(3, [(5, 5)])])
    return LargeKernel(source, [nn.BatchNorm2d(3) for _ in range(3)], identity=True).double()


def test_the_sources_of_a_group_are_one_call() -> None:
    with registered(Fused()), ops.trace() as trace:
        layer().train()(image(3)).sin().sum().backward()
    assert [of.op for _, of in trace.calls] == [BRANCHES, *[WEIGHT_GRAD] * 3]
    assert len(trace.calls[0][1].kernels) == 3


def test_a_source_without_rectangles_separates_its_neighbors() -> None:
    tiles = ShuffledStrips(3, 7, 3)
    group = SourceGroup([TruncatedTiles(tiles), Rectangles(3, [(3, 3), (5, 1)])]).double()
    with registered(Fused()), ops.trace() as trace:
        assert len(group.responses(image(3))) == 4
    assert [len(of.kernels) for _, of in trace.calls] == [2]


def test_a_fused_layer_computes_what_others_do() -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(5)
        module, x = layer().train(), image(3).requires_grad_()
        return list(torch.autograd.grad(module(x).sin().sum(), [x, *module.parameters()]))

    want = gradients()
    with registered(Fused()):
        got = gradients()
    for mine, truth in zip(got, want):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)


# ---- TF32


@pytest.fixture
def precision() -> Any:
    """Return a function that allows or forbids TF32 in one of PyTorch's ways; settings are restored."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value)
    torch.backends.cuda.matmul.fp32_precision = before


def on(device: str, dtype: torch.dtype) -> Any:
    """Return the properties of a tensor that decide about TF32, on a device that need not exist."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_tf32_is_for_float32_on_cuda_and_off_by_default(precision: Any) -> None:
    cases = [on("cuda", torch.float32), on("cuda", torch.bfloat16), on("cuda", torch.float64), on("cpu", torch.float32)]
    assert [problem.allows_tf32(x) for x in cases] == [False] * 4
    precision("tf32")
    assert [problem.allows_tf32(x) for x in cases] == [True, False, False, False]
    precision("ieee")
    assert not any(problem.allows_tf32(x) for x in cases)


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_tf32_is_allowed_by_the_precision_of_matrix_products(allowed: str) -> None:
    try:
        torch.set_float32_matmul_precision(allowed)
        assert problem.allows_tf32(on("cuda", torch.float32))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not problem.allows_tf32(on("cuda", torch.float32))


def test_tf32_is_part_of_the_problem_and_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernels = tensors()
    assert "TF32" not in str(Problem.of_sum(x, kernels, [(0, 0)] * 3))
    assert problem.allows_tf32(x) is False
    meta = SimpleNamespace(**{name: getattr(x, name) for name in ("shape", "dtype", "is_contiguous")})
    meta.device, meta.is_cuda = torch.device("cuda"), True
    keys = []
    for allowed in (False, True):
        monkeypatch.setattr(problem, "allows_tf32", lambda x, allowed=allowed: allowed)
        monkeypatch.setattr(dispatch, "allows_tf32", problem.allows_tf32)
        keys.append(dispatch.dispatch_key("any", meta))
        for of in (
            Problem.of_sum(meta, kernels, [(0, 0)] * 3),
            Problem.of_branches(meta, kernels, [(0, 0)] * 3),
            Problem.of_sum_of_branches(meta, kernels, [(0, 0)] * 3),
            Problem.of_weight_grad(meta, (3, 3), (0, 0)),
        ):
            assert of.tf32 == allowed
            assert ("torch.float32 (TF32 allowed) contiguous" in str(of)) == allowed
            assert all(alone.tf32 == allowed for alone in of.branches())
    assert keys[0] != keys[1]
