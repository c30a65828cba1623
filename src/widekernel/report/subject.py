"""The network that a report is about: the module, its description, and the run that trained it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from widekernel.engine.run_folder import RunFolder
from widekernel.errors import CheckpointError
from widekernel.models.base import StagedConvNet
from widekernel.tasks.image_channels import input_channels
from widekernel.tasks.loading import load
from widekernel.tasks.model_source import ModelSource, Weights
from widekernel.tasks.named_network import label_of, load_named
from widekernel.tasks.saved import SavedModel
from widekernel.weights.catalog import is_published


@dataclass(frozen=True)
class Subject:
    """A network, and what is known about where it comes from.

    Attributes:
        text: what the user named it by.
        label: a short name.
        model: the network, in evaluation mode on the CPU.
        saved: description of the network.
        pretrained: whether a registered model was given timm's pretrained weights.
        weights: which weights of a run: the trained ones, or their moving average.
        run: folder of the run that trained it, or None.
    """

    text: str
    label: str
    model: nn.Module
    saved: SavedModel
    pretrained: bool = False
    weights: Weights = "model"
    run: RunFolder | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings of the run; empty without one."""
        return {} if self.run is None else self.run.read_config()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The final results of the run; empty while it is unfinished, and without a run."""
        return {} if self.run is None else self.run.read_summary() or {}

    @property
    def is_ours(self) -> bool:
        """Whether the network belongs to this library."""
        return isinstance(self.model, StagedConvNet)

    @property
    def is_folded(self) -> bool:
        """Whether the network was loaded in its folded form."""
        return self.saved.form == "folded"

    @property
    def has_trained_weights(self) -> bool:
        """Whether the weights are not random."""
        return self.run is not None or self.file is not None or self.pretrained or is_published(self.text)

    @property
    def file(self) -> Path | None:
        """File with the weights; None if they have none that the user named."""
        if self.run is not None and Path(self.text).is_dir():
            found = self.run.model_ema if self.weights == "ema" else self.run.model
            return found if found.is_file() else None
        _, separator, file = self.text.partition("=")
        path = Path(file if separator and not Path(self.text).exists() else self.text)
        return path if path.is_file() else None

    def input_size(self, side: int | None = None) -> tuple[int, int, int]:
        """Return channels, height and width of the network's own input, or of a square one of `side` pixels."""
        pixels = side or self.saved.preprocessing.input_size
        return input_channels(self.model), pixels, pixels


def open_subject(
    text: str, pretrained: bool = False, weights: Weights = "model", notify: Callable[[str], None] | None = None
) -> Subject:
    """Load the network that `text` names: a registered model, published checkpoint, run folder, file, or NAME=FILE.

    Args:
        text: the name.
        pretrained: whether a registered model has timm's pretrained weights.
        weights: which weights of a run folder or training state.
        notify: receives messages for the user.

    Raises:
        CheckpointError: there is no such network, or its weights do not fit.
        ConfigError: the model is unknown, or its weights cannot be reached.
        RunFolderError: the settings of the run cannot be read.
    """
    path = Path(text)
    if path.exists():
        source = ModelSource(path, weights=weights)
        model, saved = load(source, notify)
        return Subject(text, label_of(text), model, saved, weights=weights, run=source.run_folder())
    if weights != "model":
        raise CheckpointError(
            f"{text} holds one set of weights: --weights {weights} is for run folders and training states."
        )
    model, saved = load_named(text, pretrained, notify)
    return Subject(text, label_of(text), model, saved, pretrained=pretrained)
