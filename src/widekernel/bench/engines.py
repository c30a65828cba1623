"""The forward pass in other inference engines, if they are installed: onnxruntime and OpenVINO.

Each engine runs a network of one depthwise convolution with a constant kernel, in float32 and on as many threads as PyTorch.
Its output is not copied.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The packages that each engine needs.
_NEEDS = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino",)}
ENGINES = tuple(_NEEDS)


def missing(engine: str) -> list[str]:
    """Return the packages that `engine` needs but that are not installed."""
    return [package for package in _NEEDS[engine] if importlib.util.find_spec(package) is None]


def absences() -> list[str]:
    """Return a line for each engine that is left out because it is not installed."""
    lacking = {engine: missing(engine) for engine in ENGINES}
    return [f"{engine} is left out: not installed ({', '.join(what)})" for engine, what in lacking.items() if what]


def forward_in(engine: str, x: Tensor, kernel: Tensor) -> Callable[[], Tensor]:
    """Return a call that convolves `x` (N, C, H, W) depthwise with `kernel` (C, 1, kh, kw) in `engine`."""
    return {"onnxruntime": _onnxruntime, "openvino": _openvino}[engine](x, kernel)


def _onnxruntime(x: Tensor, kernel: Tensor) -> Callable[[], Tensor]:
    onnx = importlib.import_module("onnx")
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    up, left = kernel.shape[2] // 2, kernel.shape[3] // 2
    node = helper.make_node("Conv", ["x", "kernel"], ["y"], group=x.shape[1], pads=[up, left, up, left])
    ends = [helper.make_tensor_value_info(name, number, list(x.shape)) for name in "xy"]
    constant = onnx.numpy_helper.from_array(kernel.numpy(), "kernel")
    graph = helper.make_graph([node], "depthwise", ends[:1], ends[1:], [constant])
    return _onnx_session(graph, 17, x)


def products_in_onnxruntime(rows: Tensor, layers: Sequence[tuple[Tensor, Tensor]], activation: str) -> Callable[[], Tensor]:
    """Return a call that computes `layers` in onnxruntime, with an activation after the first one.

    Args:
        rows: (..., channels).
        layers: weights (outputs, channels) and biases (outputs).
        activation: `gelu` or `relu`.
    """
    onnx = importlib.import_module("onnx")
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    nodes, constants, value = [], [], "x"
    for i, (weight, bias) in enumerate(layers):
        parts = {f"weight{i}": weight.t().contiguous(), f"bias{i}": bias}
        constants += [onnx.numpy_helper.from_array(part.numpy(), name) for name, part in parts.items()]
        nodes.append(helper.make_node("MatMul", [value, f"weight{i}"], [f"product{i}"]))
        nodes.append(helper.make_node("Add", [f"product{i}", f"bias{i}"], [f"sum{i}"]))
        value = f"sum{i}"
        if i == 0:
            nodes.append(helper.make_node({"gelu": "Gelu", "relu": "Relu"}[activation], [value], ["active"]))
            value = "active"
    shapes = {"x": rows.shape, value: (*rows.shape[:-1], len(layers[-1][1]))}
    ends = [helper.make_tensor_value_info(name, number, list(shape)) for name, shape in shapes.items()]
    return _onnx_session(helper.make_graph(nodes, "products", ends[:1], ends[1:], constants), 20, rows)


def _onnx_session(graph: Any, opset: int, x: Tensor) -> Callable[[], Tensor]:
    """Return a call that runs a graph of one input, named x, and one output."""
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    # Versions that every recent onnxruntime reads.
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads would keep spinning while the next implementation is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(x: Tensor, kernel: Tensor) -> Callable[[], Tensor]:
    openvino: Any = importlib.import_module("openvino")
    operators: Any = importlib.import_module("openvino.opset13")
    pads = [kernel.shape[2] // 2, kernel.shape[3] // 2]
    image = operators.parameter(list(x.shape), np.float32)
    filters = operators.constant(kernel.unsqueeze(1).numpy())
    y = operators.group_convolution(image, filters, [1, 1], pads, pads, [1, 1])
    # Otherwise it computes in bfloat16 if the processor supports it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(openvino.Model([y], [image]), "CPU", settings)
    request, feed = compiled.create_infer_request(), openvino.Tensor(x.contiguous().numpy(), shared_memory=True)

    def run() -> Tensor:
        request.infer([feed], share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor().data)

    return run
