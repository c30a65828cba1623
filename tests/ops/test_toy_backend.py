"""A backend in 25 lines, as an example, and objects that `ops.register` refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import final

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tests.ops.cases import CASES, assert_close, definition
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.ops import reference


@final
class ToyBackend(ops.Backend):
    """Backend that computes sums of rectangles by padding and convolving, on a CPU."""

    name = "toy"
    operators = frozenset({"depthwise_sum"})

    def reasons_against(self, problem: ops.Problem) -> list[str]:
        return [] if problem.device == "cpu" else [f"it runs on a CPU, not on {problem.device}"]

    def prepare(self, problem: ops.Problem) -> Callable[..., Tensor]:
        paddings = [
            (column, width - 1 - column, row, height - 1 - row)
            for (height, width), (row, column) in zip(problem.kernels, problem.anchors)
        ]

        def compute(x, kernels, anchors, bias, scale, relu):
            parts = [conv2d(pad(x, p), k, groups=x.shape[1]) for p, k in zip(paddings, kernels)]
            return reference.epilogue(sum(parts), scale, bias, relu)

        return compute

    def describe(self, problem: ops.Problem) -> str:
        return f"{len(problem.kernels)} convolutions"


@pytest.fixture
def _toy() -> Iterator[None]:
    ops.register(ToyBackend())
    yield
    ops.unregister("toy")


@pytest.mark.usefixtures("_toy")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_run_on_the_toy_backend(case) -> None:
    x, kernels, bias = case.tensors()
    scale = torch.randn(case.shape[1], dtype=torch.float64)
    with ops.trace() as trace:
        y = ops.depthwise_sum(x, kernels, case.anchors, bias, scale=scale, relu=True)
        z = ops.depthwise_sum(x, kernels, case.anchors, bias)
    assert trace.backends() == ["toy"] * 2
    assert_close(z, definition(x, kernels, case.anchors, bias))
    want = definition(x, kernels, case.anchors) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    assert_close(y, want.relu())


@pytest.mark.usefixtures("_toy")
def test_weight_gradients_run_on_the_next_backend_that_has_them() -> None:
    x, kernel = torch.randn(2, 3, 5, 6, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
    explained = ops.explain(x, [kernel])
    assert [e.backend for e in explained[:2]] == ["toy"] * 2
    assert explained[0].details == "1 convolutions"
    assert explained[2].reasons["toy"] == ["it does not implement depthwise_weight_grad"]
    with ops.trace() as trace:
        ops.depthwise_sum(x, [kernel]).sum().backward()
    assert trace.backends() == [e.backend for e in explained]
    with pytest.raises(ops.NoBackendError, match=r"toy cannot compute .*: it does not implement depthwise_weight_grad"):
        ops.depthwise_weight_grad(x.detach(), x.detach(), (3, 3), backend="toy")


@pytest.mark.parametrize("backend", [ToyBackend, "toy", object(), reference], ids=["class", "name", "object", "module"])
def test_only_instances_of_backend_are_registered(backend: object) -> None:
    before = ops.backends()
    with pytest.raises(ArgumentError, match="is not a backend: pass an instance of"):
        ops.register(backend)  # type: ignore[arg-type]
    assert ops.backends() == before


def test_an_incomplete_backend_cannot_be_made() -> None:
    class Nameless(ops.Backend):
        def reasons_against(self, problem: ops.Problem) -> list[str]:
            return []

    with pytest.raises(TypeError, match="abstract"):
        Nameless()  # type: ignore[abstract]
