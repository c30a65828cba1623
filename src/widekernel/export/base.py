"""The interface of file formats, and what they are told about the inputs of the graph."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.errors import ConfigError, WidekernelError

INPUT = "image"
"""Name of the input of every exported graph."""
Run = Callable[[Tensor], Tensor]
"""Function from images (N, C, H, W) in float32 to outputs (N, classes) in float32."""


class ExportError(WidekernelError, RuntimeError):
    """Error for a network that cannot be exported, or whose file does not compute the same as PyTorch."""


@dataclass(frozen=True)
class GraphInputs:
    """The images that an exported graph takes.

    Attributes:
        channels: number of channels.
        size: height and width in pixels; with `dynamic_size`, those of the example.
        batch: number of images; with `dynamic_batch`, that of the example.
        dynamic_batch: whether the graph takes any number of images.
        dynamic_size: whether it takes images of any height and width.
        least_size: smallest height and width of a graph for any size.
        output: name of the output.
    """

    channels: int
    size: int
    batch: int = 1
    dynamic_batch: bool = False
    dynamic_size: bool = False
    least_size: int = 1
    output: str = "logits"

    def example(self) -> Tensor:
        """Return an image batch of zeros that any exporter can generalize from: dimensions of 1 would become constants."""
        batch = max(self.batch, 2) if self.dynamic_batch else self.batch
        size = max(self.size, self.least_size) if self.dynamic_size else self.size
        return torch.zeros(batch, self.channels, size, size)

    def dimensions(self) -> tuple[dict[int, Any]]:
        """Return the dynamic dimensions as `torch.export.export` takes them."""
        found: dict[int, Any] = {}
        if self.dynamic_batch:
            found[0] = torch.export.Dim("batch", min=1)
        if self.dynamic_size:
            found[2] = torch.export.Dim("height", min=self.least_size)
            found[3] = torch.export.Dim("width", min=self.least_size)
        return (found,)


@dataclass(frozen=True)
class KernelRule:
    """How an engine computes large kernels fastest; benchmarks/results/export_cpu.md holds the measurements.

    Attributes:
        dense_up_to: several rectangles become one dense kernel if it has at most this many times as many taps.
        channel_multiple: number of channels is padded to a multiple of this.
        multiple_from: padding of channels applies to layers with a kernel side of at least so many taps.
    """

    dense_up_to: float = 1.0
    channel_multiple: int = 1
    multiple_from: int = 0


class HalfPrecision(nn.Module):
    """A network with weights in float16 that still takes and returns float32.

    Args:
        network: the network, which is converted in place.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) -> the outputs of the network."""
        return self.network(image.half()).float()


class Format(ABC):
    """A file format. Instances have no state."""

    name: str
    """Name in commands."""
    suffix: str
    """Suffix of its files."""
    engine: str
    """Engine that runs its files here, for tables."""
    packages: Mapping[str, str]
    """Modules that writing and running its files needs: module -> name on the package index."""
    int8_packages: Mapping[str, str] | None = None
    """Modules that quantization needs in addition; None if the format has no quantization."""
    rule: KernelRule
    """How its engine computes large kernels fastest."""

    def files(self, path: Path) -> tuple[Path, ...]:
        """Return all files of an export to `path`, the named one last."""
        return (path,)

    @abstractmethod
    def write(self, network: nn.Module, inputs: GraphInputs, path: Path, description: Mapping[str, str], half: bool) -> None:
        """Write the graph of `network` to `path`.

        Args:
            network: takes and returns float32, in evaluation mode on the CPU; it may be changed.
            inputs: the images that the graph takes.
            path: the file, with the suffix of the format.
            description: texts to store in the file.
            half: store weights in float16; the inputs and outputs are float32 all the same.
        """

    @abstractmethod
    def load(self, path: Path, threads: int) -> Run:
        """Return a function that runs a file on the CPU with so many threads."""

    @abstractmethod
    def description(self, path: Path) -> dict[str, str]:
        """Return the texts that a file was written with."""

    def quantize(self, source: Path, target: Path, images: Iterable[Tensor]) -> None:
        """Write the 8-bit version of a float32 file.

        Args:
            source: the float32 file.
            target: the file to write.
            images: batches to calibrate with.
        """
        raise NotImplementedError

    def require_packages(self, int8: bool = False) -> None:
        """Raise a `ConfigError` if a package that the format needs is missing.

        Args:
            int8: whether quantization is needed, too.
        """
        if int8 and self.int8_packages is None:
            raise ConfigError(f"--int8 does not exist for the format {self.name}. Choose --format onnx or openvino.")
        needed = {**self.packages, **((self.int8_packages or {}) if int8 else {})}
        missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ConfigError(
                f"The format {self.name}{' in 8 bits' if int8 else ''} needs {', '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not installed. Install with `pip install 'widekernel[export]'`."
            )
