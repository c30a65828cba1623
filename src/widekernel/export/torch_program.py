"""Exported programs of PyTorch (.pt2), decomposed to PyTorch's own operators."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from widekernel import ops
from widekernel.export.base import Format, GraphInputs, HalfPrecision, KernelRule, Run
from widekernel.quiet import quiet

_EXTRA = "widekernel.json"  # file inside the archive


class TorchProgramFormat(Format):
    """`torch.export`: a program that needs only PyTorch, not widekernel."""

    name = "torch-export"
    suffix = ".pt2"
    engine = "PyTorch"
    packages: Mapping[str, str] = {}
    rule = KernelRule()

    def write(self, network: nn.Module, inputs: GraphInputs, path: Path, description: Mapping[str, str], half: bool) -> None:
        """Write the graph of `network` to `path`; see `Format.write`."""
        with quiet(), torch.no_grad():
            program = torch.export.export(
                HalfPrecision(network) if half else network,
                (inputs.example(),),
                dynamic_shapes=inputs.dimensions(),
                prefer_deferred_runtime_asserts_over_guards=inputs.dynamic_size,
            ).run_decompositions(ops.decompositions())
            torch.export.save(program, str(path), extra_files={_EXTRA: json.dumps(dict(description))})

    def load(self, path: Path, threads: int) -> Run:
        """Return a function that runs a file on the CPU with PyTorch's own number of threads."""
        network = torch.export.load(str(path)).module()

        def run(images: Tensor) -> Tensor:
            with torch.no_grad():
                return network(images)

        return run

    def description(self, path: Path) -> dict[str, str]:
        """Return the texts that a file was written with."""
        extra = {_EXTRA: ""}
        torch.export.load(str(path), extra_files=extra)
        return json.loads(extra[_EXTRA])
