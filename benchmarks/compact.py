"""Speed of half-pruned layers: the masked, folded layer and the compacted one, timed alternately.

Run it with `OMP_WAIT_POLICY=passive python benchmarks/compact.py --write`. It takes about four minutes and reports nothing
if an output differs by more than 1e-6 of the largest one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from widekernel import fold
from widekernel.bench.machine import cpu_model
from widekernel.layers import FoldedLargeKernel, LargeKernel, PartialChannels, Rectangles, ShiftTiles
from widekernel.layers.partial import seeded_selection
from widekernel.transforms.compaction import CostModel, compact

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-6
TARGET = 0.8
LOAD = os.getloadavg()[0]
NOTES = """
Half of the kernels of a layer are set to zero. The masked layer is folded, its copy is folded and compacted, and both run
on the same images in turn. Times are medians.

- "dense / non-zero": the reduction that the mask promises. "dense / realized": the reduction of what is executed. Both count
  multiply-accumulates (MACs). "of the MAC ratio": the speed-up divided by the latter.
- "inside": the ratio of those multiply-accumulates whose tap lies on a pixel of the image. PyTorch's convolution skips
  padding. The outer taps of a strip that is as long as the image lie on padding for most pixels, so that half of the strip
  is less than half of the work. "of it": the speed-up divided by this ratio.
- "plain": all channels are computed, in smaller rectangles where possible. A ratio of 1 means that nothing was removed.
"""
WHY = """
Why the target is missed, or nothing is removed:

- *Few pixels on two threads.* Gathering channels and writing them back takes two more operators, and every operator wakes a
  sleeping thread. Their share grows as images get smaller, until the cost model keeps the plain layer. The part of this page
  with two threads uses the default costs of `compact`, the part with one thread `CostModel.one_thread()`.
- *Strips, outer half.* See "inside": less work is removed than the multiply-accumulates suggest.
- *Random branches* make four kinds of channels (both strips, one, the other, the small square or none). Each kind needs
  calls of its own on some of the channels, which are gathered and written back although most of them are alive. The costs
  are estimates, and some of the groups that they accept gain nothing.
- *Random tiles in Shift-wise* with 4 groups and 2 paths: eight tiles are added up in every slot of a strip, and all of them
  are dead in one slot of 256. Almost no tap of the folded kernel is zero, and nothing is saved. Only removing whole channels
  helps.
