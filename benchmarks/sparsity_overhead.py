"""The cost of dynamic sparse training per step: dense and sparse steps alternate in one run.

    OMP_WAIT_POLICY=passive python benchmarks/sparsity_overhead.py > benchmarks/results/sparsity_overhead_cpu.md
    python benchmarks/sparsity_overhead.py cuda > benchmarks/results/sparsity_overhead_gpu.md

Reports nothing if the masks do not hold.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time

import timm
import torch

import widekernel
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig

NANO = {"dims": (32, 64, 128), "depths": (1, 2, 1), "kernel_sizes": (13, 7, 5), "num_classes": 10}
CASES = [
    ("slak_nano of the CIFAR-10 table, 32², batch 128", "slak_nano", 32, 128, 60, NANO),
    ("slak_tiny, 224², batch 8", "slak_tiny", 224, 8, 9, {}),
]
NOTE = """
The steps contain no topology update; its time is in the last column. With the fused AdamW, the extra cost is one
multiplication of every gradient by its mask. The unfused AdamW costs more on a CPU: it computes the square root of the
second moments with a vector library that is slow at zeros, and the second moments of masked weights are zero.
"""
GROWTHS = ("random", "gradient")
DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make(name: str, options: dict, fused: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = timm.create_model(name, **options).train().to(DEVICE)
    return model, torch.optim.AdamW(model.parameters(), 1e-4, fused=fused)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    start = clock()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return clock() - start


def measure(name: str, size: int, batch: int, steps: int, options: dict, fused: bool) -> list[str]:
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    y = torch.randint(0, options.get("num_classes", 1000), (batch,), device=DEVICE)
    runs = {"dense": make(name, options, fused)}
    controllers = {}
    for growth in GROWTHS:
        runs[growth] = make(name, options, fused)
        config = DynamicSparsityConfig(sparsity=0.4, init="erk", growth=growth, update_interval=10**6)
        controllers[growth] = DynamicSparsity(*runs[growth], config)
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for number in range(steps + 1):
        for kind, (model, optimizer) in runs.items():
            taken = step(model, optimizer, x, y)
            if number:
                times[kind].append(taken)
            print(f"{name} {size} step {number}/{steps} {kind}: {1e3 * taken:.1f} ms", file=sys.stderr)
    dense = statistics.median(times["dense"])
    cells = [f"{1e3 * dense:.1f}"]
    for growth in GROWTHS:
        controller, model = controllers[growth], dict(runs[growth][0].named_parameters())
        held = all(not model[key][~mask].any() for key, mask in controller.masks.items())
        if not held or controller.step != steps + 1 or controller.updates:
            sys.exit(f"the masks of {name} do not hold: nothing is reported")
        # Of neighboring steps, so that other load on the machine affects both.
        extra = statistics.median(b - a for a, b in zip(times["dense"], times[growth]))
        cells.append(f"{1e3 * statistics.median(times[growth]):.1f} ({100 * extra / dense:+.2f} %)")
    masks = sum(mask.numel() for mask in controllers["random"].masks.values())
    start = clock()
    controllers["random"]._rule.update_masks(controllers["random"]._state, 10**6, 1, None)
    return [*cells, f"{masks / 1e6:.2f}", f"{1e3 * (clock() - start):.0f}"]


def main() -> None:
    rows = [
        [title, "fused" if fused else "not fused", *measure(name, size, batch, steps, options, fused)]
        for title, name, size, batch, steps, options in CASES
        for fused in (True, False)
    ]
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    print("# Cost of dynamic sparse training per step, away from updates\n")
    print(f"{machine}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
          f"widekernel {widekernel.__version__}; medians of alternating dense and sparse steps, AdamW; in brackets the "
          "median difference of neighboring steps. `python benchmarks/sparsity_overhead.py`\n")  # fmt: skip
    columns = ("dense step (ms)", "random growth (ms)", "gradient growth (ms)", "masked weights (M)", "one update (ms)")
    print("| network | AdamW | " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(NOTE, end="")


if __name__ == "__main__":
    main()
