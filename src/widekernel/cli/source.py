"""The arguments that name a network: a run folder or a file, and which of its weights."""

from pathlib import Path
from typing import Any

from widekernel.cli.parsing import typed
from widekernel.tasks.sources import Source, Weights


def add_source_arguments(parser: Any, what: str = "run folder, or checkpoint file (.safetensors, .pth)") -> None:
    """Add the arguments that name a network.

    Args:
        parser: of the command.
        what: the source may be.
    """
    parser.add_argument("source", type=str, help=what)
    parser.add_argument("--weights", type=Weights, default="model", help="the weights, or their moving average")
    parser.add_argument("--state", choices=["last", "best"], default="last", help="which weights of a run folder")
    parser.add_argument("--model", type=str | None, default=None, help="model name, for a file that does not tell")
    parser.add_argument("--num_classes", type=int | None, default=None, help="outputs of that model")
    parser.add_argument(
        "--model_args",
        type=dict[str, Any] | None,
        default=None,
        help="further arguments of that model, such as --model_args.in_chans 1",
    )


def source_from(values: dict[str, Any]) -> Source:
    """The source that parsed arguments name."""
    return Source(
        Path(values["source"]),
        weights=values["weights"],
        state=values["state"],
        model=values["model"],
        model_args=typed(values["model_args"] or {}),
        num_classes=values["num_classes"],
    )