- Layers that are the same before and after ("plain" with a ratio of 1) show how much two measurements differ.
"""

SLAK = {
    "SLaK-T stage 1": (124, (51, 5), 56),
    "SLaK-T stage 2": (249, (49, 5), 28),
    "SLaK-T stage 3": (499, (47, 5), 14),
}
REPLKNET = {"RepLKNet-31B stage 1": (128, 31, 56), "RepLKNet-31B stage 2": (256, 29, 28)}
SHIFTWISE = {
    "Shift-wise-T stage 1": (80, 51, 56),
    "Shift-wise-T stage 2": (160, 49, 28),
    "Shift-wise-T stage 3": (320, 47, 14),
}


def norms(channels: int, count: int) -> list[nn.Module]:
    made = [nn.BatchNorm2d(channels) for _ in range(count)]
    for norm in made:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return made


def crossed(channels: int, strip: tuple[int, int]) -> LargeKernel:
    kernel_size, short = strip
    source = Rectangles(channels, [(kernel_size, short), (short, kernel_size), (short, short)])
    return LargeKernel(source, norms(channels, 3))


def square(channels: int, size: int) -> LargeKernel:
    return LargeKernel(Rectangles(channels, [(size, size), (5, 5)]), norms(channels, 2))


def shiftwise(channels: int, kernel_size: int, groups: int = 4) -> PartialChannels:
    convolved = int(channels * (1 - 0.23)) // 2 * 2
    layer = LargeKernel(ShiftTiles(convolved, kernel_size, 3, 2, groups), norms(convolved, 3), identity=True)
    return PartialChannels(layer, seeded_selection(channels, convolved), channels)


def kernels_of(layer: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Return the trained kernels of a layer, each with its number of kernels per channel."""
    inner = layer.layer if isinstance(layer, PartialChannels) else layer
    channels = inner.source.channels
    return [(p, p.shape[0] // channels) for p in inner.source.parameters() if p.dim() == 4]


@torch.no_grad()
def prune(layer: nn.Module, how: str) -> nn.Module:
    """Set half of the weights to zero: whole channels, branches (one kernel of a channel), or the outer half of strips."""
    first, _ = kernels_of(layer)[0]
    channels = first.shape[0] // kernels_of(layer)[0][1]
    dead = torch.randperm(channels)[: channels // 2]
    for kernel, tiles in kernels_of(layer):
        shaped = kernel.view(channels, tiles, *kernel.shape[1:])
        if how == "channel, random":
            shaped[dead] = 0
        elif how == "channel, tail":
            shaped[channels // 2 :] = 0
        elif how == "branch, random":
            shaped[torch.randperm(channels)[: channels // 2]] = 0
        elif how == "strip, outer half":
            for axis in (-2, -1):
                size = kernel.shape[axis]
                if size > 5:
                    quarter = size // 4
                    kernel.narrow(axis, 0, quarter).zero_()
                    kernel.narrow(axis, size - quarter, quarter).zero_()
        elif how == "tile, random":
            mask = torch.rand(channels, tiles) < 0.5
            shaped[mask] = 0
        else:
            raise SystemExit(f"unknown pruning {how!r}")
    return layer


def alternate(a: nn.Module, b: nn.Module, x: torch.Tensor, seconds: float) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for module in (a, b, a, b):
        module(x)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[0]) < 15:
        for module, took in zip((a, b), times):
            start = time.perf_counter()
            module(x)
            took.append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def measure(
    name: str, layer: nn.Module, how: str, batch: int, shape: tuple[int, int], layout: str, cost: CostModel, seconds: float
) -> dict:
    masked = fold(prune(layer, how).eval())
    channels, size = shape
    x = torch.randn(batch, channels, size, size)
    small = compact(masked, cost, input_size=x.shape)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    want, got = masked(x), small(x)
    error = ((got - want).abs().max() / want.abs().max()).item()
    if not error <= TOLERANCE:
        raise SystemExit(f"{name}, {how}: outputs differ by {error:.2g}, more than {TOLERANCE:g}: nothing is reported")
    inside = inside_macs(masked, size) / max(inside_macs(small, size), 1)
    rows = small.compaction.layers
    dense, nonzero, realized = (sum(getattr(row, key) for row in rows) for key in ("dense", "nonzero", "realized"))
    before, after = alternate(masked, small, x, seconds)
    speedup = statistics.median(before) / statistics.median(after)
    ratio = dense / max(realized, 1)
    return {
        "layer": name, "image": f"{batch}x{channels}x{size}x{size}", "layout": layout, "pruned": how,
        "dense": dense, "nonzero": nonzero, "realized": realized, "mac_ratio": ratio,
        "masked_ms": 1e3 * statistics.median(before), "compacted_ms": 1e3 * statistics.median(after),
        "speedup": speedup, "of_ratio": speedup / ratio,
        "inside_ratio": inside, "of_inside_ratio": speedup / inside,
        "error": error, "form": describe(small),
    }  # fmt: skip


def inside_macs(layer: nn.Module, size: int) -> int:
    """Count the multiply-accumulates of one image whose tap does not lie on padding."""
    total = 0
    for module in layer.modules():
        if isinstance(module, FoldedLargeKernel):
            for rect in module.rects():
                up, down, left, right = rect.reach
                rows = sum(min(i, up) + min(size - 1 - i, down) + 1 for i in range(size))
                columns = sum(min(i, left) + min(size - 1 - i, right) + 1 for i in range(size))
                total += rect.kernel.shape[0] * rows * columns
    return total


def describe(layer: nn.Module) -> str:
    groups = [len(m.kernels) for m in layer.modules() if type(m).__name__ == "GroupedKernels"]
    return f"{groups[0]} groups" if groups else "plain"


def cases(batches: list[int]) -> list[tuple]:
    found = []
    for batch in batches:
        for name, (channels, strip, size) in SLAK.items():
            for how in ("channel, random", "channel, tail", "branch, random", "strip, outer half"):
                found.append(
                    (name, lambda c=channels, s=strip: crossed(c, s), how, batch, (channels, size), "channels_last")
                )
        for name, (channels, kernel, size) in REPLKNET.items():
            for how in ("channel, random", "branch, random", "strip, outer half"):
                found.append((name, lambda c=channels, k=kernel: square(c, k), how, batch, (channels, size), "contiguous"))
        for name, (channels, kernel_size, size) in SHIFTWISE.items():
            for how in ("channel, random", "channel, tail", "tile, random"):
                found.append(
                    (name, lambda c=channels, k=kernel_size: shiftwise(c, k), how, batch, (channels, size), "channels_last")
                )
    return found


def environment(threads: int) -> dict[str, str]:
    return {
        "CPU": f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(threads),
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "other work": f"load average {LOAD:.1f} when it started",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }


def line(row: dict) -> str:
    zeros = row["dense"] / max(row["nonzero"], 1)
    return (
        f"{row['layer']:22} {row['image']:14} {row['pruned']:18} MACs /{row['mac_ratio']:5.2f} (non-zero /{zeros:5.2f}) "
        f"{row['masked_ms']:7.2f} -> {row['compacted_ms']:7.2f} ms, x{row['speedup']:5.2f} = {row['of_ratio']:.2f} of the "
        f"ratio, {row['form']}"
    )


def table(rows: list[dict]) -> str:
    head = ("layer", "image", "pruned", "form", "dense / non-zero", "dense / realized", "masked, ms", "compacted, ms")
    head = (*head, "speed-up", "of the MAC ratio", "inside", "of it", "error")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["layer"], r["image"], r["pruned"], r["form"], f"{r['dense'] / max(r['nonzero'], 1):.2f}"]
        cells += [f"{r['mac_ratio']:.2f}", f"{r['masked_ms']:.2f}", f"{r['compacted_ms']:.2f}", f"{r['speedup']:.2f}"]
        cells += [f"{r['of_ratio']:.2f}", f"{r['inside_ratio']:.2f}", f"{r['of_inside_ratio']:.2f}", f"{r['error']:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: list[dict]) -> str:
    """Count, for each kind of pruning, the cases that reach the target and those in which nothing was removed."""
    lines = []
    for how in dict.fromkeys(row["pruned"] for row in rows):
        of = [row for row in rows if row["pruned"] == how]
        smaller = [row for row in of if row["realized"] < row["dense"]]
        reached = sum(row["of_ratio"] >= TARGET for row in smaller)
        inside = sum(row["of_inside_ratio"] >= TARGET for row in smaller)
        middle = f"; median speed-up {statistics.median(row['speedup'] for row in smaller):.2f}" if smaller else ""
        lines.append(
            f"- {how}: {len(smaller)} of {len(of)} layers became smaller, {reached} of these reach {TARGET} of the MAC "
            f"ratio ({inside} of the ratio inside the image){middle}."
        )
    return "\n".join(lines)


def write(runs: dict[int, list[dict]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    content = {f"{threads} threads": {"environment": environment(threads), "rows": rows} for threads, rows in runs.items()}
    (RESULTS / "compact_cpu.json").write_text(json.dumps(content, indent=1) + "\n")
    parts = ["# Compacted layers on a CPU", __doc__.strip(), NOTES.strip(), WHY.strip()]
    for threads, rows in runs.items():
        where = "\n".join(f"- {key}: {value}" for key, value in environment(threads).items())
        parts += [f"## Threads: {threads}", where, summary(rows), table(rows)]
    (RESULTS / "compact_cpu.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=1.5, help="time per case, in seconds")
    parser.add_argument("--only", default="", help="measure only layers whose name contains this")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/compact_cpu.json and .md")
    options = parser.parse_args()
    runs = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        cost = CostModel.one_thread() if threads == 1 else CostModel()
        runs[threads] = []
        for name, make, *rest in cases(options.batches):
            if options.only in name:
                runs[threads].append(measure(name, make(), *rest, cost, options.seconds))
                print(line(runs[threads][-1]), flush=True)
        print(summary(runs[threads]))
    if options.write:
        write(runs)


if __name__ == "__main__":
    main()
