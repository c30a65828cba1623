"""The trained network from which another one learns."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from widekernel.data import DataConfig, Preprocessing
from widekernel.errors import CheckpointError, ConfigError, DataError
from widekernel.tasks.assembly import build_model, pretrained_cfg
from widekernel.tasks.classification.class_mapping import class_mapping
from widekernel.tasks.classification.distillation_config import TeacherConfig
from widekernel.tasks.classification.feature_tap import FeatureTap
from widekernel.tasks.foreign_checkpoint import Notify
from widekernel.tasks.image_channels import input_channels
from widekernel.tasks.loading import load
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.saved import SavedModel
from widekernel.transforms import accelerate, fold

_OPTIONS = {"model": "name", "model_args": "args", "num_classes": "num_classes"}


class Teacher:
    """A trained network that answers for the classes of the data; it is folded, accelerated, and never trained.

    Only its depthwise layers are accelerated, because these are chosen without measurements: a resumed run has the same
    teacher, bit for bit.

    Args:
        model: the network, which becomes the teacher's own
        saved: its description
        classes: class names of the data, in their order
        student: preprocessing of the images that the teacher is shown

    Raises:
        DataError: the network does not know a class of the data.
        ConfigError: the images cannot be converted to what the network was trained on.
    """

    def __init__(self, model: nn.Module, saved: SavedModel, classes: tuple[str, ...], student: Preprocessing) -> None:
        self.name, self.digest = saved.name, _digest(model)
        self._channels = input_channels(model)
        folded = fold(model.eval()) if saved.form == "training" else model.eval()
        self._model, _ = accelerate(folded.requires_grad_(False), pointwise=False)
        try:
            mapping = class_mapping(saved, classes)
        except DataError as error:
            raise DataError(f"The teacher {saved.name} does not fit the data: {error}") from error
        self._mapping = None if mapping is None else torch.tensor(mapping)
        self._rescaling = self._rescale(student, saved.preprocessing)
        self._tap: FeatureTap | None = None

    def to(self, device: torch.device, memory_format: torch.memory_format) -> Teacher:
        """Move the network to a device and to a memory layout, and return this teacher."""
        self._model = self._model.to(device).to(memory_format=memory_format)  # type: ignore[call-overload]
        if self._mapping is not None:
            self._mapping = self._mapping.to(device)
        return self

    def check_channels(self, channels: int) -> None:
        """Raise a `ConfigError` unless the teacher takes images of so many channels."""
        if self._channels != channels:
            raise ConfigError(
                f"The teacher {self.name} takes images of {self._channels} channel(s), but the network takes {channels}. "
                "Choose another teacher, or set model.args.in_chans."
            )

    def tap_features(self) -> int:
        """Keep the features in front of the classifier from now on, and return the number of their channels."""
        self._tap = FeatureTap(self._model, only_in_training=False)
        return self._tap.width

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits for the classes of the data, and the features if they are tapped, without gradients.

        Args:
            images: `(n, channels, height, width)`, normalized as for the student.
        """
        with torch.no_grad():
            if self._rescaling is not None:
                factor, offset = (part.to(images) for part in self._rescaling)
                images = images * factor + offset
            logits = self._model(images)
        if self._mapping is not None:
            logits = logits[:, self._mapping]
        return logits, None if self._tap is None else self._tap.take()

    def _rescale(self, student: Preprocessing, own: Preprocessing) -> tuple[Tensor, Tensor] | None:
        """Return the factor and offset that turn normalized images of the student into those of the teacher."""
        if student.mean == own.mean and student.std == own.std:
            return None
        if self._channels != len(own.mean):
            raise ConfigError(
                f"The teacher {self.name} was trained with data.mean {own.mean} and data.std {own.std}, but the network "
                f"gets {student.mean} and {student.std}. With {self._channels} channel(s), both must be the same."
            )
        mean, std, own_mean, own_std = map(_per_channel, (student.mean, student.std, own.mean, own.std))
        return (std / own_std).float(), ((mean - own_mean) / own_std).float()


def load_teacher(
    config: TeacherConfig, classes: tuple[str, ...], student: Preprocessing, notify: Notify | None = None
) -> Teacher:
    """Load the configured teacher.

    Raises:
        CheckpointError: its weights are missing, or do not fit.
        ConfigError: its model is unknown, or an option does not apply.
        DataError: it does not know a class of the data.
    """
    if config.pretrained:
        assert config.name is not None
        model = build_model(config.name, config.num_classes, config.args, pretrained=True)
        preprocessing = Preprocessing.resolve(DataConfig(), pretrained_cfg(model))
        number = int(getattr(model, "num_classes", 0))
        saved = SavedModel(config.name, dict(config.args), "training", number, (), preprocessing)
    else:
        assert config.weights is not None
        source = ModelSource(
            Path(config.weights),
            weights="ema" if config.averaged else "model",
            model=config.name,
            model_args=dict(config.args) or None,
            num_classes=config.num_classes,
        )
        try:
            model, saved = load(source, notify)
        except (CheckpointError, ConfigError) as error:
            raise type(error)(f"The teacher (distillation.teacher) cannot be loaded: {_own_options(str(error))}") from error
    return Teacher(model, saved, classes, student)


def _own_options(text: str) -> str:
    """Return an error message with the options of commands that load one network replaced by those of the teacher."""
    return re.sub(r"--(model_args|model|num_classes)\b", lambda found: f"--distillation.teacher.{_OPTIONS[found[1]]}", text)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float64).view(1, -1, 1, 1)


def _digest(model: nn.Module) -> str:
    """Return a digest of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
