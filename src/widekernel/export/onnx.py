"""ONNX files, for onnxruntime and many other engines."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.export.base import INPUT, Format, GraphInputs, HalfPrecision, KernelRule, Run
from widekernel.quiet import quiet


class OnnxFormat(Format):
    """ONNX, run by onnxruntime. The weights are inside the file, which holds up to 2 GiB."""

    name = "onnx"
    suffix = ".onnx"
    engine = "onnxruntime"
    packages = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}
    int8_packages: Mapping[str, str] = {}
    rule = KernelRule(channel_multiple=4, multiple_from=7)

    def write(self, network: nn.Module, inputs: GraphInputs, path: Path, description: Mapping[str, str], half: bool) -> None:
        """Write the graph of `network` to `path`; see `Format.write`."""
        with quiet():
            program = torch.onnx.export(
                HalfPrecision(network) if half else network,
                (inputs.example(),),
                dynamo=True,
                dynamic_shapes=inputs.dimensions(),
                input_names=[INPUT],
                output_names=[inputs.output],
                verbose=False,
            )
            assert program is not None
            program.model.metadata_props.update(description)
            program.save(str(path), external_data=False)

    def load(self, path: Path, threads: int) -> Run:
        """Return a function that runs a file on the CPU with so many threads."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Otherwise its threads would keep spinning while something else runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (feed,) = (given.name for given in session.get_inputs())

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {feed: images.numpy()})[0])

        return run

    def description(self, path: Path) -> dict[str, str]:
        """Return the texts that a file was written with."""
        import onnx

        return {entry.key: entry.value for entry in onnx.load(str(path), load_external_data=False).metadata_props}

    def quantize(self, source: Path, target: Path, images: Iterable[Tensor]) -> None:
        """Write the 8-bit version of a float32 file, made by onnxruntime; see `Format.quantize`."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self._batches = iter(images)

            def get_next(self) -> dict[str, Any] | None:
                batch = next(self._batches, None)
                return None if batch is None else {INPUT: batch.numpy()}

        with quiet(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
