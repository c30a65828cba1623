"""``widekernel bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonargparse
from rich.table import Table

from widekernel.cli.console import for_tables, progress, progress_console, results
from widekernel.cli.parsing import listed, new_parser, parse
from widekernel.errors import ConfigError, nearest
from widekernel.settings import require

if TYPE_CHECKING:
    from widekernel.bench import Case
    from widekernel.bench.devices import Accelerator
    from widekernel.bench.gpu import Gpu
    from widekernel.bench.tables import Column
    from widekernel.bench.time_budget import Course

_OPS = (
    "Time depthwise convolutions with large kernels: forward, input gradient and weight gradient, ours against PyTorch "
    "(NCHW and NHWC) and, forward on the CPU, against onnxruntime and OpenVINO where they are installed; on a CUDA device "
    "in several types, with a budget of time. Nothing is timed before it has passed a check and the rivals agree."
)
_MODELS = (
    "Time networks in training and inference: ours as they are, folded and accelerated, against the same networks on "
    "PyTorch's convolutions. Takes the names of widekernel's and of timm's models; on a CUDA device there are default ones."
)
_PASSES = ("forward", "input", "weight")
_FILES = {"csv": ".csv", "markdown": ".md", "plot": ".png"}
_CPU_SECONDS, _CUDA_SECONDS = {"ops": 0.5, "models": 3.0}, {"ops": 0.1, "models": 1.0}
_MINUTES, _CUDA_BATCH, _CPU_IMAGES = 10.0, 64, 4
_WORDS = {"case", "N×C×H×W, kernel", "pass", "layout", "backend", "algorithm", "model", "mode", "rival"}
_WORDS |= {"dtype", "floor is", "remark"}
"""Headers of columns that are not numbers."""
_DTYPES = "which of bfloat16,tf32,float16,float32 to compute in"


def run(arguments: list[str]) -> int:
    """Time operators or networks, print the table and write what was asked for."""
    kinds = {"ops": (_bench_ops, _OPS), "models": (_bench_models, _MODELS)}
    if arguments and arguments[0] in kinds:
        return kinds[arguments[0]][0](arguments[1:])
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigError(
            f"widekernel bench cannot time {arguments[0]!r}.{nearest(arguments[0], kinds)} It times {' or '.join(kinds)}."
        )
    usage = ["usage: widekernel bench {ops,models} [OPTIONS]", *(f"{name}: {text}" for name, (_, text) in kinds.items())]
    results().print("\n\n".join(usage))
    return 0 if arguments else 2


def _bench_ops(arguments: list[str]) -> int:
    values = parse(_ops_parser(), arguments)
    require(values["batch"] is None or values["batch"] > 0, "batch", values["batch"], "positive")
    files, accelerator = _check_common(values, "ops")
    from widekernel.bench import (
        PASSES,
        check_operator,
        engines,
        measure_case,
        measure_machine,
        tables,
        using_threads,
    )
    from widekernel.bench.plots import draw
    from widekernel.ops.checks import check_algorithm

    passes = [dict(zip(_PASSES, PASSES))[name] for name in listed("passes", values["passes"], _PASSES)]
    _require_backend(values["backend"])
    check_algorithm(values["algorithm"])
    if accelerator is not None:
        return _ops_on_device(values, passes, files, accelerator, _command("ops", arguments))
    cases, remarks = _cases(values, "targets", None)
    remarks += engines.absences()
    _say(remarks)
    rows: list = []
    with using_threads(values["threads"]), progress(len(cases)) as advance:
        advance("checking the operator", 0)
        check_operator(values["backend"], values["algorithm"])
        machine = measure_machine()
        for case in cases:
            advance(f"{case.name} {case}", 0)
            given = {name: values[name] for name in ("backend", "algorithm", "seconds", "rounds")}
            rows += measure_case(case, machine, passes=passes, **given)
            if "csv" in files:
                # After every case, so that little is lost if somebody loses patience.
                tables.write_csv(rows, files["csv"])
            advance("", 1)
    notes = (*remarks, *tables.OPERATOR_NOTES)
    page = _Page("Depthwise convolutions", tables.columns(rows), machine.lines(), notes, _command("ops", arguments))
    page.show(rows, files)
    if "plot" in files:
        tables.write(draw(rows, machine), files["plot"])
    return 0


def _ops_on_device(
    values: dict[str, Any], passes: list[str], files: dict[str, Path], accelerator: Accelerator, command: str
) -> int:
    from widekernel.bench import tables
    from widekernel.bench.device_operators import Plan, measure_cases
    from widekernel.bench.plots import draw_device
    from widekernel.bench.precision import PRECISIONS

    precisions = values["dtypes"] or list(PRECISIONS.values())
    cases, remarks = _cases(values, "layers", _CUDA_BATCH)
    _say(remarks)
    given = {name: values[name] for name in ("backend", "algorithm", "seconds", "rounds")}
    plan = Plan(cases, precisions, passes, **given)
    rows, gpu, course = _on_device(values, files, accelerator, len(cases) * len(precisions), partial(measure_cases, plan))
    notes = (*course.lines(), *remarks, *tables.DEVICE_OPERATOR_NOTES)
    page = _Page("Depthwise convolutions on a GPU", tables.device_columns(rows), gpu.lines(), notes, command)
    page.show(rows, files, course.lines())
    if "plot" in files:
        tables.write(draw_device(rows, gpu), files["plot"])
    course.finish()
    return 0


def _on_device(
    values: dict[str, Any], files: dict[str, Path], accelerator: Accelerator, steps: int, measure: Callable[..., Iterator]
) -> tuple[list, Gpu, Course]:
    """Measure the device and then what `measure` does on it; each row is in the CSV file before the next one is begun."""
    from widekernel.bench import gpu as limits
    from widekernel.bench import tables, using_threads
    from widekernel.bench.time_budget import Course

    course = Course(values["minutes"])
    rows: list = []
    with using_threads(values["threads"]), accelerator.current(), progress(steps) as advance:
        advance("measuring the device", 0)
        gpu = limits.measure_gpu(accelerator)
        rows += tables.write_each(measure(accelerator, gpu, course, advance), files.get("csv"))
    return rows, gpu, course


def _bench_models(arguments: list[str]) -> int:
    values = parse(_models_parser(), arguments)
    require(values["size"] is None or values["size"] > 0, "size", values["size"], "positive")
    batches = _numbers("batch", values["batch"])
    files, accelerator = _check_common(values, "models")
    from widekernel.bench import check_operator, measure_machine, tables, using_threads
    from widekernel.bench.lookup import built, check_names
    from widekernel.bench.networks import MODES, measure_network

    modes = listed("modes", values["modes"], MODES)
    if accelerator is not None:
        return _models_on_device(values, modes, batches, files, accelerator, _command("models", arguments))
    require(bool(values["names"]), "names", values["names"], "at least one model: on the CPU there are no default ones")
    require(len(batches) < 2, "batch", values["batch"], "one number on the CPU; several are for --device cuda")
    batch = batches[0] if batches else _CPU_IMAGES
    check_names(values["names"])
    rows: list = []
    with using_threads(values["threads"]), progress(len(values["names"])) as advance:
        advance("checking the operator", 0)
        check_operator()
        machine = measure_machine()
        for name in values["names"]:
            advance(name, 0)
            model, usual = built(name)
            size = values["size"] or usual
            given = {key: values[key] for key in ("seconds", "rounds")}
            compiled = bool(values["compile"])
            rows += measure_network(name, model, batch=batch, size=size, modes=modes, compiled=compiled, **given)
            if "csv" in files:
                tables.write_csv(rows, files["csv"])
            advance("", 1)
    title, facts, notes = f"Networks, {batch} images at a time", machine.lines(), tables.NETWORK_NOTES
    _Page(title, tables.network_columns(rows), facts, notes, _command("models", arguments)).show(rows, files)
    return 0


def _models_on_device(
    values: dict[str, Any],
    modes: list[str],
    batches: list[int],
    files: dict[str, Path],
    accelerator: Accelerator,
    command: str,
) -> int:
    from widekernel.bench import device_networks as measuring
    from widekernel.bench import tables
    from widekernel.bench.lookup import built, check_names
    from widekernel.bench.precision import BFLOAT16

    names = values["names"] or measuring.DEFAULT_NETWORKS
    check_names(names)
    networks: dict[str, Callable] = {name: partial(built, name) for name in names}
    given = {name: values[name] for name in ("size", "seconds", "rounds")}
    precisions, compiled = values["dtypes"] or [BFLOAT16], bool(values["compile"])
    plan = measuring.NetworkPlan(networks, batches or measuring.DEFAULT_BATCHES, precisions, modes, compiled, **given)
    rows, gpu, course = _on_device(
        values, files, accelerator, len(names), lambda on, _, *how: measuring.measure_networks(plan, on, *how)
    )
    notes = (*course.lines(), *tables.DEVICE_NETWORK_NOTES)
    page = _Page("Networks on a GPU", tables.device_network_columns(rows), gpu.lines(), notes, command)
    page.show(rows, files, course.lines())
    course.finish()
    return 0


def _ops_parser() -> jsonargparse.ArgumentParser:
    parser = new_parser("bench ops", _OPS)
    cases = "targets (the default on the CPU), layers (on CUDA), small, sweep (takes hours), or names such as slak-*"
    parser.add_argument("--cases", type=str, nargs="+", default=None, help=cases)
    parser.add_argument("--shape", type=str | None, default=None, help="a case of your own: N,C,H,W such as 8,128,56,56")
    parser.add_argument("--kernel", type=str | None, default=None, help="its kernel, such as 31x31 or 51x5")
    parser.add_argument(
        "--batch", type=int | None, default=None, help="N of all cases; default 8, in a sweep 1, 8 and 32; on CUDA 64"
    )
    parser.add_argument("--passes", type=str, default=",".join(_PASSES), help="which of forward,input,weight to time")
    parser.add_argument("--backend", type=str | None, default=None, help="that ours must run on; default: the best one")
    parser.add_argument(
        "--algorithm", type=str | None, default=None, help="that ours must use: direct; default: the fastest"
    )
    parser.add_argument("--plot", type=str | None, default=None, help="PNG file: time against kernel size, and the roofline")
    parser.add_argument(
        "--dtypes", type=str | None, default=None, help=f"{_DTYPES}; default: all on CUDA, float32 on the CPU"
    )
    _add_common(parser, "ops")
    return parser


def _models_parser() -> jsonargparse.ArgumentParser:
    parser = new_parser("bench models", _MODELS, "[NAMES ...]")
    names = "models (`widekernel models --all` lists them); default on CUDA: RepLKNet-31B, SLaK-T, SW-T and ConvNeXt-T"
    parser.add_argument("names", type=str, nargs="*", help=names)
    parser.add_argument("--batch", type=str | None, default=None, help="images in a call; default 4, on CUDA 64,128")
    dtypes = f"{_DTYPES}, the 16-bit ones by autocast; default: bfloat16 on CUDA, float32 on the CPU"
    parser.add_argument("--dtypes", type=str | None, default=None, help=dtypes)
    parser.add_argument("--size", type=int | None, default=None, help="pixels; default: the model's own")
    parser.add_argument("--modes", type=str, default="train,infer", help="which of train,infer to time")
    parser.add_argument("--compile", action="store_true", help="time all of them compiled by torch.compile as well")
    _add_common(parser, "models")
    return parser


def _add_common(parser: jsonargparse.ArgumentParser, kind: str) -> None:
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:N")
    minutes = f"budget for the whole run, on CUDA only: what is left then is left out; default {_MINUTES:g}"
    parser.add_argument("--minutes", type=float | None, default=None, help=minutes)
    parser.add_argument("--threads", type=int | None, default=None, help="default: as many as PyTorch uses")
    seconds = f"for each rival of each row, roughly; default {_CPU_SECONDS[kind]:g}, on CUDA {_CUDA_SECONDS[kind]:g}"
    parser.add_argument("--seconds", type=float | None, default=None, help=seconds)
    parser.add_argument("--rounds", type=int | None, default=None, help="calls of each rival instead, unless it is slow")
    parser.add_argument("--csv", type=str | None, default=None, help="file for all numbers; written as they come")
    parser.add_argument(
        "--markdown", type=str | None, default=None, help="file for the table, the machine and how to read it"
    )


def _check_common(values: dict[str, Any], kind: str) -> tuple[dict[str, Path], Accelerator | None]:
    """Refuse what means nothing before anything takes time; read `dtypes` and fill in what depends on the device.

    Returns:
        the files to write, and the device, which is None for the CPU.
    """
    from widekernel.bench import devices
    from widekernel.bench.precision import FLOAT32, parse_precisions

    for key in ("threads", "rounds", "seconds", "minutes"):
        require(values[key] is None or values[key] > 0, key, values[key], "positive")
    given = values["dtypes"]
    values["dtypes"] = [] if given is None else parse_precisions(given)
    if values["device"] == "cpu":
        require(values["dtypes"] in ([], [FLOAT32]), "dtypes", given, "float32 on the CPU; others are for --device cuda")
        require(values["minutes"] is None, "minutes", values["minutes"], "left out on the CPU, where no run has a budget")
    if values["seconds"] is None:
        values["seconds"] = (_CPU_SECONDS if values["device"] == "cpu" else _CUDA_SECONDS)[kind]
    values["minutes"] = values["minutes"] or _MINUTES
    return _files(values), devices.accelerator(values["device"])


def _files(values: dict[str, Any]) -> dict[str, Path]:
    files = {}
    for option, suffix in _FILES.items():
        if values.get(option) is not None:
            path = Path(values[option])
            require(path.suffix == suffix, option, values[option], f"a {suffix} file")
            require(path.parent.is_dir(), option, values[option], "in a folder that exists")
            files[option] = path
    return files


def _numbers(option: str, text: str | None) -> list[int]:
    """Read positive whole numbers separated by commas; none from None."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    sound = all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts)
    require(sound, option, text, "positive whole numbers with commas, such as 64,128")
    return [int(part) for part in parts]


