"""Arguments that name a network, by its run folder or file, and choose among its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from widekernel.cli.console import progress_console
from widekernel.cli.parsing import typed
from widekernel.tasks.config import FIRST_TASK
from widekernel.tasks.model_source import ModelSource, Weights

if TYPE_CHECKING:
    from torch import nn

    from widekernel.tasks.saved import SavedModel


def add_source_arguments(parser: Any, what: str = "run folder, or checkpoint file (.safetensors, .pth)") -> None:
    """Add the arguments that name a network.

    Args:
        parser: parser of the command.
        what: help text that says what the source may be.
    """
    parser.add_argument("source", type=str, help=what)
    parser.add_argument(
        "--weights", type=Weights, default="model", help="model: the trained weights; ema: their moving average"
    )
    parser.add_argument("--state", choices=["last", "best"], default="last", help="weights of a run folder: last or best")
    parser.add_argument("--model", type=str | None, default=None, help="model name, for a file that does not state it")
    parser.add_argument("--num_classes", type=int | None, default=None, help="number of outputs of --model")
    parser.add_argument(
        "--model_args",
        type=dict[str, Any] | None,
        default=None,
        help="further arguments of --model, for example --model_args.in_chans 1",
    )


def load_source(source: ModelSource, silent: bool = False, task: str | None = FIRST_TASK) -> tuple[nn.Module, SavedModel]:
    """Load the network of `source`; messages about it go to standard error, unless `silent`.

    Args:
        source: the network that the user named.
        silent: whether there are no messages.
        task: what the network must do; `None` accepts any.

    Raises:
        WidekernelError: it cannot be loaded, or has another task.
    """
    from widekernel.tasks.loading import load

    return load(source, lambda text: None if silent else progress_console().print(text, soft_wrap=True), task)


def source_from(values: dict[str, Any]) -> ModelSource:
    """Return the network that parsed arguments name."""
    return ModelSource(
        Path(values["source"]),
        weights=values["weights"],
        state=values["state"],
        model=values["model"],
        model_args=typed(values["model_args"] or {}),
        num_classes=values["num_classes"],
    )
