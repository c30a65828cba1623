"""Programs that read the graph of a network: counters, TensorBoard, ONNX, OpenVINO."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.models.zoo import NANO, alive, assert_near, images
from widekernel import fold, ops, to_torch

pytestmark = pytest.mark.clients
FAMILIES = ["replknet_nano", "slak_nano", "shiftwise_nano", "unireplknet_nano"]
EACH = pytest.mark.parametrize("name", FAMILIES)
FORMS = pytest.mark.parametrize("form", ["training", "folded"])


@pytest.fixture(autouse=True)
def _ignore_deprecations_in_other_libraries() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def network(name: str, form: str) -> nn.Module:
    return alive(name) if form == "training" else fold(alive(name))


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@FORMS
@EACH
def test_fvcore_counts_what_pytorch_counts(name: str, form: str) -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    model, x = network(name, form), images(batch=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    counted = fvcore.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).by_operator()
    products = ("conv", "linear", "matmul", "addmm")
    assert sum(counted[kind] for kind in products) == counter.get_total_flops() // 2


@FORMS
def test_tensorboard_draws_the_graph(form: str, tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(network("slak_nano", form), images())
    events = EventAccumulator(str(tmp_path)).Reload()
    kinds = {node.op for node in events.Graph().node}
    assert "aten::_convolution" in kinds
    assert not [kind for kind in kinds if "widekernel" in kind]


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@EACH
def test_onnx_runtime_computes_the_same(name: str, exporter: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if exporter == "dynamo" else "onnx")
    model, x, file = network(name, "folded"), images(), str(tmp_path / "network.onnx")
    if exporter == "dynamo":
        batch = torch.export.Dim("batch", min=1, max=16)
        shapes = {"dynamo": True, "dynamic_shapes": ({0: batch},), "verbose": False}
    else:
        shapes = {"dynamo": False, "dynamic_axes": {"x": {0: "batch", 2: "height", 3: "width"}}}
    torch.onnx.export(model, (x,), file, input_names=["x"], **shapes)
    session = runtime.InferenceSession(file)
    for y in (x, images(64, 3) if exporter == "dynamo" else images(96, 3)):
        (got,) = session.run(None, {"x": y.numpy()})
        assert_near(torch.from_numpy(got), logits(model, y))


def assert_openvino_agrees(converted: Any, model: nn.Module, *xs: torch.Tensor) -> None:
    import openvino

    # By default it computes in half precision if the processor supports that.
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for x in xs:
        assert_near(torch.from_numpy(compiled(x.numpy())[0]), logits(model, x))


@FORMS
@pytest.mark.parametrize("name", NANO)
def test_openvino_needs_no_example(name: str, form: str) -> None:
    """Without an example, OpenVINO compiles the network to TorchScript."""
    openvino = pytest.importorskip("openvino")
    model = network(name, form)
    assert_openvino_agrees(openvino.convert_model(model), model, images(), images(96, 3))


@FORMS
@pytest.mark.parametrize("source", ["example", "exported", "to_torch"])
def test_openvino_computes_the_same(source: str, form: str) -> None:
    openvino = pytest.importorskip("openvino")
    model, x = network("slak_nano", form), images()
    if source == "exported":
        program = torch.export.export(model, (x,)).run_decompositions(ops.decompositions())
        assert_openvino_agrees(openvino.convert_model(program), model, x)
    elif source == "example":
        assert_openvino_agrees(openvino.convert_model(model, example_input=x), model, x, images(96, 3))
    else:
        assert_openvino_agrees(openvino.convert_model(to_torch(model)), model, x, images(96, 3))


@FORMS
def test_openvino_names_the_operator_of_a_program_that_is_not_decomposed(form: str) -> None:
    """The error is that of docs/pytorch-tools.md."""
    openvino = pytest.importorskip("openvino")
    program = torch.export.export(network("slak_nano", form), (images(),))
    with pytest.raises(Exception, match=r"No conversion rule found for operations: widekernel\.depthwise_"):
        openvino.convert_model(program)


def test_ptflops_counts_a_decomposed_program() -> None:
    ptflops = pytest.importorskip("ptflops")
    model, x = network("slak_nano", "folded"), images(batch=1)
    program = torch.export.export(model, (x,)).run_decompositions(ops.decompositions()).module()
    program.eval = lambda: program  # exported modules have no modes, and the counter sets one
    macs, _ = ptflops.get_model_complexity_info(
        program, (3, 64, 64), as_strings=False, print_per_layer_stat=False, backend="aten"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert macs >= counter.get_total_flops() // 2
