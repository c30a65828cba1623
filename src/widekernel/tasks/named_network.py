"""The network that a text names: a registered model, a published checkpoint, a run folder, a file, or NAME=FILE."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from widekernel.data import DataConfig, Preprocessing
from widekernel.data.paths import expand_path
from widekernel.errors import CheckpointError
from widekernel.tasks.assembly import build_model, check_model_name, pretrained_cfg
from widekernel.tasks.foreign_checkpoint import Notify
from widekernel.tasks.loading import load
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.saved import SavedModel
from widekernel.weights.catalog import is_published


def load_named(text: str, pretrained: bool = False, notify: Notify | None = None) -> tuple[nn.Module, SavedModel]:
    """Return the network that `text` names, in evaluation mode on the CPU, and its description.

    Args:
        text: name of a registered model, with random weights unless `pretrained`; name of a published checkpoint; run
            folder; checkpoint file that describes its model; or NAME=FILE for another file with the weights of model NAME.
        pretrained: whether a registered model has timm's pretrained weights.
        notify: receives messages for the user.

    Raises:
        CheckpointError: there is no such network, or its weights do not fit.
        ConfigError: the model NAME is unknown, or its weights cannot be reached.
    """
    name, separator, file = text.partition("=")
    if separator and not Path(text).exists():
        check_model_name(name)
        return load(ModelSource(Path(expand_path("source", file)), model=name), notify)
    if Path(text).exists() or is_published(text):
        return load(ModelSource(Path(text)), notify)
    if "/" in text or Path(text).suffix in (".safetensors", ".pth", ".pt"):
        raise CheckpointError(f"{text} does not exist. Give a run folder, a checkpoint file, or the name of a model.")
    model = build_model(text, None, {}, pretrained)
    preprocessing = Preprocessing.resolve(DataConfig(), pretrained_cfg(model))
    return model.eval(), SavedModel(text, {}, "training", int(getattr(model, "num_classes", 0)), (), preprocessing)


def label_of(text: str) -> str:
    """Return a short name for what `text` names, for tables and files."""
    name, separator, _ = text.partition("=")
    if separator and not Path(text).exists():
        return name
    path = Path(text)
    if not path.exists():
        return text
    if path.is_dir() or path.stem in ("model", "model_ema"):
        return (path if path.is_dir() else path.resolve().parent).resolve().name
    return path.stem
