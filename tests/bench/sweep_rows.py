"""Made-up rows of a sweep."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

from widekernel.bench.cases import Case
from widekernel.bench.rows import SweepRow
from widekernel.ops.problem import LAYOUTS


def row_of(
    case: Case, direction: str, layout: str = "NCHW", ours: float = 1.0, nchw: float = 4.0, nhwc: float = 2.0, **other
):
    """Return a row with these times in milliseconds; other fields are neutral unless given."""
    neutral = {int: 5, float: 0.5, str: "", float | None: None}
    values = {field.name: neutral[get_type_hints(SweepRow)[field.name]] for field in dataclasses.fields(SweepRow)}
    values |= dict(zip(("batch", "channels", "height", "width"), case.shape), shape=str(case), case=case.name)
    values |= {"kernel_height": case.kernel[0], "kernel_width": case.kernel[1], "direction": direction, "layout": layout}
    values |= {"ours_ms": ours, "torch_nchw_ms": nchw, "torch_nhwc_ms": nhwc, "backend": "native"}
    values |= {"times_best": min(nchw, nhwc) / ours, "times_same": (nchw if layout == "NCHW" else nhwc) / ours}
    values |= {"torch_nchw_images": case.batch, "torch_nhwc_images": case.batch}
    values["twin_ratio"] = 1.0
    return SweepRow(**(values | other))


def unit_rows(case: Case, direction: str, **other) -> list[SweepRow]:
    """Return the rows of one unit."""
    return [row_of(case, direction, layout, **other) for layout in LAYOUTS]
