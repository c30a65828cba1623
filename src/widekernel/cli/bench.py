"""``widekernel bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from widekernel.cli.console import progress_console, results
from widekernel.cli.parsing import new_parser, parse
from widekernel.data.config import require
from widekernel.data.errors import ConfigError
from widekernel.errors import nearest

if TYPE_CHECKING:
    from widekernel.analysis.benchmark import Case
    from widekernel.analysis.benchmark.tables import Column

_OPS = (
    "Time depthwise convolutions with large kernels on the CPU: forward, input gradient and weight gradient, ours against "
    "PyTorch (NCHW and NHWC) and, forward, against onnxruntime and OpenVINO where they are installed. Nothing is timed "
    "before the operator has passed a check and the rivals agree."
)
_MODELS = (
    "Time networks on the CPU, in training and inference: ours as they are, folded and accelerated, against the same "
    "networks on PyTorch's convolutions. Takes the names of widekernel's and of timm's models."
)
_PASSES = ("forward", "input", "weight")
_FILES = {"csv": ".csv", "markdown": ".md", "plot": ".png"}
_WIDE = 400
"""Columns of a table that goes to a file or a pipe, where nothing has to fit."""

Advance = Callable[[str, int], None]


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
    results().print("\n\n".join(usage), markup=False)
    return 0 if arguments else 2


def _bench_ops(arguments: list[str]) -> int:
    values = parse(_ops_parser(), arguments)
    files = _check_common(values)
    from widekernel.analysis.benchmark import PASSES, check_operator, measure_case, measure_machine, tables, using_threads
    from widekernel.analysis.benchmark.plots import draw
    from widekernel.ops.problem import check_algorithm

    passes = [dict(zip(_PASSES, PASSES))[name] for name in _listed("passes", values["passes"], _PASSES)]
    _require_backend(values["backend"])
    check_algorithm(values["algorithm"] or "")
    cases, remarks = _cases(values)
    remarks += _absences()
    for remark in remarks:
        progress_console().print(remark, markup=False, soft_wrap=True)
    rows: list = []
    with using_threads(values["threads"]), _progress(len(cases)) as advance:
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
    columns, title = tables.columns(rows), "Depthwise convolutions"
    _print(title, rows, columns, machine.lines())
    if "markdown" in files:
        notes = (*remarks, *tables.OPERATOR_NOTES)
        page = tables.document(title, machine.lines(), tables.markdown(rows, columns), notes, _command("ops", arguments))
        tables.write(page.encode(), files["markdown"])
    if "plot" in files:
        tables.write(draw(rows, machine), files["plot"])
    return 0


def _bench_models(arguments: list[str]) -> int:
    values = parse(_models_parser(), arguments)
    files = _check_common(values)
    require(values["size"] is None or values["size"] > 0, "size", values["size"], "positive")
    from widekernel.analysis.benchmark import check_operator, measure_machine, tables, using_threads
    from widekernel.analysis.benchmark.networks import MODES, measure_network
    from widekernel.tasks.assembly import build_model, pretrained_cfg

    modes = _listed("modes", values["modes"], MODES)
    _check_names(values["names"])
    rows: list = []
    with using_threads(values["threads"]), _progress(len(values["names"])) as advance:
        advance("checking the operator", 0)
        check_operator()
        machine = measure_machine()
        for name in values["names"]:
            advance(name, 0)
            model = build_model(name, None, {})
            size = values["size"] or int(pretrained_cfg(model)["input_size"][-1])
            given = {key: values[key] for key in ("batch", "seconds", "rounds")}
            rows += measure_network(name, model, size=size, modes=modes, compiled=bool(values["compile"]), **given)
            if "csv" in files:
                tables.write_csv(rows, files["csv"])
            advance("", 1)
    columns, title = tables.network_columns(rows), f"Networks, {values['batch']} images at a time"
    _print(title, rows, columns, machine.lines())
    if "markdown" in files:
        table = tables.markdown(rows, columns)
        page = tables.document(title, machine.lines(), table, tables.NETWORK_NOTES, _command("models", arguments))
        tables.write(page.encode(), files["markdown"])
    return 0


def _ops_parser() -> jsonargparse.ArgumentParser:
    parser = new_parser("bench ops", _OPS)
    cases = "targets (the default), small, sweep (takes hours), or names such as slak-*"
    parser.add_argument("--cases", type=str, nargs="+", default=None, help=cases)
    parser.add_argument("--shape", type=str | None, default=None, help="a case of your own: N,C,H,W such as 8,128,56,56")
    parser.add_argument("--kernel", type=str | None, default=None, help="its kernel, such as 31x31 or 51x5")
    parser.add_argument("--batch", type=int | None, default=None, help="N of all cases; default 8, in a sweep 1, 8 and 32")
    parser.add_argument("--passes", type=str, default=",".join(_PASSES), help="which of forward,input,weight to time")
    parser.add_argument("--backend", type=str | None, default=None, help="that ours must run on; default: the best one")
    parser.add_argument(
        "--algorithm", type=str | None, default=None, help="that ours must use: direct; default: the fastest"
    )
    parser.add_argument("--plot", type=str | None, default=None, help="PNG file: time against kernel size, and the roofline")
    _add_common(parser, 0.5)
    return parser


def _models_parser() -> jsonargparse.ArgumentParser:
    parser = new_parser("bench models", _MODELS)
    parser.add_argument("names", type=str, nargs="+", help="models (`widekernel models --all` lists them)")
    parser.add_argument("--batch", type=int, default=4, help="images in a call")
    parser.add_argument("--size", type=int | None, default=None, help="pixels; default: the model's own")
    parser.add_argument("--modes", type=str, default="train,infer", help="which of train,infer to time")
    parser.add_argument("--compile", action="store_true", help="time all of them compiled by torch.compile as well")
    _add_common(parser, 3.0)
    return parser


def _add_common(parser: jsonargparse.ArgumentParser, seconds: float) -> None:
    parser.add_argument("--threads", type=int | None, default=None, help="default: as many as PyTorch uses")
    parser.add_argument("--seconds", type=float, default=seconds, help="for each rival of each row, roughly")
    parser.add_argument("--rounds", type=int | None, default=None, help="calls of each rival instead, unless it is slow")
    parser.add_argument("--csv", type=str | None, default=None, help="file for all numbers; written after every case")
    parser.add_argument(
        "--markdown", type=str | None, default=None, help="file for the table, the machine and how to read it"
    )


def _check_common(values: dict[str, Any]) -> dict[str, Path]:
    """Refuse numbers that mean nothing, and give the files to write, before anything takes time."""
    for key in ("batch", "threads", "rounds"):
        require(values[key] is None or values[key] > 0, key, values[key], "positive")
    require(values["seconds"] > 0, "seconds", values["seconds"], "positive")
    files = {}
    for option, suffix in _FILES.items():
        if values.get(option) is not None:
            path = Path(values[option])
            require(path.suffix == suffix, option, values[option], f"a {suffix} file")
            require(path.parent.is_dir(), option, values[option], "in a folder that exists")
            files[option] = path
    return files


def _listed(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Read names separated by commas, in the order of `known`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} has {name!r}.{nearest(name, known)} It takes {', '.join(known)}, with commas.")
    return [name for name in known if name in names]


def _cases(values: dict[str, Any]) -> tuple[list[Case], list[str]]:
    from widekernel.analysis.benchmark import choose, parse_case

    shape, kernel, names = values["shape"], values["kernel"], values["cases"]
    if shape is None and kernel is None:
        return choose(names or ["targets"], values["batch"])
    if shape is None or kernel is None:
        raise ConfigError(f"shape is {shape!r} and kernel {kernel!r}: a case of your own needs both, --shape and --kernel.")
    if names is not None or values["batch"] is not None:
        raise ConfigError("--shape and --kernel are a case of their own: leave --cases and --batch out.")
    return [parse_case(shape, kernel)], []


def _absences() -> list[str]:
    from widekernel.analysis.benchmark import engines

    lacking = {engine: engines.missing(engine) for engine in engines.ENGINES}
    return [f"{engine} takes no part: not installed ({', '.join(what)})" for engine, what in lacking.items() if what]


def _require_backend(name: str | None) -> None:
    from widekernel import ops

    if name is not None and name not in ops.backends():
        known = ops.backends()
        raise ConfigError(f"backend is {name!r}, which does not exist.{nearest(name, known)} Backends: {', '.join(known)}.")


def _check_names(names: Sequence[str]) -> None:
    """Refuse unknown names before the first network is timed, by building them without numbers."""
    import torch

    import widekernel.models  # noqa: F401 - registers the models
    from widekernel.tasks.assembly import build_model

    with torch.device("meta"):
        for name in names:
            build_model(name, None, {})


@contextmanager
def _progress(total: int) -> Iterator[Advance]:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=progress_console(), transient=True) as progress:
        task = progress.add_task("", total=total)

        def advance(what: str, steps: int) -> None:
            progress.update(task, advance=steps, description=what)

        yield advance


def _print(title: str, rows: Sequence[Any], columns: Sequence[Column], facts: Sequence[str]) -> None:
    console = results()
    if not console.is_terminal:
        console.width = _WIDE
    table = Table(title=title, caption="\n".join(facts), caption_justify="left")
    for header, _ in columns:
        words = header in ("case", "N×C×H×W, kernel", "pass", "layout", "backend", "algorithm", "model", "mode", "rival")
        table.add_column(header, justify="left" if words else "right")
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    console.print(table, markup=False)


def _command(kind: str, arguments: Sequence[str]) -> str:
    """Give the command without the files that it writes, which are nobody else's business."""
    kept, skip = [], False
    for argument in arguments:
        option = argument[2:].split("=", 1)[0] if argument.startswith("--") else ""
        if not skip and option not in _FILES:
            kept.append(argument)
        skip = option in _FILES and "=" not in argument
    return " ".join(["widekernel bench", kind, *kept])
