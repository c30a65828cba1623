"""The training loop and what it keeps: configuration, checkpoints, metrics and the run folder."""

from widekernel.training.checkpoint import CheckpointStore
from widekernel.training.config import CheckpointConfig, EmaConfig, LoopConfig, OptimizerConfig, ScheduleConfig
from widekernel.training.loop import Objective, Surroundings, Trainer, TrainingError
from widekernel.training.processes import Processes
from widekernel.training.progress import Reporter, SilentReporter
from widekernel.training.run_folder import RunFolder, RunFolderError

__all__ = [
    "CheckpointConfig",
    "CheckpointStore",
    "EmaConfig",
    "LoopConfig",
    "Objective",
    "OptimizerConfig",
    "Processes",
    "Reporter",
    "RunFolder",
    "RunFolderError",
    "ScheduleConfig",
    "SilentReporter",
    "Surroundings",
    "Trainer",
    "TrainingError",
]
