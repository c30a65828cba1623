"""Exported networks on a CPU: size, difference from PyTorch and latency by format; and which form of a kernel is fastest.

Run it with `OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 python benchmarks/export.py layers`, then with `networks` instead of
`layers`, with `int8 --data DIR`, with `latencies`, and with `table`, which writes benchmarks/results/export_cpu.md.

`networks` and `int8` write and check files, and `latencies` times them, each for a few seconds. What is done already is
skipped: an interrupted part goes on where it was, and `latencies slak_tiny --forms folded --formats onnx` times one file.

The benchmark needs `pip install 'widekernel[export]'`. Networks have random weights, in which every part has an effect.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from widekernel import fold
from widekernel.bench.machine import cpu_model, installed_version
from widekernel.export import FORMATS, CheckImages, ExportSettings, export
from widekernel.export.base import GraphInputs
from widekernel.export.check import latencies, network_run
from widekernel.export.images import NOISE, noise, noise_images, read_images
from widekernel.export.kernel_forms import GraphKernels, dense_rect
from widekernel.layers.rect import Rect
from widekernel.tasks.named_network import load_named

RESULTS = Path(__file__).parent / "results"
DATA, TABLE = RESULTS / "export_cpu.json", RESULTS / "export_cpu.md"
TIMES = ("ours", "exported", "alone")
NETWORKS = ("slak_tiny", "replknet_31b", "shiftwise_tiny")
LAYERS = {  # channels, side of the image, length and width of the two strips
    "SLaK-T stage 1": (124, 56, 51, 5),
    "SLaK-T stage 2": (249, 28, 49, 5),
    "SLaK-T stage 3": (499, 14, 47, 5),
    "SLaK-T stage 4": (998, 7, 13, 5),
    "51×5, 96 channels": (96, 56, 51, 5),
    "31×5": (96, 56, 31, 5),
    "13×5": (96, 56, 13, 5),
    "11×5": (96, 56, 11, 5),
    "9×5": (96, 56, 9, 5),
    "7×5": (96, 56, 7, 5),
    "13×3": (96, 56, 13, 3),
    "9×3": (96, 56, 9, 3),
    "7×3": (96, 56, 7, 3),
    "31×5, 28 pixels": (192, 28, 31, 5),
    "13×3, 14 pixels": (384, 14, 13, 3),
    "7×3, 14 pixels": (384, 14, 7, 3),
}
NOTES = """
Times are the shortest of repeated calls, in milliseconds, for one image on one thread. Those of networks were measured while
the machine did nothing else, except those with a star: it was busy, so they are upper bounds, and equal calls differ by a
factor of two between rows. "Ours" is the same form of the network in widekernel, called in turn with the file. Differences
are relative to the largest output.
"""
EIGHT_BITS = """
Weights and activations have 8 bits, after calibration with 100 other photographs. The weights of the networks are random, so
that the two largest outputs of an image are close together. "Ours" computes in float32.
"""
RULE = """
The times, in milliseconds, are those of one layer, measured on a busy machine. The exporter follows them: a sum of
rectangles becomes one dense kernel if that has at most as many taps; otherwise, the rectangles remain. onnxruntime has fast
depthwise convolutions only for a multiple of four channels. For it, channels are padded with zeros: 249 to 252, for
instance.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["layers", "networks", "int8", "latencies", "table"])
    parser.add_argument("names", nargs="*", default=NETWORKS)
    parser.add_argument("--data", type=Path, help="folder or .tar archive of images; default: noise")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--forms", nargs="*", default=["folded", "training"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--files", type=Path, default=Path("build/export"), help="folder for the exported files")
    parser.add_argument("--seconds", type=float, default=8.0, help="time for the calls of one file and of its network")
    parser.add_argument("--again", action="store_true", help="repeat what is done already")
    options = parser.parse_args()
    if options.part == "table":
        TABLE.write_text(table(json.loads(DATA.read_text())))
        return
    if options.part == "latencies":
        time_files(options)
        return
    rows = layer_rows() if options.part == "layers" else network_rows(options)
    for row in rows:
        store(options.part, row)


