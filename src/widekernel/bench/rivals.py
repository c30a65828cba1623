"""Whole networks in other inference engines, if they are installed: onnxruntime and OpenVINO.

They get the folded network on PyTorch's convolutions, in float32 unless told otherwise, and as many threads as PyTorch.
Images are stored as NCHW; an engine chooses the layouts inside by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.bench.errors import BenchmarkError
from widekernel.quiet import quiet

# The packages that each engine needs for a network.
_NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "OpenVINO": ("openvino",)}
RIVALS = tuple(_NEEDS)
WITH_BFLOAT16 = ("OpenVINO",)
"""The engines that can compute in bfloat16 on a CPU."""


def missing(rival: str) -> list[str]:
    """Return the packages that `rival` needs but that are not installed."""
    return [package for package in _NEEDS[rival] if importlib.util.find_spec(package) is None]


def network_in(rival: str, network: nn.Module, images: Tensor, precision: str = "float32") -> Callable[[Tensor], Tensor]:
    """Return a function that runs a network in another engine, for images of this size.

    Args:
        rival: one of `RIVALS`, installed.
        network: the network in evaluation mode, on PyTorch's own operators.
        images: (N, C, H, W), stored as NCHW.
        precision: `float32`, or `bfloat16` if the engine is one of `WITH_BFLOAT16`.

    Raises:
        BenchmarkError: if the engine does not compute in that precision on this machine.
    """
    with quiet(), torch.no_grad():
        return _onnxruntime(network, images) if rival == "onnxruntime" else _openvino(network, images, precision)


def _onnxruntime(network: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    runtime = importlib.import_module("onnxruntime")
    program = torch.onnx.export(network, (images,), dynamo=True, verbose=False)
    assert program is not None
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads would keep spinning while the next variant is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        program.save(str(path), external_data=True)
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (feed,) = (given.name for given in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {feed: x.numpy()})[0])


def _openvino(network: nn.Module, images: Tensor, precision: str) -> Callable[[Tensor], Tensor]:
    openvino: Any = importlib.import_module("openvino")
    model = openvino.convert_model(network, example_input=images, input=[openvino.PartialShape(list(images.shape))])
    # Otherwise it computes in bfloat16 if the processor supports it.
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT")
    if used != {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[precision]:
        raise BenchmarkError(f"OpenVINO computes in {used.to_string()} on this machine, not in {precision}; leave it out.")
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())
