"""The operators as PyTorch's own convolutions: as functions, as TorchScript, recorded, and as decompositions."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.ops.cases import CASES, DILATED, EMPTY, LAYOUTS, Case, assert_close, definition
from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.ops import plain

# PyTorch's convolutions take no images, but none without rows, columns or channels.
COMPUTED = [*CASES, *DILATED, next(case for case in EMPTY if case.name == "no-image")]
CROSS = next(case for case in CASES if case.name == "crossed-strips")
TILES = next(case for case in CASES if case.name == "strips-of-tiles")
GAPS = next(case for case in DILATED if case.name == "dilated-even-anchored")


@pytest.fixture(scope="module")
def scripted() -> dict[str, torch.jit.ScriptFunction]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        names = ("depthwise_sum", "depthwise_branches", "depthwise_weight_grad")
        return {name: torch.jit.script(getattr(plain, name)) for name in names}


def recorded(function: nn.Module | object, *inputs: Tensor) -> torch.jit.ScriptFunction:
    """Record a graph; a warning of the tracer would mean that it is wrong for other images."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.trace(function, inputs, check_trace=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", COMPUTED, ids=str)
def test_the_sum(case: Case, layout: str, scripted: dict) -> None:
    x, kernels, bias = case.tensors()
    x, scale = LAYOUTS[layout](x), torch.randn(x.shape[1], dtype=torch.float64)
    affine = scale.view(-1, 1, 1) * definition(x, kernels, case.anchors, None, case.dilations) + bias.view(-1, 1, 1)
    for compute in (plain.depthwise_sum, scripted["depthwise_sum"]):
        steps = case.dilations and list(case.dilations)
        truth = definition(x, kernels, case.anchors, bias, case.dilations)
        assert_close(compute(x, kernels, case.anchors, bias, dilations=steps), truth)
        y = compute(x, kernels, case.anchors, bias, scale, True, steps)
        assert_close(y, affine.relu())
    # TorchScript leaves the result in the layout of the convolutions.
    strides = plain.depthwise_sum(x, kernels, case.anchors, bias).stride()
    assert strides == ops.depthwise_sum(x, kernels, case.anchors, bias).stride() or 1 in x.shape or 0 in x.shape


@pytest.mark.parametrize("case", COMPUTED, ids=str)
def test_the_branches(case: Case, scripted: dict) -> None:
    x, kernels, _ = case.tensors()
    for compute in (plain.depthwise_branches, scripted["depthwise_branches"]):
        ys = compute(x, kernels, case.anchors, case.dilations and list(case.dilations))
        steps = case.dilations or (1,) * len(kernels)
        for y, kernel, anchor, step in zip(ys, kernels, case.anchors, steps, strict=True):
            assert_close(y, definition(x, [kernel], [anchor], None, [step]))


@pytest.mark.parametrize("case", CASES + DILATED, ids=str)
def test_the_weight_gradient(case: Case, scripted: dict) -> None:
    x, kernels, _ = case.tensors()
    grad = torch.randn_like(x)
    for compute in (plain.depthwise_weight_grad, scripted["depthwise_weight_grad"]):
        for kernel, anchor, step in zip(kernels, case.anchors, case.dilations or (1,) * len(kernels)):
            size = (kernel.shape[2], kernel.shape[3])
            want = ops.depthwise_weight_grad(x, grad, size, anchor, dilation=step)
            assert_close(compute(x, grad, size, anchor, step), want)


