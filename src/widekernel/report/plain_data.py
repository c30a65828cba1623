"""The data of a report as values for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widekernel.report.collecting import Report
from widekernel.report.parts import Missing


def plain_data(report: Report) -> dict[str, Any]:
    """Return a report as dicts, lists, texts and numbers, with one entry for each of its sections.

    A section without data is `{"missing": reason, "advice": text}`. Numbers that are not finite are None. A picture is
    given as the shape of its pixels, `{"shape": [height, width]}`.
    """
    return _plain(report)


def _plain(value: Any) -> Any:
    if isinstance(value, Missing):
        return {"missing": value.reason, "advice": value.advice}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (np.ndarray, Tensor)):
        return {"shape": list(value.shape)}
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    raise TypeError(f"a report holds a {type(value).__name__}, which has no form in JSON")
