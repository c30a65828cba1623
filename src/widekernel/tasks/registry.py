"""The tasks by name, and where their parts are; these are imported when they are used, because some need PyTorch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from widekernel.settings import require_one_of
from widekernel.tasks.config import FIRST_TASK, RunConfig


@dataclass(frozen=True)
class TaskEntry:
    """Where the parts of a task are.

    Args:
        trained: what a run trains, with an article
        settings: class of the settings of a run, as MODULE:CLASS
        train: function that trains with such settings and a reporter, as MODULE:FUNCTION
    """

    trained: str
    settings: str
    train: str

    def settings_class(self) -> type[RunConfig]:
        """Return the class of the settings of a run; this does not import PyTorch for classification."""
        found = _import(self.settings)
        assert isinstance(found, type)
        return found

    def train_function(self) -> Any:
        """Return the function that trains."""
        return _import(self.train)


TASKS = {
    FIRST_TASK: TaskEntry(
        "a classifier",
        "widekernel.tasks.classification.config:TrainConfig",
        "widekernel.tasks.classification.run:train",
    ),
    "segmentation": TaskEntry(
        "a network for semantic segmentation",
        "widekernel.tasks.segmentation.config:SegmentationConfig",
        "widekernel.tasks.segmentation.run:train",
    ),
    "detection": TaskEntry(
        "an object detector",
        "widekernel.tasks.detection.config:DetectionConfig",
        "widekernel.tasks.detection.run:train",
    ),
}
"""Everything that `widekernel train --task` can train."""


def task_entry(name: object, key: str = "task") -> TaskEntry:
    """Return where the parts of the task `name` are; `key` names the setting in messages.

    Raises:
        ConfigError: there is no such task.
    """
    require_one_of(key, name, TASKS)
    return TASKS[str(name)]


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
