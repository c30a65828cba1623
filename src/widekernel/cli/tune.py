"""`widekernel tune`."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from widekernel.cli.console import progress, result_console
from widekernel.cli.custom_case import custom_case
from widekernel.cli.parsing import new_parser, parse
from widekernel.errors import ConfigError, WidekernelError
from widekernel.settings import parse_names, require

if TYPE_CHECKING:
    from widekernel.ops.gpu import tuning_tables
    from widekernel.ops.gpu.tuning import MeasurementSetup
    from widekernel.ops.problem import Problem

VARIABLE = "WIDEKERNEL_TUNED"
"""Same as `tuning_tables.VARIABLE`, which cannot be imported without PyTorch."""

_DESCRIPTION = (
    "Find the fastest configurations of the kernels for NVIDIA GPUs on this machine, and keep them in a table that is used "
    "from then on. For every operator problem that occurs in the models, the most promising configurations are checked "
    "against float64 and timed, in turns with PyTorch's convolutions. Every winner is written at once: an interrupted run "
    "loses nothing, and a second run continues. Running processes use a new table for problems that are new to them, and "
    f"keep computing others as before. The table is ~/.cache/widekernel/tuned.json, or the file that {VARIABLE} names (0: "
    "no table)."
)
_BATCH, _MINUTES, _SECONDS, _CANDIDATES = 64, 10.0, 0.1, 12
_ALONE = ("show", "forget")


def run(arguments: list[str]) -> int:
    """Tune, print the results and write the table; or show the tables, or remove this machine's."""
    parser = make_parser()
    values = parse(parser, arguments)
    for option in _ALONE:
        if values[option]:
            require(len(arguments) == 1, option, True, f"the only argument: give --{option} alone")
            return {"show": _show, "forget": _forget}[option]()
    from widekernel.cli import tune_session
    from widekernel.cli.tune_session import Session

    _check(values)
    target = _target(values)
    setup = tune_session.setup_on(values["device"], values["seconds"])
    session = Session.start(values, setup, target)
    session.tune(_problems(values, setup))
    session.report()
    return 0


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("tune", _DESCRIPTION, "[NAMES ...]")
    parser.add_argument("names", type=str, nargs="*", help="models (`widekernel models --all` lists them)")
    parser.add_argument("--batch", type=int | None, default=None, help=f"images in a call; default {_BATCH}")
    parser.add_argument("--size", type=int | None, default=None, help="pixels; default: the model's own")
    dtypes = "which of bfloat16,tf32,float16,float32 to compute in, the 16-bit ones by autocast"
    parser.add_argument("--dtypes", type=str, default="bfloat16", help=dtypes)
    parser.add_argument("--modes", type=str | None, default=None, help="which of train,infer; default: both")
    parser.add_argument("--layouts", type=str, default="NCHW", help="which of NCHW,NHWC the images are stored in")
    parser.add_argument("--shape", type=str | None, default=None, help="a custom case: N,C,H,W such as 64,128,56,56")
    parser.add_argument("--kernel", type=str | None, default=None, help="its kernel, such as 31x31 or 51x5")
    parser.add_argument("--device", type=str, default="cuda", help="cuda or cuda:N")
    minutes = "time budget: after it no problem is started, and the rest is listed; the longest problems come first"
    parser.add_argument("--minutes", type=float, default=_MINUTES, help=minutes)
    parser.add_argument("--candidates", type=int, default=_CANDIDATES, help="configurations to try for each problem")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="rough timing time of each configuration")
    parser.add_argument("--output", type=str | None, default=None, help="write this machine's table to another file")
    table = "write a table by architecture (such as sm_90) instead, as the package ships it"
    parser.add_argument("--table", type=str | None, default=None, help=table)
    again = "also tune what was tuned before with these versions of PyTorch, Triton and widekernel"
    parser.add_argument("--again", action="store_true", help=again)
    parser.add_argument("--report", action="store_true", help="print every configuration that was tried")
    parser.add_argument("--show", action="store_true", help="print the tables in use instead")
    parser.add_argument("--forget", action="store_true", help="remove this machine's table instead")
    return parser


def _check(values: dict[str, Any]) -> None:
    """Validate the options before anything takes time; fill in defaults and parse lists."""
    from widekernel.bench.lookup import check_names
    from widekernel.bench.precision import parse_precisions
    from widekernel.cli.tune_problems import MODES
    from widekernel.ops.problem import LAYOUTS

    for key in ("batch", "size", "minutes", "candidates", "seconds"):
        number = values[key]
        require(number is None or 0 < number < math.inf, key, number, "positive")
    values["case"] = custom_case(values, ("names", "batch", "size", "modes"))
    if values["case"] is None:
        require(bool(values["names"]), "names", values["names"], "at least one model, or a case by --shape and --kernel")
    values["batch"] = values["batch"] or _BATCH
    values["modes"] = parse_names("modes", values["modes"] or ",".join(MODES), MODES)
    values["layouts"] = parse_names("layouts", values["layouts"], list(LAYOUTS))
    values["dtypes"] = parse_precisions(values["dtypes"])
    check_names(values["names"])


