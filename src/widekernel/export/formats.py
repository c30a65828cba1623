"""The formats by name."""

from __future__ import annotations

from widekernel.export.base import Format
from widekernel.export.onnx import OnnxFormat
from widekernel.export.openvino import OpenVinoFormat
from widekernel.export.torch_program import TorchProgramFormat
from widekernel.settings import require_one_of

FORMATS: dict[str, Format] = {form.name: form for form in (OnnxFormat(), OpenVinoFormat(), TorchProgramFormat())}
"""Every format by its name in commands."""


def format_named(name: str) -> Format:
    """Return a format.

    Raises:
        ConfigError: there is no such format.
    """
    require_one_of("format", name, FORMATS)
    return FORMATS[name]