def store(part: str, row: dict[str, Any]) -> None:
    """Add a row to the results, in place of an earlier one on the same subject; its times stay if the row has none."""
    found = stored()
    rows = found.setdefault(part, [])
    row["machine"] = machine()
    places = [i for i, old in enumerate(rows) if old["subject"] == row["subject"]]
    if places:
        old = rows[places[0]]
        kept = {key: old[key] for key in TIMES if key in old and "exported" not in row and old["machine"] == row["machine"]}
        rows[places[0]] = {**row, **kept}
    else:
        rows.append(row)
    DATA.write_text(json.dumps(found, indent=1) + "\n")
    print(part, row, flush=True)


def stored() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each part."""
    return json.loads(DATA.read_text()) if DATA.exists() else {}


def machine() -> str:
    packages = ("torch", "onnx", "onnxruntime", "openvino", "nncf")
    versions = ", ".join(f"{name} {installed_version(name)}" for name in packages)
    return f"{cpu_model()}, {torch.get_num_threads()} thread; {versions}"


# -- layers ---------------------------------------------------------------------------------------------------------------


def layer_rows() -> Iterator[dict[str, Any]]:
    for name, (channels, side, long, short) in LAYERS.items():
        rects = [Rect.centered(torch.randn(channels, 1, *size)) for size in ((long, short), (short, long))]
        forms = {"strips": (rects, 1), "dense": ([dense_rect(rects)], 1)}
        if channels % 4:
            forms |= {"strips, padded": (rects, 4), "dense, padded": ([dense_rect(rects)], 4)}
        images = noise(1, channels, side, side)
        times: dict[str, dict[str, float]] = {}
        for form in FORMATS.values():
            calls: dict[str, Callable[[], object]] = {}
            with tempfile.TemporaryDirectory() as folder:
                for kind, (parts, multiple) in forms.items():
                    if multiple > 1 and form.name != "onnx":
                        continue
                    layer = GraphKernels(parts, torch.zeros(channels), multiple).eval()
                    path = Path(folder) / f"{kind.replace(', ', '_')}{form.suffix}"
                    form.write(layer, GraphInputs(channels, side), path, {}, half=False)
                    run = form.load(path, torch.get_num_threads())
                    calls[kind] = lambda run=run, images=images: run(images)
                times[form.engine] = latencies(calls, seconds=0.5)
        taps = 2 * long * short, long * long
        yield {"subject": name, "channels": channels, "side": side, "taps": taps, "milliseconds": times}


# -- networks -------------------------------------------------------------------------------------------------------------


def network_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Write and check the files that do not exist yet, and yield a row without times for each."""
    int8, files = options.part == "int8", options.files / options.part
    done = {row["subject"] for row in stored().get(options.part, [])}
    for name in options.names:
        settings = [
            ExportSettings(kind, fold=form == "folded", int8=int8)
            for form in (["folded"] if int8 else options.forms)
            for kind in options.formats
            if not int8 or FORMATS[kind].int8_packages is not None
        ]
        open_settings = [
            each
            for each in settings
            if options.again or subject_of(name, each) not in done or not file_of(files, subject_of(name, each)).exists()
        ]
        if not open_settings:
            continue
        model, saved = network(name)
        size = saved.preprocessing.input_size
        if options.data is None:
            images = noise_images(options.images, 3, size)
        else:
            transform = saved.preprocessing.eval_transform()
            images = read_images(options.data, transform, options.images, 100 if int8 else 0)
        for each in open_settings:
            yield network_row(name, model, saved, each, images, files)


def subject_of(name: str, settings: ExportSettings) -> str:
    return f"{name}, {'folded' if settings.fold else 'training'}, {settings.format}"


def file_of(folder: Path, subject: str) -> Path:
    return folder / f"{subject.replace(', ', '_')}{FORMATS[subject.rpartition(', ')[2]].suffix}"


def network(name: str) -> tuple[nn.Module, Any]:
    """Return a network with the same weights in every process, and its description."""
    torch.manual_seed(0)
    model, saved = load_named(name)
    enliven(model)
    return model, saved


