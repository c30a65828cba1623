"""Files for other inference engines: ONNX, OpenVINO and exported programs of PyTorch, each checked against PyTorch."""

from typing import TYPE_CHECKING

from widekernel.lazy import attach

if TYPE_CHECKING:
    from widekernel.export.base import ExportError, Format
    from widekernel.export.exporting import ExportReport, ExportSettings, export
    from widekernel.export.formats import FORMATS, format_named
    from widekernel.export.images import CheckImages

__all__ = [
    "FORMATS",
    "CheckImages",
    "ExportError",
    "ExportReport",
    "ExportSettings",
    "Format",
    "export",
    "format_named",
]

_WHERE = {
    "CheckImages": "widekernel.export.images",
    "ExportError": "widekernel.export.base",
    "ExportReport": "widekernel.export.exporting",
    "ExportSettings": "widekernel.export.exporting",
    "FORMATS": "widekernel.export.formats",
    "Format": "widekernel.export.base",
    "export": "widekernel.export.exporting",
    "format_named": "widekernel.export.formats",
}
__getattr__, __dir__ = attach(__name__, _WHERE)
