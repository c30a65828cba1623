"""Self-contained model files: weights with the model's name and arguments, the classes and the preprocessing."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import Tensor, nn

import widekernel
from widekernel.data.preprocess import Preprocessing
from widekernel.errors import CheckpointError
from widekernel.sparsity import semi_structured
from widekernel.tasks.config import FIRST_TASK
from widekernel.tasks.networks import UnknownTaskError, build_network
from widekernel.tensor_files import DESCRIPTION, read_tensors, tensor_file

FORMAT = 1

PROJECTION = "distillation_projection"
"""Child that training with a teacher's features adds to a network; model files do not contain it."""


def without_projection_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a training state without those that only distillation uses."""
    return {name: value for name, value in weights.items() if not name.startswith(f"{PROJECTION}.")}


@dataclass(frozen=True)
class SavedModel:
    """Description of the model that a model file contains.

    Args:
        name: registered model name
        model_args: arguments of the model besides `num_classes`
        form: `training`, or `folded` for the merged network
        num_classes: number of outputs
        class_names: names in the order of the outputs; empty if unknown
        preprocessing: settings that turn an image into an input
        task: what the network does, as in `widekernel train --task`; files of earlier versions, which do not state it,
            classify
        details: what else the task needs to build and evaluate the network, such as the settings of its heads
    """

    name: str
    model_args: dict[str, Any]
    form: Literal["training", "folded"]
    num_classes: int
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    task: str = FIRST_TASK
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the description as values for JSON."""
        values = asdict(self)
        values["model"] = values.pop("name")
        values["data"] = values.pop("preprocessing")
        return {"format": FORMAT, **values, "class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SavedModel":
        """Rebuild the description from the values that `to_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: it is incomplete or damaged.
        """
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r} is unknown; this version reads format {FORMAT}")
        if values["form"] not in ("training", "folded"):
            raise ValueError(f"the form is {values['form']!r}, but must be training or folded")
        return cls(
            name=values["model"],
            model_args=dict(values["model_args"]),
            form=values["form"],
            num_classes=int(values["num_classes"]),
            class_names=tuple(values["class_names"]),
            preprocessing=Preprocessing.from_dict(values["data"]),
            task=str(values.get("task", FIRST_TASK)),
            details=dict(values.get("details", {})),
        )

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None, path: Path) -> "SavedModel":
        """Read the description from the metadata of the file `path`.

        Raises:
            CheckpointError: the file does not describe its model, or does so in an unknown format.
        """
        if DESCRIPTION not in (metadata or {}):
            raise CheckpointError(f"{path} does not describe its model. Give the model's name with --model.")
        try:
            return cls.from_dict(json.loads((metadata or {})[DESCRIPTION]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"The description of the model in {path} is damaged: {error!r}.") from error


def save_model(model: nn.Module, path: Path, saved: SavedModel) -> None:
    """Write the weights of `model` with their description, atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    widekernel.save_checkpoint(model, path, metadata=saved.to_dict())


def read_saved(path: Path) -> SavedModel:
    """Read only the description of the model in a safetensors file.

    Raises:
        CheckpointError: the file is missing, damaged, or does not describe its model.
    """
    try:
        with tensor_file(path) as file:
            metadata = file.metadata()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}).") from error
    return SavedModel.from_metadata(metadata, path)


def build_saved(saved: SavedModel, source: str) -> nn.Module:
    """Build the network that `saved` describes, in its training form and with initial weights.

    Args:
        saved: the description.
        source: where it was read, for messages.

    Raises:
        CheckpointError: this version does not know its task, or the settings of its heads.
        ConfigError: the model it names is not registered.
    """
    try:
        return build_network(saved.task, saved.name, saved.num_classes, saved.model_args, saved.details)
    except UnknownTaskError as error:
        raise CheckpointError(f"{source} holds a network for {error}") from error


def restore_model(path: Path, weights: Literal["model", "ema"] = "model") -> tuple[nn.Module, SavedModel]:
    """Load the model of a safetensors file, in its training or folded form, on the CPU.

    The file must have been written by `save_model`, or by `save_sparse` with the same description.

    Raises:
        CheckpointError: the file cannot be read, or does not fit the model it names.
        ConfigError: the model it names is not registered.
    """
    saved = read_saved(path)
    model = build_saved(saved, str(path))
    if saved.form == "folded":
        model = widekernel.fold(model.eval())
    if weights == "ema":
        raise CheckpointError(f"{path} holds one set of weights. Give the file with the averaged ones, or the run folder.")
    if semi_structured.is_sparse_file(path):
        semi_structured.load_sparse(model, path)
        return model.eval(), saved
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the {saved.form} form of {saved.name}: {error}") from error
    return model.eval(), saved
