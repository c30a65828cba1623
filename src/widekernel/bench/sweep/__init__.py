"""The sweep: a sample of a grid of convolutions, measured in any number of sittings, and its tables and picture."""

from widekernel.bench.sweep.grid import Unit, class_of, ordered, units_of
from widekernel.bench.sweep.heat_map import draw_heat_map
from widekernel.bench.sweep.measuring import SweepPlan, measure_sweep
from widekernel.bench.sweep.record import Record, conditions_of
from widekernel.bench.sweep.summary import page_parts

__all__ = [
    "Record",
    "SweepPlan",
    "Unit",
    "class_of",
    "conditions_of",
    "draw_heat_map",
    "measure_sweep",
    "ordered",
    "page_parts",
    "units_of",
]
