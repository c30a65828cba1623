"""The command `widekernel demo`: train, evaluate, fold, save and plot a network on digits in two minutes on a CPU."""

from pathlib import Path

import jsonargparse

from widekernel.cli.parsing import new_parser, parse


def make_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("demo", "Train a small SLaK on digits, fold it, and show that its predictions stay the same.")
    parser.add_argument("--output", type=str, default=str(Path("runs") / "demo"), help="run folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    return parser


def run(arguments: list[str]) -> int:
    """Train a network or reuse the earlier run, then evaluate, fold, save, reload, compare and plot it."""
    values = parse(make_parser(), arguments)
    from widekernel.cli.demo_run import show

    return show(values["output"], values["seed"])