def _target(values: dict[str, Any]) -> Path:
    """Return the file to write, after checking that it can be written and that an existing file is a table."""
    from widekernel.ops.gpu import tuning_tables

    given = [key for key in ("output", "table") if values[key] is not None]
    if len(given) == 2:
        raise ConfigError("--output and --table name different kinds of tables: give one of them.")
    path = Path(values[given[0]]) if given else tuning_tables.tuned_file()
    if path is None:
        why = f"{VARIABLE} is 0" if os.environ.get(VARIABLE) == "0" else "there is no home folder"
        raise ConfigError(f"{why}, so that this machine has no table: set {VARIABLE} to a file, or give --output FILE.")
    key = given[0] if given else "the table of this machine"
    require(not path.is_dir(), key, str(path), "a file, not a folder")
    if path.exists():
        tuning_tables.read(path)
    folder = path.resolve().parent
    if not given:  # missing folders of the cache are created later
        folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = "give a file in a folder that exists and can be written" + ("" if given else ": --output FILE")
        raise ConfigError(f"{key} is {str(path)!r}, which cannot be written ({error.strerror}): {fix}.") from error
    return path


def _problems(values: dict[str, Any], setup: MeasurementSetup) -> list[Problem]:
    """Return the problems to tune, the longest first."""
    from widekernel.bench.lookup import build_network
    from widekernel.cli.tune_problems import Runs, problems_of_case, problems_of_network
    from widekernel.ops.backends.triton import TritonBackend
    from widekernel.ops.gpu.tuning import longest_first

    runs = Runs(values["batch"], values["modes"], values["dtypes"], values["layouts"])
    if values["case"] is not None:
        triton = TritonBackend()
        found = problems_of_case(values["case"], runs, setup.device)
        for problem in found:
            if not triton.can_run(problem):
                raise ConfigError(f"{problem} cannot be tuned: {'; '.join(triton.reasons_against(problem))}.")
        return longest_first(found, setup.chip)
    found = Counter()
    with progress(len(values["names"])) as advance:
        for name in values["names"]:
            advance(f"running {name}", 0)
            model, usual = build_network(name)
            size = values["size"] or usual
            try:
                occurring = problems_of_network(model, size, runs, setup.device)
            except (RuntimeError, ValueError, AssertionError) as error:
                raise ConfigError(
                    f"{name} does not run on images of {size}x{size}: {str(error).rstrip('.')}. Give another --size."
                ) from error
            if not occurring:
                raise ConfigError(
                    f"{name} has no depthwise convolution that our kernels can compute: there is nothing to tune."
                )
            found += occurring
            advance("", 1)
    return longest_first(found, setup.chip)


def _show() -> int:
    """Print this machine's table and the shipped one."""
    from widekernel.cli.tune_session import print_table
    from widekernel.ops.gpu import tuning_tables

    mine = tuning_tables.tuned_file()
    for title, path in (("This machine's table", mine), ("Shipped table", tuning_tables.SHIPPED)):
        if path is None or not path.exists():
            where = f"none, {VARIABLE} is 0" if path is None else f"none, {path} does not exist"
            result_console().print(f"{title}: {where}.", soft_wrap=True)
            continue
        for gpu, entries in sorted(tuning_tables.read(path).items()):
            rows = [_shown(key, entry) for key, entry in sorted(entries.items())]
            print_table(f"{title}: {path}, {gpu}", ("problem", "configuration", "µs", "PyTorch µs", "found with"), rows)
    return 0


def _shown(key: str, entry: tuning_tables.Entry) -> tuple[str, ...]:
    from widekernel.ops.gpu import tuning_tables

    times = [entry.get(name) for name in ("us", "pytorch_us")]
    found = ", ".join(f"{name} {entry[name]}" for name in ("torch", "triton", "widekernel") if name in entry)
    return key, str(tuning_tables.entry_config(entry)), *("" if time is None else f"{time:.1f}" for time in times), found


def _forget() -> int:
    """Remove this machine's table, whether or not it is readable."""
    from widekernel.cli.tune_session import say
    from widekernel.ops.gpu import tuning_tables

    path = tuning_tables.tuned_file()
    if path is None or not path.exists():
        where = f"{VARIABLE} is 0" if path is None else f"{path} does not exist"
        say([f"There is nothing to forget: {where}."])
        return 0
    try:
        what = (
            "; ".join(f"{len(entries)} entries for {gpu}" for gpu, entries in tuning_tables.read(path).items())
            or "no entries"
        )
    except WidekernelError:
        what = "it was not a readable table"
    try:
        path.unlink()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be removed ({error.strerror}): remove it yourself, or set {VARIABLE}=0."
        ) from error
    say([f"Removed {path}: {what}."])
    return 0