def network_row(
    name: str, model: nn.Module, saved: Any, settings: ExportSettings, images: CheckImages, files: Path
) -> dict[str, Any]:
    subject = subject_of(name, settings)
    report = export(model, file_of(files, subject), settings, saved, images)
    return {
        "subject": subject,
        "megabytes": round(sum(path.stat().st_size for path in report.files) / 1e6, 1),
        "difference": report.comparison.max_difference,
        "agreement": report.comparison.agreement,
        "images": f"{report.comparison.images} {'noise images' if report.source == NOISE else 'photographs'}",
        "kernels": report.kernels,
    }


def time_files(options: argparse.Namespace) -> None:
    """Time the files that have not been timed yet; the machine must do nothing else."""
    for part in ("networks", "int8"):
        for row in stored().get(part, []):
            name, form, kind = row["subject"].split(", ")
            wanted = name in options.names and form in options.forms and kind in options.formats
            if not wanted or (row.get("alone") and not options.again):
                continue
            file = file_of(options.files / part, row["subject"])
            if not file.exists():
                print(f"{part}, {row['subject']}: not timed, because {file} does not exist: run the part {part} first")
                continue
            model, saved = network(name)
            ours = network_run(fold(model) if form == "folded" else model)
            run = FORMATS[kind].load(file, torch.get_num_threads())
            images = noise(1, 3, saved.preprocessing.input_size, saved.preprocessing.input_size)
            calls = {
                "ours": lambda ours=ours, images=images: ours(images),
                "exported": lambda run=run, images=images: run(images),
            }
            store(part, {**row, **latencies(calls, options.seconds / 2), "alone": True})


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Give every part an effect: no layer scales near zero, and batch norms with statistics."""
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_((0.0 if key.endswith("bias") else 1.0) + 0.2 * torch.randn(parameter.shape))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features))
            module.running_var.copy_(0.5 + torch.rand(module.num_features))


# -- the page -------------------------------------------------------------------------------------------------------------


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["# Exported networks on a CPU", "", (__doc__ or "").strip(), "", NOTES.strip(), "", "## Networks", ""]
    lines += [*network_table(found.get("networks", [])), "", "## 8 bits", "", EIGHT_BITS.strip(), ""]
    lines += [*network_table(found.get("int8", [])), "", "## Strips, or one dense kernel", "", RULE.strip(), ""]
    lines += layer_table(found.get("layers", []))
    machines = sorted({row["machine"] for rows in found.values() for row in rows})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}.", ""])


def network_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = header("network", "MB", "largest difference", "same top class", "ms", "ours, ms")
    for row in rows:
        # The same network, timed once for each format.
        same = [other for other in rows if subject(other) == subject(row)]
        share = f"{100 * row['agreement']:.0f} % of {row['images']}"
        cells = [row["subject"], f"{row['megabytes']:.0f}", f"{row['difference']:.1e}", share]
        lines.append(line([*cells, shortest([row], "exported"), shortest(same, "ours")]))
    return lines


def shortest(rows: list[dict[str, Any]], key: str) -> str:
    """Return the shortest time of the rows that were timed alone; if there are none, that of all rows, with a star."""
    alone = [row[key] for row in rows if row.get("alone")]
    times = alone or [row[key] for row in rows if key in row]
    return f"{min(times):.0f}{'' if alone else ' *'}" if times else ""


def subject(row: dict[str, Any]) -> str:
    """Return the network and the form of a row, without the format."""
    return row["subject"].rpartition(",")[0]


def layer_table(rows: list[dict[str, Any]]) -> list[str]:
    kinds = {"onnxruntime": ("strips", "dense", "strips, padded", "dense, padded")}
    kinds |= dict.fromkeys(("OpenVINO", "PyTorch"), ("strips", "dense"))
    heads = [f"{engine}: {kind}" for engine, of_engine in kinds.items() for kind in of_engine]
    lines = header("strips", "channels, pixels", "taps of strips / dense", *heads)
    for row in rows:
        times = row["milliseconds"]
        cells = [row["subject"], f"{row['channels']}, {row['side']}²", "{} / {}".format(*row["taps"])]
        lines.append(line([*cells, *(cell(times[engine], kind) for engine, of in kinds.items() for kind in of)]))
    return lines


def header(*titles: str) -> list[str]:
    return [line(titles), "|" + "---|" * len(titles)]


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(times: dict[str, float], key: str) -> str:
    return f"{times[key]:.2f}" if key in times else ""


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
