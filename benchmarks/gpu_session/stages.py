"""The stages of a session on a GPU, and of its rehearsal without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu_session import record
from benchmarks.gpu_session.schedule import Stage

NETWORKS = ("replknet_31b", "slak_tiny")
TUNED_CANDIDATES = 8
MORE_NETWORKS = ("convnext_tiny", "shiftwise_tiny")
PRETENSE = "tests.gpu_session.pretense"
"""The module that runs a stage on a pretended GPU."""
_COMMAND_LINE = "import sys; from widekernel.cli.main import main; sys.exit(main(sys.argv[1:]))"
_TO_END = 8.0
"""Seconds that a stage with its own time limit needs to report and exit, which takes a while with PyTorch."""
_RESERVE = 30.0
"""Seconds of a stage reserved for imports, for finishing started work, and for writing the page."""


def program(rehearsal: bool, module: str) -> list[str]:
    """Return the beginning of a command: the command line of widekernel, or a module of the session."""
    if rehearsal:
        return [sys.executable, "-m", PRETENSE, module]
    if module == "widekernel":
        return [sys.executable, "-c", _COMMAND_LINE]
    return [sys.executable, "-m", f"benchmarks.gpu_session.{module}"]


def working(seconds: float) -> float:
    """Return the number of seconds, out of `seconds`, after which a stage may not start anything new."""
    return max(0.5 * seconds, seconds - _RESERVE)


def stages(out: Path, facts: Path, rehearsal: bool) -> list[Stage]:
    """Return the stages: readiness, correctness, speed of operators, tuning, speed of networks.

    Args:
        out: folder for the results.
        facts: file for the facts about the machine.
        rehearsal: use a pretended GPU, with tiny sizes.
    """
    files = {name: str(out / name) for name in record.FILES}
    none, tuned = {"WIDEKERNEL_TUNED": "0"}, {"WIDEKERNEL_TUNED": files[record.TUNED]}
    ready = ("ready",)

    def ours(*arguments: str) -> Callable[[float], Sequence[str]]:
        return lambda seconds: [*program(rehearsal, "widekernel"), *arguments, "--minutes", f"{working(seconds) / 60:.3f}"]

    def check(seconds: float) -> Sequence[str]:
        small = ["--small"] if rehearsal else []
        limits = [
            "--csv",
            files[record.CORRECTNESS],
            "--until",
            f"{time.time() + max(0.8 * seconds, seconds - _TO_END):.1f}",
        ]
        return [*program(rehearsal, "correctness"), *limits, *small]

    operators, networks, tuning = (_REHEARSED if rehearsal else _REAL).values()
    to = [["--csv", files[table], "--markdown", files[page]] for table, page in _PAGES]
    return [
        Stage("ready", lambda seconds: [*program(rehearsal, "ready"), str(facts)], 0.4, most=120.0, environment=none),
        Stage("correctness", check, 0.18, 5.0, needs=ready, environment=none),
        Stage("operators", ours("bench", "ops", *operators, *to[0]), 0.28, 5.0, needs=ready, environment=none),
        Stage("tuning", ours("tune", *tuning, "--output", files[record.TUNED]), 0.27, 5.0, needs=ready, environment=tuned),
        Stage("networks", ours("bench", "models", *networks, *to[1]), 0.18, 5.0, needs=ready, environment=tuned),
    ]


_PAGES = ((record.OPS, record.OPS_PAGE), (record.MODELS, record.MODELS_PAGE))
_REAL = {
    # The layers of networks come first, then the branches of a dilated one, dense kernels and the image of a detector.
    "operators": ["--device", "cuda", "--dtypes", "bfloat16", "--cases", "layers", "dilated", "targets", "--batch", "64"],
    "networks": [*NETWORKS, *MORE_NETWORKS, "--device", "cuda", "--dtypes", "bfloat16", "--batch", "64,128"],
    "tuning": [*NETWORKS, "--dtypes", "bfloat16", "--candidates", str(TUNED_CANDIDATES), "--seconds", "0.05"],
}
_NANO = ("replknet_nano", "slak_nano", "--batch", "2", "--size", "32")
_REHEARSED = {
    "operators": [
        "--device",
        "cuda",
        "--dtypes",
        "bfloat16",
        "--shape",
        "2,4,8,8",
        "--kernel",
        "5x5",
        "--rounds",
        "1",
        "--backend",
        "triton",
    ],
    "networks": [*_NANO, "--device", "cuda", "--dtypes", "bfloat16", "--rounds", "1"],
    "tuning": [*_NANO, "--dtypes", "bfloat16", "--candidates", "1"],
}