@pytest.mark.parametrize("case", [CROSS, TILES, GAPS], ids=str)
def test_a_recorded_graph_serves_any_image(case: Case) -> None:
    x, kernels, bias = case.tensors()
    with ops.trace() as trace:
        graph = recorded(
            lambda x, *kernels: ops.depthwise_sum(x, kernels, case.anchors, bias, dilations=case.dilations), x, *kernels
        )
    assert trace.backends() == ["plain"]
    assert trace.calls[0][1].shape == case.shape
    assert trace.calls[0][1].dilations == (case.dilations or (1,) * len(kernels))
    assert "widekernel::" not in str(graph.graph)
    for shape in (case.shape, (1, case.shape[1], 31, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        with ops.trace() as trace:
            assert_close(graph(x, *kernels), definition(x, kernels, case.anchors, bias, case.dilations))
        assert trace.calls == []


def test_default_anchors_while_a_graph_is_recorded() -> None:
    x, kernels, _ = CROSS.tensors()
    graph = recorded(lambda x, *kernels: torch.stack(ops.depthwise_branches(x, kernels)), x, *kernels)
    got = graph(x, *kernels)
    for y, kernel, anchor in zip(got, kernels, CROSS.anchors, strict=True):
        assert_close(y, definition(x, [kernel], [anchor], None))


def test_anchors_that_come_out_of_the_graph() -> None:
    x, kernels, _ = TILES.tensors()

    def function(x: Tensor, *kernels: Tensor) -> Tensor:
        return ops.depthwise_sum(x, kernels, [(k.shape[2] // 3, k.shape[3] // 3) for k in kernels])

    anchors = [(k.shape[2] // 3, k.shape[3] // 3) for k in kernels]
    assert_close(recorded(function, x, *kernels)(x, *kernels), definition(x, kernels, anchors, None))


def test_gradients_of_a_recorded_graph() -> None:
    x, kernels, bias = TILES.tensors()
    inputs = [t.requires_grad_() for t in (x, *kernels, bias)]
    graph = recorded(lambda x, a, b, c, bias: ops.depthwise_sum(x, [a, b, c], TILES.anchors, bias), *inputs)
    truth = definition(x, kernels, TILES.anchors, bias)
    wanted = torch.autograd.grad(truth.square().sum(), inputs)
    for got, want in zip(torch.autograd.grad(graph(*inputs).square().sum(), inputs), wanted, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("dilation", [1, 3])
def test_a_recorded_weight_gradient(dilation: int) -> None:
    x, grad = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.randn(2, 3, 6, 7, dtype=torch.float64)

    def function(x: Tensor, grad: Tensor) -> Tensor:
        return ops.depthwise_weight_grad(x, grad, (3, 11), (0, 8), dilation=dilation)

    graph = recorded(function, x, grad)
    wide = torch.randn(2, 3, 5, 20, dtype=torch.float64)
    for a, b in ((x, grad), (wide, wide.square())):
        assert_close(graph(a, b), function(a, b))
    with pytest.raises(RuntimeError, match="groups"):  # of another number of images it is refused, not wrong
        graph(x[:1], grad[:1])


def test_autocast_while_a_graph_is_recorded() -> None:
    x, kernels, bias = CROSS.tensors(torch.float32)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return ops.depthwise_sum(x, kernels, CROSS.anchors, bias)

    assert recorded(function, x)(x).dtype == torch.bfloat16


def test_arguments_are_checked_while_a_graph_is_recorded() -> None:
    x, kernels, _ = CROSS.tensors()
    with pytest.raises(ArgumentError, match="anchor"):
        recorded(lambda x: ops.depthwise_sum(x, kernels, [(13, 0), (0, 0), (0, 0)]), x)
    with pytest.raises(ArgumentError, match="channels"):
        recorded(lambda x: ops.depthwise_branches(x[:, :2], kernels), x)
    with pytest.raises(ops.NoBackendError, match=r"'native'.*leave the backend out"):
        recorded(lambda x: ops.depthwise_sum(x, kernels, backend="native"), x)
    recorded(lambda x: ops.depthwise_sum(x, kernels, backend="portable"), x)


def test_a_failed_recording_leaves_no_state_behind() -> None:
    x, kernels, _ = CROSS.tensors()
    with pytest.raises(ArgumentError):
        recorded(lambda x: ops.depthwise_sum(x, kernels, []), x)
    assert not torch.jit.is_tracing()
    with ops.trace() as trace:
        ops.depthwise_sum(x, kernels)
    assert trace.backends() == ["portable"]


class Layer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        _, kernels, bias = case.tensors()
        self.case, self.kernels, self.bias = case, nn.ParameterList(kernels), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        kernels, anchors, dilations = list(self.kernels), self.case.anchors, self.case.dilations
        y = torch.stack(ops.depthwise_branches(x, kernels, anchors, dilations=dilations)).sum(0)
        return ops.depthwise_sum(y, kernels, anchors, self.bias, dilations=dilations)


@pytest.mark.parametrize("case", [CROSS, TILES, GAPS], ids=str)
def test_an_exported_program_is_decomposed(case: Case) -> None:
    module, x = Layer(case).eval(), case.tensors()[0]
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    assert {str(node.target) for node in exported.graph.nodes if "widekernel" in str(node.target)} == {
        "widekernel.depthwise_branches.default",
        "widekernel.depthwise_sum.default",
    }
    program = exported.run_decompositions(ops.decompositions())
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "widekernel" in name]
    assert len([name for name in names if "conv" in name]) == 2 * len(case.rects)
    found = [node.args[5] for node in program.graph.nodes if "conv2d" in str(node.target)]
    assert found == 2 * [[step, step] for step in case.dilations or (1,) * len(case.rects)]
    x = torch.cat([x, x, x])
    assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("dilations", [(), (2, 1, 3)], ids=["dense", "dilated"])
@pytest.mark.parametrize("name", ["depthwise_sum_of_taps", "depthwise_sum_of_branches", "depthwise_weight_grad"])
def test_decompositions_of_what_gradients_call(name: str, dilations: tuple[int, ...]) -> None:
    x, kernels, _ = TILES.tensors()
    geometry = [n for k, anchor in zip(kernels, TILES.anchors) for n in (*k.shape[2:], *anchor)]
    arguments = {
        "depthwise_sum_of_taps": (x, torch.cat([k.flatten(1) for k in kernels], 1), geometry),
        "depthwise_sum_of_branches": ([x, 2 * x, -x], kernels, [n for anchor in TILES.anchors for n in anchor]),
        "depthwise_weight_grad": (x, x.square(), geometry[:4]),
    }[name]
    operator = getattr(torch.ops.widekernel, name).default
    options = ["", "", list(dilations)] if dilations else ["", ""]
    if dilations and name == "depthwise_weight_grad":
        options[2] = [2]
    assert_close(ops.decompositions()[operator](*arguments, *options), operator(*arguments, *options))


def test_every_operator_is_decomposed() -> None:
    found = {str(name) for name in torch._C._dispatch_get_all_op_names() if name.startswith("widekernel::")}
    assert {operator.name() for operator in ops.decompositions()} == found
