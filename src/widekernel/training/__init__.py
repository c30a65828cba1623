"""Training loop, with its settings, training states, metrics and run folder."""

from typing import TYPE_CHECKING

from widekernel.lazy import attach

if TYPE_CHECKING:
    from widekernel.training.checkpoint import CheckpointStore
    from widekernel.training.config import CheckpointConfig, EmaConfig, LoopConfig, OptimizerConfig, ScheduleConfig
    from widekernel.training.error_context import TrainingError
    from widekernel.training.loop import Trainer
    from widekernel.training.objective import Objective
    from widekernel.training.processes import Processes
    from widekernel.training.reporter import Reporter, SilentReporter
    from widekernel.training.run_context import RunContext
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
    "RunContext",
    "RunFolder",
    "RunFolderError",
    "ScheduleConfig",
    "SilentReporter",
    "Trainer",
    "TrainingError",
]

_WHERE = {
    "CheckpointConfig": "widekernel.training.config",
    "CheckpointStore": "widekernel.training.checkpoint",
    "EmaConfig": "widekernel.training.config",
    "LoopConfig": "widekernel.training.config",
    "Objective": "widekernel.training.objective",
    "OptimizerConfig": "widekernel.training.config",
    "Processes": "widekernel.training.processes",
    "Reporter": "widekernel.training.reporter",
    "RunFolder": "widekernel.training.run_folder",
    "RunFolderError": "widekernel.training.run_folder",
    "ScheduleConfig": "widekernel.training.config",
    "SilentReporter": "widekernel.training.reporter",
    "RunContext": "widekernel.training.run_context",
    "Trainer": "widekernel.training.loop",
    "TrainingError": "widekernel.training.error_context",
}
_MOVED = {"Surroundings": "widekernel.training:RunContext"}
__getattr__, __dir__ = attach(__name__, _WHERE, _MOVED)
