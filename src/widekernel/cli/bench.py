"""`widekernel bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from widekernel.cli import bench_sweep
from widekernel.cli.bench_output import command_line, files_of
from widekernel.cli.bench_run import Page, Run
from widekernel.cli.console import progress_console, result_console
from widekernel.cli.custom_case import custom_case
from widekernel.cli.parsing import new_parser, parse
from widekernel.errors import ConfigError, nearest
from widekernel.settings import parse_names, require

if TYPE_CHECKING:
    from widekernel.bench import Case, Platform, TimeBudget
    from widekernel.bench.devices import Accelerator

_OPS = (
    "Time depthwise convolutions with large kernels: forward pass, input gradient and weight gradient. Our operator is "
    "compared with PyTorch's (NCHW and NHWC) and, for the forward pass on the CPU, with onnxruntime and OpenVINO if "
    "they are installed. On a CUDA device, several precisions are timed in a time budget. All results are checked first."
)
_MODELS = (
    "Time networks in training and inference: ours unchanged, folded, accelerated and fused, compared with the same "
    "networks on PyTorch's convolutions. Takes the names of widekernel's and timm's models; on a CUDA device, there are "
    "default ones."
)
_BRANCHES = (
    "Time layers with several branches, such as UniRepLKNet's with dilated kernels: forward pass, input gradient and weight "
    "gradients of all branches together. Our operator is compared with itself on kernels with zeros in their gaps, and with "
    "PyTorch's dilated convolutions (NCHW and NHWC). All results are checked first."
)
_POINTWISE = (
    "Time products over channels and pairs of them with an activation between, as in the blocks of ConvNeXt, SLaK and "
    "RepLKNet, on a CPU: ours compared with PyTorch's linear layers and 1×1 convolutions, and with onnxruntime if it is "
    "installed."
)
_MODES = "train,infer"
_PASSES = ("forward", "input", "weight")
_CPU_SECONDS = {"ops": 0.5, "branches": 0.5, "models": 3.0, "pointwise": 0.2}
_CUDA_SECONDS = {"ops": 0.1, "branches": 0.1, "models": 1.0}
_MINUTES, _CUDA_BATCH, _CPU_IMAGES = 10.0, 64, 4
_DTYPES = "which of bfloat16,tf32,float16,float32 to compute in"


def run(arguments: list[str]) -> int:
    """Time operators, layers, networks or a grid of operators, print the table and write the requested files."""
    kinds = {
        "ops": (_bench_ops, _OPS),
        "branches": (_bench_branches, _BRANCHES),
        "models": (_bench_models, _MODELS),
        "pointwise": (_bench_pointwise, _POINTWISE),
        "sweep": (bench_sweep.run, bench_sweep.TEXT),
    }
    if arguments and arguments[0] in kinds:
        return kinds[arguments[0]][0](arguments[1:])
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ConfigError(
            f"widekernel bench cannot time {arguments[0]!r}.{nearest(arguments[0], kinds)} It times {', '.join(kinds)}."
        )
    usage = [f"usage: widekernel bench {{{','.join(kinds)}}} [OPTIONS]"]
    usage += [f"{name}: {text}" for name, (_, text) in kinds.items()]
    result_console().print("\n\n".join(usage))
    return 0 if arguments else 2


def _bench_ops(arguments: list[str]) -> int:
    values = parse(_ops_parser(), arguments)
    require(values["batch"] is None or values["batch"] > 0, "batch", values["batch"], "positive")
    files, accelerator = _check_common(values, "ops")
    from widekernel.bench import PASSES, OperatorPlan, check_operator, engines, measure_operators, notes, tables
    from widekernel.bench.plots import draw
    from widekernel.bench.precision import FLOAT32, PRECISIONS
    from widekernel.ops.checks import check_algorithm

    passes = [dict(zip(_PASSES, PASSES))[name] for name in parse_names("passes", values["passes"], _PASSES)]
    _require_backend(values["backend"])
    check_algorithm(values["algorithm"])
    cases, remarks = _cases(values, *(("targets", None) if accelerator is None else ("layers", _CUDA_BATCH)))
    precisions, about = values["dtypes"] or list(PRECISIONS.values()), notes.DEVICE_OPERATOR_NOTES
    if accelerator is None:
        precisions, about, remarks = [FLOAT32], notes.OPERATOR_NOTES, remarks + engines.absences()
    for remark in remarks:
        progress_console().print(remark, soft_wrap=True)
    given = {name: values[name] for name in ("backend", "algorithm", "seconds", "rounds")}
    plan = OperatorPlan(cases, precisions, passes, **given)
    run = Run(values, files, accelerator, len(cases) * len(precisions))
    rows = run.measure(partial(measure_operators, plan), lambda: check_operator(values["backend"], values["algorithm"]))
    title = "Depthwise convolutions" + ("" if accelerator is None else " on a GPU")
    columns = tables.operator_columns(rows, accelerator is not None)
    run.show(Page(title, columns, (*remarks, *about), command_line("ops", arguments)), rows)
    if "plot" in files:
        tables.write(draw(rows, run.platform), files["plot"])
    run.budget.finish()
    return 0


def _bench_branches(arguments: list[str]) -> int:
    values = parse(_branches_parser(), arguments)
    require(values["batch"] is None or values["batch"] > 0, "batch", values["batch"], "positive")
    files, accelerator = _check_common(values, "branches")
    from widekernel.bench import check_operator, notes, tables
    from widekernel.bench.branches import choose_branches, measure_branches
    from widekernel.bench.precision import BFLOAT16, FLOAT32

    cases = choose_branches(values["names"], values["batch"] or (None if accelerator is None else _CUDA_BATCH))
    precisions = values["dtypes"] or [FLOAT32 if accelerator is None else BFLOAT16]
    given = {"precisions": precisions, "seconds": values["seconds"], "rounds": values["rounds"]}
    run = Run(values, files, accelerator, len(cases) * len(precisions))
    rows = run.measure(partial(measure_branches, cases, **given), check_operator)
    columns = tables.branches_columns(rows)
    run.show(Page("Layers with several branches", columns, notes.BRANCHES_NOTES, command_line("branches", arguments)), rows)
    run.budget.finish()
    return 0


def _bench_models(arguments: list[str]) -> int:
    values = parse(_models_parser(), arguments)
    require(values["size"] is None or values["size"] > 0, "size", values["size"], "positive")
    batches = _numbers("batch", values["batch"])
    files, accelerator = _check_common(values, "models")
    from widekernel.bench import check_operator, lower_precision, notes, tables
    from widekernel.bench.lookup import build_network, check_names
    from widekernel.bench.networks import DEFAULT_BATCHES, DEFAULT_NETWORKS, MODES, NetworkPlan, measure_networks
    from widekernel.bench.precision import BFLOAT16, FLOAT32, INT8

    modes = parse_names("modes", values["modes"], MODES)
    names = values["names"]
    lower = accelerator is None and values["dtypes"] in ([BFLOAT16], [INT8]) and not values["pieces"]
    if lower:
        lower_precision.check_settings(values["modes"], values["compile"], *values["dtypes"])
    if accelerator is None:
        require(bool(names), "names", names, "at least one model, because there are no default models on the CPU")
        batches, precisions, about = batches or [_CPU_IMAGES], [FLOAT32], notes.NETWORK_NOTES
        title = "Networks" if len(batches) > 1 else f"Networks, {batches[0]} images at a time"
    else:
        names, batches = names or DEFAULT_NETWORKS, batches or list(DEFAULT_BATCHES)
        precisions, about, title = values["dtypes"] or [BFLOAT16], notes.DEVICE_NETWORK_NOTES, "Networks on a GPU"
    check_names(names)
    given = {name: values[name] for name in ("size", "seconds", "rounds")}
    networks = {name: partial(build_network, name) for name in names}
    if values["pieces"]:
        return _bench_pieces(values, files, accelerator, networks, batches, command_line("models", arguments))
    rivals, remarks = _rivals(values["rivals"], accelerator, [precision.name for precision in values["dtypes"]])
    for remark in remarks:
        progress_console().print(remark, soft_wrap=True)
    plan = NetworkPlan(networks, batches, precisions, modes, bool(values["compile"]), **given, rivals=rivals)
    run = Run(values, files, accelerator, len(names))
    if lower:
        measure = partial(lower_precision.measure_lower_networks, plan, precision=values["dtypes"][0])
        rows = run.measure(measure, check_operator)
        columns, about = lower_precision.precision_columns(rows), lower_precision.NOTES
    else:
        rows = run.measure(partial(measure_networks, plan), check_operator)
        columns = tables.network_columns(rows, accelerator is not None)
    run.show(Page(title, columns, (*remarks, *about), command_line("models", arguments)), rows)
    run.budget.finish()
    return 0


def _bench_pieces(
    values: dict[str, Any],
    files: dict[str, Path],
    accelerator: Accelerator | None,
    networks: dict[str, Any],
    batches: list[int],
    command: str,
) -> int:
    from widekernel.bench import pieces
    from widekernel.bench.precision import FLOAT32

    require(accelerator is None, "pieces", True, "left out with --device cuda: pieces are observed on the CPU")
    for key, neutral in (("rivals", None), ("compile", False), ("rounds", None)):
        require(values[key] == neutral, key, values[key], "left out with --pieces, which observes accelerated networks only")
    precisions = values["dtypes"] or [FLOAT32]
    modes = values["modes"]
    require(modes in ("infer", _MODES), "modes", modes, "infer with --pieces, which observes no training")
    run = Run(values, files, None, len(networks))

    def measure(platform: Platform, budget: TimeBudget, advance: Callable[[str, int], None]) -> Iterator:
        peaks = {precision: platform.peak(precision) for precision in (FLOAT32, *precisions)}
        settings = values["size"], precisions, peaks, values["seconds"]
        return pieces.measure_pieces(networks, batches, *settings, advance)

    rows = run.measure(measure, lambda: None)
    run.show(Page("Pieces of networks", pieces.columns(rows), pieces.NOTES, command), rows)
    return 0


def _bench_pointwise(arguments: list[str]) -> int:
    values = parse(_pointwise_parser(), arguments) | {"device": "cpu", "minutes": None}
    files, _ = _check_common(values, "pointwise")
    from widekernel.bench import engines, products
    from widekernel.bench.precision import FLOAT32

    known = [case.family.lower() for case in products.PRODUCT_CASES]
    families = parse_names("families", values["families"], tuple(dict.fromkeys(known)))
    (precision,) = values["dtypes"] or [FLOAT32]
    cases = [case for case, family in zip(products.PRODUCT_CASES, known) if family in families]
    remarks = [line for line in engines.absences() if line.startswith("onnxruntime") and precision is FLOAT32]
    for remark in remarks:
        progress_console().print(remark, soft_wrap=True)
    run = Run(values, files, None, len(cases))

    def measure(platform: Platform, budget: TimeBudget, advance: Callable[[str, int], None]) -> Iterator:
        timing = values["seconds"], values["rounds"]
        return products.measure_products(cases, platform.peak(precision), *timing, advance, precision)

    rows = run.measure(measure, lambda: None)
    title = "Pointwise products" + ("" if precision is FLOAT32 else f" in {precision.name}")
    page = Page(title, products.COLUMNS, (*remarks, *products.NOTES), command_line("pointwise", arguments))
    run.show(page, rows)
    return 0


def _ops_parser() -> jsonargparse.ArgumentParser:
    parser = new_parser("bench ops", _OPS)
    cases = "targets (default on the CPU), layers (on CUDA), small, dilated, sweep (takes hours), or names such as slak-*"
    parser.add_argument("--cases", type=str, nargs="+", default=None, help=cases)
    parser.add_argument("--shape", type=str | None, default=None, help="a custom case: N,C,H,W such as 8,128,56,56")
    parser.add_argument("--kernel", type=str | None, default=None, help="its kernel: 31x31, 51x5, or 7x7d2 for dilation 2")
    parser.add_argument(
        "--batch", type=int | None, default=None, help="N of all cases; default 8, on CUDA 64, in a sweep 1, 8 and 32"
    )
    parser.add_argument("--passes", type=str, default=",".join(_PASSES), help="which of forward,input,weight to time")
    parser.add_argument(
        "--backend", type=str | None, default=None, help="backend of our operator; default: the selected one"
    )
    parser.add_argument(
        "--algorithm", type=str | None, default=None, help="algorithm of our operator: direct; default: the fastest"
    )
    parser.add_argument("--plot", type=str | None, default=None, help="PNG file: time against kernel size, and the roofline")
    parser.add_argument(
        "--dtypes", type=str | None, default=None, help=f"{_DTYPES}; default: all on CUDA, float32 on the CPU"
    )
    _add_common(parser, "ops")
    return parser


def _branches_parser() -> jsonargparse.ArgumentParser:
    parser = new_parser("bench branches", _BRANCHES, "[NAMES ...]")
    names = "layers: unireplknet-1 to unireplknet-4 (the default: all four), replknet-3, slak-3"
    parser.add_argument("names", type=str, nargs="*", help=names)
    parser.add_argument("--batch", type=int | None, default=None, help="N of all layers; default 8, on CUDA 64")
    dtypes = f"{_DTYPES}; default: bfloat16 on CUDA, float32 on the CPU"
    parser.add_argument("--dtypes", type=str | None, default=None, help=dtypes)
    _add_common(parser, "branches")
    return parser


def _models_parser() -> jsonargparse.ArgumentParser:
    parser = new_parser("bench models", _MODELS, "[NAMES ...]")
    names = "models (`widekernel models --all` lists them); default on CUDA: RepLKNet-31B, SLaK-T, SW-T and ConvNeXt-T"
    parser.add_argument("names", type=str, nargs="*", help=names)
    parser.add_argument(
        "--batch", type=str | None, default=None, help="images in a call, such as 1,8; default 4, on CUDA 64,128"
    )
    dtypes = (
        f"{_DTYPES}, on CUDA 16 bits by autocast, on the CPU bfloat16 or int8 for inference; default: bfloat16, float32 on "
        "the CPU"
    )
    parser.add_argument("--dtypes", type=str | None, default=None, help=dtypes)
    parser.add_argument("--size", type=int | None, default=None, help="pixels; default: the model's own")
    parser.add_argument("--modes", type=str, default=_MODES, help="which of train,infer to time")
    parser.add_argument("--compile", action="store_true", help="also time every variant compiled by torch.compile")
    rivals = "also time inference in other programs: all, or some of onnxruntime,openvino,torch.compile,zentorch"
    parser.add_argument("--rivals", type=str | None, default=None, help=rivals)
    pieces = "instead, show where the time of accelerated networks goes: stem, depthwise layers, products, …"
    parser.add_argument("--pieces", action="store_true", help=pieces)
    _add_common(parser, "models")
    return parser


def _pointwise_parser() -> jsonargparse.ArgumentParser:
    parser = new_parser("bench pointwise", _POINTWISE)
    families = "whose products to time: some of convnext,slak,replknet"
    parser.add_argument("--families", type=str, default="convnext,slak,replknet", help=families)
    parser.add_argument("--dtypes", type=str | None, default=None, help="float32 (default) or bfloat16")
    _add_measuring(parser, "pointwise")
    return parser


def _add_common(parser: jsonargparse.ArgumentParser, kind: str) -> None:
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:N")
    minutes = f"time budget of the whole run, on CUDA only: the remaining cases are left out; default {_MINUTES:g}"
    parser.add_argument("--minutes", type=float | None, default=None, help=minutes)
    _add_measuring(parser, kind)


def _add_measuring(parser: jsonargparse.ArgumentParser, kind: str) -> None:
    """Add the options of every measurement, on any device."""
    parser.add_argument(
        "--threads", type=int | None, default=None, help="number of threads; default: as many as PyTorch uses"
    )
    on_cuda = f", on CUDA {_CUDA_SECONDS[kind]:g}" if kind in _CUDA_SECONDS else ""
    seconds = f"approximate time for each call compared in a row; default {_CPU_SECONDS[kind]:g}{on_cuda}"
    parser.add_argument("--seconds", type=float | None, default=None, help=seconds)
    parser.add_argument(
        "--rounds", type=int | None, default=None, help="timed calls of each, instead of --seconds; slow calls get fewer"
    )
    parser.add_argument("--csv", type=str | None, default=None, help="file for all numbers, written row by row")
    parser.add_argument(
        "--markdown", type=str | None, default=None, help="file for the table, the machine and notes on how to read it"
    )


def _check_common(values: dict[str, Any], kind: str) -> tuple[dict[str, Path], Accelerator | None]:
    """Validate the common options before anything takes time; parse `dtypes` and fill in defaults of the device.

    Returns:
        the files to write, and the device (None for the CPU).
    """
    from widekernel.bench import devices
    from widekernel.bench.precision import BFLOAT16, FLOAT32, INT8, parse_precisions

    for key in ("threads", "rounds", "seconds", "minutes"):
        require(values[key] is None or values[key] > 0, key, values[key], "positive")
    given = values["dtypes"]
    on_cpu = values["device"] == "cpu"
    values["dtypes"] = [] if given is None else parse_precisions(given, [INT8] if on_cpu and kind == "models" else [])
    if on_cpu:
        known = [[], [FLOAT32], *([[BFLOAT16]] if kind in ("models", "pointwise") else [])]
        known += [[INT8]] if kind == "models" else []
        allowed = {2: "float32", 3: "float32 or bfloat16", 4: "float32, bfloat16 or int8"}[len(known)]
        require(values["dtypes"] in known, "dtypes", given, f"{allowed} on the CPU; others are for --device cuda")
        require(values["minutes"] is None, "minutes", values["minutes"], "left out on the CPU, where no run has a budget")
    if values["seconds"] is None:
        values["seconds"] = (_CPU_SECONDS if values["device"] == "cpu" else _CUDA_SECONDS)[kind]
    values["minutes"] = values["minutes"] or _MINUTES
    return files_of(values), devices.accelerator(values["device"])


def _rivals(text: str | None, accelerator: Accelerator | None, precisions: list[str]) -> tuple[list[str], list[str]]:
    """Return the programs to time, and a remark on each one of `all` that cannot run.

    Args:
        text: the option.
        accelerator: None for the CPU.
        precisions: one that is timed besides float32, or none.

    Raises:
        ConfigError: if one is named that cannot run.
    """
    from widekernel.bench import rivals

    if text is None:
        return [], []
    require(accelerator is None, "rivals", text, "left out with --device cuda: other programs are timed on the CPU")
    known = {rival.lower(): rival for rival in rivals.RIVALS}
    wanted = list(known.values()) if text == "all" else [known[name] for name in parse_names("rivals", text, tuple(known))]
    reasons = {rival: rivals.reason_against(rival, *precisions) for rival in wanted}
    remarks = [f"{rival} is left out: {why}" for rival, why in reasons.items() if why]
    require(text == "all" or not remarks, "rivals", text, f"those that can run ({'; '.join(remarks)})")
    return [rival for rival in wanted if not reasons[rival]], remarks


def _numbers(option: str, text: str | None) -> list[int]:
    """Parse positive integers separated by commas; None gives an empty list."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    sound = all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts)
    require(sound, option, text, "positive whole numbers with commas, such as 64,128")
    return [int(part) for part in parts]


def _cases(values: dict[str, Any], default: str, batch: int | None) -> tuple[list[Case], list[str]]:
    from widekernel.bench import choose

    case = custom_case(values, ("cases", "batch"))
    return choose(values["cases"] or [default], values["batch"] or batch) if case is None else ([case], [])


def _require_backend(name: str | None) -> None:
    from widekernel import ops

    if name is not None and name not in ops.backends():
        known = ops.backends()
        raise ConfigError(f"backend is {name!r}, which does not exist.{nearest(name, known)} Backends: {', '.join(known)}.")
