"""Files of OpenVINO's intermediate representation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.export.base import INPUT, Format, GraphInputs, KernelRule, Run
from widekernel.quiet import quiet

_SECTION = "widekernel"  # of the file's runtime information


class OpenVinoFormat(Format):
    """OpenVINO: the graph in an .xml file, and the weights in a .bin file beside it."""

    name = "openvino"
    suffix = ".xml"
    engine = "OpenVINO"
    packages = {"openvino": "openvino"}
    int8_packages: Mapping[str, str] = {"nncf": "nncf"}
    rule = KernelRule()

    def files(self, path: Path) -> tuple[Path, ...]:
        """Return the file of the weights and the file of the graph."""
        return path.with_suffix(".bin"), path

    def write(self, network: nn.Module, inputs: GraphInputs, path: Path, description: Mapping[str, str], half: bool) -> None:
        """Write the graph of `network` to `path`; see `Format.write`."""
        import openvino

        sides = [-1, -1] if inputs.dynamic_size else [inputs.size, inputs.size]
        shape = [-1 if inputs.dynamic_batch else inputs.batch, inputs.channels, *sides]
        with quiet(), torch.no_grad():
            model = openvino.convert_model(network, example_input=inputs.example(), input=[openvino.PartialShape(shape)])
        model.inputs[0].get_tensor().set_names({INPUT})
        model.outputs[0].get_tensor().set_names({inputs.output})
        for key, text in description.items():
            model.set_rt_info(text, [_SECTION, key])
        openvino.save_model(model, str(path), compress_to_fp16=half)

    def load(self, path: Path, threads: int) -> Run:
        """Return a function that runs a file on the CPU with so many threads."""
        import openvino

        # Otherwise it computes in bfloat16 if the processor supports it.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(compiled(images.numpy())[0].copy())

        return run

    def description(self, path: Path) -> dict[str, str]:
        """Return the texts that a file was written with."""
        import openvino

        model = openvino.Core().read_model(str(path))
        if not model.has_rt_info([_SECTION]):
            return {}
        section: Any = model.get_rt_info([_SECTION])
        entries = section.value if hasattr(section, "value") else section
        return {key: str(getattr(value, "value", value)) for key, value in entries.items()}

    def quantize(self, source: Path, target: Path, images: Iterable[Tensor]) -> None:
        """Write the 8-bit version of a float32 file, made by NNCF; see `Format.quantize`."""
        import openvino

        batches = [batch.numpy() for batch in images]
        model = openvino.Core().read_model(str(source))
        with quiet():
            import nncf

            quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
        openvino.save_model(quantized, str(target), compress_to_fp16=False)
