"""The network that a text names: a registered model, a published checkpoint, a run folder, a file, or NAME=FILE."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from widekernel.data import DataConfig, Preprocessing
from widekernel.data.paths import expand_path
from widekernel.errors import CheckpointError, ConfigError
from widekernel.tasks.assembly import build_model, check_model_name, pretrained_cfg
from widekernel.tasks.config import FIRST_TASK
from widekernel.tasks.foreign_checkpoint import Notify
from widekernel.tasks.loading import described_task, load
from widekernel.tasks.model_source import ModelSource, Weights
from widekernel.tasks.saved import SavedModel
from widekernel.weights.catalog import is_published


def load_named(
    text: str,
    pretrained: bool = False,
    notify: Notify | None = None,
    task: str | None = FIRST_TASK,
    weights: Weights = "model",
    state: Literal["last", "best"] = "last",
) -> tuple[nn.Module, SavedModel]:
    """Return the network that `text` names, in evaluation mode on the CPU, and its description.

    Args:
        text: name of a registered model, with random weights unless `pretrained`; name of a published checkpoint; run
            folder; checkpoint file that describes its model; or NAME=FILE for another file with the weights of model NAME.
        pretrained: whether a registered model has timm's pretrained weights.
        notify: receives messages for the user.
        task: what the network must do; `None` accepts any. A registered model classifies.
        weights: the weights themselves, or their moving average.
        state: which weights of a run folder: the last ones, or those with the best evaluation.

    Raises:
        CheckpointError: there is no such network, its weights do not fit, or it has another task.
        ConfigError: the model NAME is unknown, its weights cannot be reached, or it has no such choice of weights.
    """
    name, path = split_name(text)
    if name is not None:
        check_model_name(name)
        if described_task(path) in (None, FIRST_TASK):
            return load(ModelSource(path, weights, state, model=name), notify, task)
        model, saved = load(ModelSource(path, weights, state), notify, task)
        check_backbone(name, path, saved)
        return model, saved
    if Path(text).exists() or is_published(text):
        return load(ModelSource(Path(text), weights, state), notify, task)
    if "/" in text or Path(text).suffix in (".safetensors", ".pth", ".pt"):
        raise CheckpointError(f"{text} does not exist. Give a run folder, a checkpoint file, or the name of a model.")
    if weights != "model" or state != "last":
        raise ConfigError(f"{text} is the name of a model, which has one set of weights: leave --weights and --state out.")
    model = build_model(text, None, {}, pretrained)
    preprocessing = Preprocessing.resolve(DataConfig(), pretrained_cfg(model))
    return model.eval(), SavedModel(text, {}, "training", int(getattr(model, "num_classes", 0)), (), preprocessing)


def split_name(text: str) -> tuple[str | None, Path]:
    """Return NAME and FILE of a text NAME=FILE; of any other text, `None` and the text as a path."""
    name, separator, file = text.partition("=")
    if separator and not Path(text).exists():
        return name, Path(expand_path("source", file))
    return None, Path(text)


def check_backbone(name: str, path: Path, saved: SavedModel) -> None:
    """Raise a `CheckpointError` unless the network in the file `path` is built on the model `name`."""
    if saved.name != name:
        raise CheckpointError(f"{path} holds a network on {saved.name}, not on {name}: leave {name}= out.")


def label_of(text: str) -> str:
    """Return a short name for what `text` names, for tables and files."""
    name, path = split_name(text)
    if name is not None:
        return name
    if not path.exists():
        return text
    if path.is_dir() or path.stem in ("model", "model_ema"):
        return (path if path.is_dir() else path.resolve().parent).resolve().name
    return path.stem