def _cases(values: dict[str, Any], usual: str, batch: int | None) -> tuple[list[Case], list[str]]:
    from widekernel.bench import choose, parse_case

    shape, kernel, names = values["shape"], values["kernel"], values["cases"]
    if shape is None and kernel is None:
        return choose(names or [usual], values["batch"] or batch)
    if shape is None or kernel is None:
        raise ConfigError(f"shape is {shape!r} and kernel {kernel!r}: a case of your own needs both, --shape and --kernel.")
    if names is not None or values["batch"] is not None:
        raise ConfigError("--shape and --kernel are a case of their own: leave --cases and --batch out.")
    return [parse_case(shape, kernel)], []


def _say(remarks: Sequence[str]) -> None:
    for remark in remarks:
        progress_console().print(remark, soft_wrap=True)


def _require_backend(name: str | None) -> None:
    from widekernel import ops

    if name is not None and name not in ops.backends():
        known = ops.backends()
        raise ConfigError(f"backend is {name!r}, which does not exist.{nearest(name, known)} Backends: {', '.join(known)}.")


class _Page(NamedTuple):
    """What surrounds the rows of a table: title, columns, facts about the machine, how to read it, the command."""

    title: str
    columns: Sequence[Column]
    facts: Sequence[str]
    notes: Sequence[str]
    command: str

    def show(self, rows: Sequence[Any], files: dict[str, Path], remarks: Sequence[str] = ()) -> None:
        """Print the table with the facts below it, then `remarks`, and write the page if a file is asked for."""
        from widekernel.bench import tables

        console = for_tables()
        table = Table(title=self.title, caption="\n".join(self.facts), caption_justify="left")
        for header, _ in self.columns:
            table.add_column(header, justify="left" if header in _WORDS else "right")
        for row in rows:
            table.add_row(*(cell(row) for _, cell in self.columns))
        console.print(table)
        for remark in remarks:
            console.print(remark, soft_wrap=True)
        if "markdown" in files:
            text = tables.document(self.title, self.facts, tables.markdown(rows, self.columns), self.notes, self.command)
            tables.write(text.encode(), files["markdown"])


def _command(kind: str, arguments: Sequence[str]) -> str:
    """Give the command without the files that it writes, which are nobody else's business."""
    kept, skip = [], False
    for argument in arguments:
        option = argument[2:].split("=", 1)[0] if argument.startswith("--") else ""
        if not skip and option not in _FILES:
            kept.append(argument)
        skip = option in _FILES and "=" not in argument
    return " ".join(["widekernel bench", kind, *kept])
