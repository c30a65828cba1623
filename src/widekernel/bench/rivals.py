"""Whole networks as other programs run them: onnxruntime, OpenVINO, PyTorch's compiler and AMD's zentorch, if they can.

They get the folded network on PyTorch's convolutions, in float32 unless told otherwise, and as many threads as PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.bench.compiling import compiled, compiled_by_zentorch
from widekernel.bench.errors import BenchmarkError
from widekernel.errors import in_short
from widekernel.ops.problem import LAYOUTS
from widekernel.quiet import quiet

ONNXRUNTIME, OPENVINO, COMPILED, ZENTORCH = RIVALS = ("onnxruntime", "OpenVINO", "torch.compile", "zentorch")
# The packages that each of them needs besides PyTorch.
_NEEDS: dict[str, Sequence[str]] = {
    ONNXRUNTIME: ("onnxruntime", "onnx", "onnxscript"),
    OPENVINO: ("openvino",),
    COMPILED: (),
    ZENTORCH: ("zentorch", "deprecated"),
}
WITH: dict[str, Sequence[str]] = {"bfloat16": (OPENVINO, COMPILED, ZENTORCH), "int8": (OPENVINO,)}
"""Those that can compute in a lower precision on a CPU."""
_CALIBRATED = 8  # random images from which the ranges of numbers in int8 follow


def reason_against(rival: str, precision: str = "float32") -> str:
    """Return why `rival` cannot run here; "" if it can. Packages that extend PyTorch are imported to find out."""
    needs = [*_NEEDS[rival], *(["nncf"] if (rival, precision) == (OPENVINO, "int8") else [])]
    lacking = [package for package in needs if importlib.util.find_spec(package) is None]
    if lacking:
        return f"not installed ({', '.join(lacking)})"
    if rival in (COMPILED, ZENTORCH) and not _compilers():
        return "there is no C++ compiler; install one, or name one in the environment variable CXX"
    if rival == ZENTORCH:
        try:
            importlib.import_module("zentorch")
        except Exception as error:  # such as one of a shared library that was built for another PyTorch
            return f"it cannot be loaded with PyTorch {torch.__version__}: {in_short(error)}"
    return ""


def layouts_of(rival: str) -> Sequence[str]:
    """Return the layouts of images, keys of `LAYOUTS`, in which a rival is timed.

    Programs with a graph of their own choose the layouts inside by themselves; they get images stored as NCHW.
    """
    return tuple(LAYOUTS) if rival in (COMPILED, ZENTORCH) else ("NCHW",)


def compiles(rivals: Sequence[str]) -> bool:
    """Return whether some of the rivals use `torch.compile`."""
    return COMPILED in rivals or ZENTORCH in rivals


def network_in(rival: str, network: nn.Module, images: Tensor, precision: str = "float32") -> Callable[[Tensor], Tensor]:
    """Return a function that runs a network in another program, for images of this size.

    Args:
        rival: one of `RIVALS` that can run.
        network: the network in evaluation mode, on PyTorch's own operators.
        images: (N, C, H, W), in one of `layouts_of` the rival.
        precision: `float32`, or one in which the program can compute, according to `WITH`. Those that compile get a network
            and images of that type, OpenVINO float32. In int8, NNCF quantizes the network from random images, and the rest
            is float32.

    Raises:
        BenchmarkError: if the program does not compute in that precision on this machine.
    """
    if rival == COMPILED:
        return compiled(network)
    if rival == ZENTORCH:
        return compiled_by_zentorch(network)
    with quiet(), torch.no_grad():
        return _onnxruntime(network, images) if rival == ONNXRUNTIME else _openvino(network, images, precision)


def _compilers() -> list[str]:
    """Return the C++ compilers that are installed, of those that PyTorch tries."""
    usual = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
    return [path for path in (shutil.which(os.environ.get("CXX", usual)),) if path]


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
    if precision == "int8":
        model = _quantized(model, images)
    # Otherwise it computes in bfloat16 if the processor supports it.
    hint = "bf16" if precision == "bfloat16" else "f32"
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    program = openvino.Core().compile_model(model, "CPU", settings)
    used = program.get_property("INFERENCE_PRECISION_HINT")
    if used != (openvino.Type.bf16 if precision == "bfloat16" else openvino.Type.f32):
        raise BenchmarkError(f"OpenVINO computes in {used.to_string()} on this machine, not in {precision}; leave it out.")
    return lambda x: torch.from_numpy(program(x.numpy())[0].copy())


def _quantized(model: Any, images: Tensor) -> Any:
    nncf: Any = importlib.import_module("nncf")
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(images.shape, generator=generator).numpy() for _ in range(-(-_CALIBRATED // len(images)))]
    quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
    if not any(operation.get_type_name() == "FakeQuantize" for operation in quantized.get_ops()):
        raise BenchmarkError("NNCF has quantized nothing in the network; leave out OpenVINO in int8.")
    return quantized
