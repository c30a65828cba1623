"""Loading of checkpoints that do not describe their model; warnings are passed on as messages."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from widekernel.models.checkpoint import LoadReport, load_checkpoint

Notify = Callable[[str], None]
"""Function that receives a message for the user."""


def load_weights(model: nn.Module, path: str | Path, notify: Notify | None = None, **how: Any) -> tuple[LoadReport, str]:
    """Load the checkpoint `path` into `model`.

    Args:
        model: the network.
        path: the file.
        notify: receives other warnings; if `None`, they remain Python warnings.
        how: further arguments of `load_checkpoint`.

    Returns:
        a report on what was loaded, and why the classifier is untrained, or "" if it is not.

    Raises:
        CheckpointError: the file cannot be read, or does not fit.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = load_checkpoint(model, path, **how)
    untrained = ""
    for warning in caught:
        text = str(warning.message)
        if warning.category is UserWarning and text.endswith("is untrained"):
            untrained = text
        elif notify is None:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        else:
            notify(f"{text.rstrip('.')}.")
    return report, untrained
