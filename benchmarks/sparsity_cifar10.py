"""Accuracy of every kind of sparsity on CIFAR-10 over three seeds, measured by the command line.

    python benchmarks/sparsity_cifar10.py --data DIR --runs DIR [--jobs 2] > benchmarks/results/sparsity_cifar10.md

The data folder holds `train/<class>/*.jpg` and `val/<class>/*.jpg`. Finished runs are not repeated, and interrupted ones are
resumed. Nothing is reported if a saved network is not as sparse as it should be.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import widekernel
from widekernel.sparsity import load_masks

CONFIG = "benchmarks/sparsity_cifar10.yaml"
SEEDS = (0, 1, 2)
EPOCHS_OF_MASKS = 2
NOTE = """
SNIP scores the weights of the untrained network. Here it keeps 0.17 to 0.46 of the weights of the first stage's layers
(seed 0) and all weights of the classifier; ERK keeps the whole first stage. With ERK, and with whole kernels pruned,
accuracy is above that of the dense network, which is not fully trained after five epochs. Differences from a fully
trained dense network were not measured.
"""


@dataclass(frozen=True)
class Trained:
    """A network trained with `widekernel train`."""

    title: str
    folder: str
    arguments: tuple[str, ...] = ()

    def command(self, data: str, runs: Path, seed: int) -> list[str]:
        output = str(runs / f"{self.folder}-{seed}")
        fixed = ["train", "--config", CONFIG, "--data.root", data, "--seed", str(seed), "--output", output]
        return [*fixed, *self.arguments]

    def files(self, runs: Path, seed: int) -> tuple[Path, Path]:
        folder = runs / f"{self.folder}-{seed}"
        return folder / "model.safetensors", folder / "masks.safetensors"


@dataclass(frozen=True)
class Sparsified:
    """The dense network of the same seed after `widekernel sparsify`."""

    title: str
    method: str
    arguments: tuple[str, ...] = ()

    def command(self, data: str, runs: Path, seed: int) -> list[str]:
        output = str(runs / f"{self.method}-{seed}.safetensors")
        fixed = ["sparsify", str(runs / f"dense-{seed}"), "--method", self.method, "--output", output, "--overwrite"]
        return [*fixed, *self.arguments]

    def files(self, runs: Path, seed: int) -> tuple[Path, Path]:
        return runs / f"{self.method}-{seed}.safetensors", runs / f"{self.method}-{seed}_masks.safetensors"


DENSE = Trained("dense", "dense")
COARSE = ("--sparsity.dynamic.layers", "large_kernel_only", "--sparsity.dynamic.block", "branch")
TRAINED = (
    Trained("40 % sparse, dynamic, ERK densities", "sparse", ("--sparsity.method", "dynamic")),
    Trained(
        "40 % sparse, dynamic, SNIP densities", "snip", ("--sparsity.method", "dynamic", "--sparsity.dynamic.init", "snip")
    ),
    Trained("40 % coarse: kernels of the strips", "coarse", ("--sparsity.method", "dynamic", *COARSE)),
)
SPARSIFIED = (
    Sparsified("2:4, magnitude", "magnitude"),
    Sparsified("2:4, permuted, magnitude", "permuted"),
    Sparsified("2:4, learned over frozen weights", "learned", ("--epochs", str(EPOCHS_OF_MASKS), "--lr", "0.3")),
)


def run(arguments: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    program = [sys.executable, "-c", "import sys; from widekernel.cli.main import main; sys.exit(main())"]
    print("widekernel", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run([*program, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"widekernel {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def accuracy(kind: Trained | Sparsified, data: str, runs: Path, seed: int) -> float:
    model, _ = kind.files(runs, seed)
    if not (isinstance(kind, Sparsified) and model.exists()):
        run(kind.command(data, runs, seed))
    shown = run(["eval", str(model), "--data.root", data, "--data.workers", "0"])
    found = re.search(r"top-1\s+([\d.]+) %", shown)
    return float(found.group(1)) if found else sys.exit(f"no accuracy in: {shown}")


def zeros(kind: Trained | Sparsified, runs: Path, seed: int) -> float:
    """Check that the masks hold, and return the share of zeros among the masked weights."""
    model, file = kind.files(runs, seed)
    weights, masks = load_file(model), load_masks(file)
    for name, mask in masks.items():
        if weights[name][~mask].any():
            sys.exit(f"{model}: {name} has weights outside its mask; nothing is reported")
        grouped = mask.movedim(1, -1).reshape(-1, 4) if isinstance(kind, Sparsified) else torch.zeros(1, 4)
        if (grouped.sum(1) > 2).any():
            sys.exit(f"{model}: {name} is not 2:4; nothing is reported")
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for kinds in ((DENSE, *TRAINED), SPARSIFIED):
            jobs = [
                (kind, seed, pool.submit(accuracy, kind, options.data, options.runs, seed))
                for seed in SEEDS
                for kind in kinds
            ]
            for kind, _, job in jobs:
                found.setdefault(kind.title, []).append(job.result())
    dense = statistics.mean(found[DENSE.title])
    print("# Accuracy of sparse networks on CIFAR-10\n")
    machine = (
        f"{platform.processor() or platform.machine()}, PyTorch {torch.__version__}, widekernel {widekernel.__version__}"
    )
    print(
        f"Top-1 in percent on the 10,000 held-out images, seeds {', '.join(map(str, SEEDS))}. The network is a SLaK of 268 "
        f"thousand weights (`{CONFIG}`), trained for 5 epochs. Dense, sparse and coarse networks are trained alike. 2:4 "
        "masks are applied to the dense networks, whose weights do not change; learned masks see the training images "
        f"{EPOCHS_OF_MASKS} times. {machine}.\n"
    )
    print("| | zeros among masked weights | top-1 by seed | mean | against dense |")
    print("|---|---|---|---|---|")
    for kind in (DENSE, *TRAINED, *SPARSIFIED):
        share = "–" if kind is DENSE else f"{100 * statistics.mean(zeros(kind, options.runs, seed) for seed in SEEDS):.1f} %"
        values = found[kind.title]
        mean = statistics.mean(values)
        difference = "" if kind is DENSE else f"{mean - dense:+.2f}"
        print(f"| {kind.title} | {share} | {', '.join(f'{v:.2f}' for v in values)} | {mean:.2f} | {difference} |")
    print(NOTE)
    print("The commands, for seed 0:\n")
    for kind in (DENSE, *TRAINED, *SPARSIFIED):
        print("    widekernel " + " ".join(kind.command("DATA", Path("RUNS"), 0)))


if __name__ == "__main__":
    main()
