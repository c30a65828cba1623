"""`widekernel bench sweep`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from widekernel.cli.bench_output import files_of, rich_table
from widekernel.cli.console import progress, progress_console, table_console
from widekernel.cli.parsing import new_parser, parse
from widekernel.settings import require, require_one_of

if TYPE_CHECKING:
    from widekernel.bench import Case
    from widekernel.bench.sweep import Record

TEXT = (
    "Time a sample of a large grid of depthwise convolutions on the CPU: kernels of 3 to 61, maps of 7² to 224², 16 to "
    "2,048 channels, 1 to 32 images, three passes, both layouts. Our operator is compared with PyTorch's. The sample is "
    "spread evenly over the grid and grows with the time: a second call with the same --csv continues the first one."
)
_DTYPES = ("float32", "bfloat16", "float16")
_SETTINGS = ("threads", "dtype", "seed", "seconds", "longest")
_TITLE = "Sweep of depthwise convolutions"


def run(arguments: list[str]) -> int:
    """Measure more of the grid, print the tables and write the requested files; return 130 after an interruption."""
    values = parse(make_parser(), arguments)
    for key in ("threads", "seconds", "longest"):
        require(values[key] is None or values[key] > 0, key, values[key], "positive")
    require(values["minutes"] >= 0, "minutes", values["minutes"], "positive, or 0 to report without measuring")
    require(values["csv"] is not None, "csv", values["csv"], "a .csv file, to which measurements are added")
    require_one_of("dtype", values["dtype"], _DTYPES)
    files = files_of(values)
    from widekernel.bench.cases import swept_cases
    from widekernel.bench.sweep import Record

    cases, left_out = swept_cases(even=True)
    if values["minutes"] == 0:
        record, interrupted = Record.read(files["csv"]), False
    else:
        record, interrupted = _measure(values, files["csv"], cases)
    _report(record, files, cases, left_out)
    if not interrupted:
        return 0
    progress_console().print(f"Interrupted. {files['csv']} holds {len(record.rows)} cells; the same command continues.")
    return 128 + signal.SIGINT


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("bench sweep", TEXT)
    csv = "file for all numbers, required: it is begun, or continued if it was begun on this machine with these settings"
    parser.add_argument("--csv", type=str | None, default=None, help=csv)
    minutes = "time budget of this call; 0 reports what the file holds, without measuring"
    parser.add_argument("--minutes", type=float, default=60.0, help=minutes)
    parser.add_argument("--seed", type=int, default=0, help="determines the order in which the grid is covered")
    parser.add_argument("--dtype", type=str, default="float32", help=f"one of {', '.join(_DTYPES)}")
    parser.add_argument(
        "--threads", type=int | None, default=None, help="number of threads; default: as many as PyTorch uses"
    )
    parser.add_argument("--seconds", type=float, default=0.05, help="approximate time for each call compared in a cell")
    longest = "seconds: if a call of PyTorch takes longer, its time is estimated from fewer images"
    parser.add_argument("--longest", type=float, default=0.3, help=longest)
    markdown = "file for the tables, the machine and notes on how to read them"
    parser.add_argument("--markdown", type=str | None, default=None, help=markdown)
    parser.add_argument("--plot", type=str | None, default=None, help="PNG file: speed-ups by kernel and map")
    return parser


def _measure(values: dict[str, Any], path: Path, cases: list[Case]) -> tuple[Record, bool]:
    """Add to the record for the given time; return it, and whether the user interrupted."""
    from widekernel.bench import PASSES, TimeBudget, cpu_platform, keeping_memory, measure_machine, using_threads
    from widekernel.bench.precision import PRECISIONS
    from widekernel.bench.sweep import Record, SweepPlan, conditions_of, measure_sweep

    settings = {key: values[key] for key in ("seed", "seconds", "longest")}
    budget = TimeBudget(values["minutes"])
    plan = SweepPlan(cases, PRECISIONS[values["dtype"]], **settings)
    with keeping_memory(), using_threads(values["threads"]), progress(len(PASSES) * len(cases)) as advance:
        advance("measuring the machine", 0)
        machine = measure_machine()
        conditions = conditions_of(machine, dtype=values["dtype"], **settings)
        record = Record.begin_or_continue(path, conditions, machine.lines())
        try:
            measure_sweep(plan, cpu_platform(machine), record, budget, advance)
        except KeyboardInterrupt:
            return record, True
    return record, False


def _report(record: Record, files: dict[str, Path], cases: list[Case], left_out: list[str]) -> None:
    from widekernel.bench import PASSES, tables
    from widekernel.bench.notes import SWEEP_NOTES
    from widekernel.bench.sweep import draw_heat_map, page_parts, summary
    from widekernel.ops.problem import LAYOUTS

    rows, console = record.rows, table_console()
    told = list(summary.coverage(rows, len(PASSES) * len(LAYOUTS) * len(cases), left_out))
    console.print(rich_table(_TITLE, summary.group_columns(), summary.groups_of(rows), record.facts))
    slowest = summary.worst(rows)
    if slowest:
        console.print(rich_table("Slowest cells", summary.cell_columns(slowest), slowest, []))
    for line in told:
        console.print(line, soft_wrap=True)
    facts = [*record.facts, *(f"{name}: {value}" for name, value in record.conditions.items() if "digest" in name)]
    # From the conditions, because the file may be the result of several calls.
    command = " ".join(["widekernel bench sweep", *(f"--{name} {record.conditions[name]}" for name in _SETTINGS)])
    if "markdown" in files:
        text = tables.document(_TITLE, facts, page_parts(rows), (*told, *SWEEP_NOTES), command)
        tables.write(text.encode(), files["markdown"])
    if "plot" in files:
        conditions = record.conditions
        title = f"{conditions['CPU']}, {conditions['threads']} threads, {conditions['dtype']}"
        tables.write(draw_heat_map(rows, cases, title), files["plot"])
