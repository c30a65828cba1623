"""Creation of the task of a classification run: with a teacher, or without."""

from __future__ import annotations

from widekernel.tasks.classification.config import TrainConfig
from widekernel.tasks.classification.distillation import Distillation
from widekernel.tasks.classification.task import Classification
from widekernel.tasks.classification.teacher import load_teacher
from widekernel.tasks.foreign_checkpoint import Notify
from widekernel.tasks.saved import SavedModel


def create_task(config: TrainConfig, saved: SavedModel, channels: int, notify: Notify) -> Classification:
    """Create the configured task, and load its teacher if it has one.

    Args:
        config: settings of the run.
        saved: description of the network that is trained.
        channels: number of image channels that the network takes.
        notify: receives messages for the user.

    Raises:
        CheckpointError: the teacher's weights are missing, or do not fit.
        ConfigError: the teacher's model is unknown, or takes other images.
        DataError: the teacher does not know a class of the data.
    """
    settings = config.augment, config.label_smoothing, saved.num_classes
    if not config.distillation.is_on:
        return Classification(*settings)
    teacher = load_teacher(config.distillation.teacher, saved.class_names, saved.preprocessing, notify)
    teacher.check_channels(channels)
    return Distillation(*settings, config.distillation, teacher)
