"""Training loop, with its settings, training states, metrics and run folder."""

from typing import TYPE_CHECKING

from widekernel.lazy import attach

if TYPE_CHECKING:
    from widekernel.engine.checkpoint import CheckpointStore
    from widekernel.engine.config import (
        CheckpointConfig,
        EmaConfig,
        EvaluationConfig,
        FaultConfig,
        LoopConfig,
        OptimizerConfig,
        ScheduleConfig,
    )
    from widekernel.engine.error_context import TrainingError
    from widekernel.engine.loop import Trainer
    from widekernel.engine.metrics import Metric
    from widekernel.engine.processes import Processes
    from widekernel.engine.reporter import Reporter, RunLength, SilentReporter
    from widekernel.engine.run_context import RunContext
    from widekernel.engine.run_folder import RunFolder, RunFolderError
    from widekernel.engine.step_batches import RunData
    from widekernel.engine.task import Evaluator, Position, Task

__all__ = [
    "CheckpointConfig",
    "CheckpointStore",
    "EmaConfig",
    "EvaluationConfig",
    "Evaluator",
    "FaultConfig",
    "LoopConfig",
    "Metric",
    "OptimizerConfig",
    "Position",
    "Processes",
    "Reporter",
    "RunContext",
    "RunData",
    "RunFolder",
    "RunFolderError",
    "RunLength",
    "ScheduleConfig",
    "SilentReporter",
    "Task",
    "Trainer",
    "TrainingError",
]

_WHERE = {
    "CheckpointConfig": "widekernel.engine.config",
    "CheckpointStore": "widekernel.engine.checkpoint",
    "EmaConfig": "widekernel.engine.config",
    "LoopConfig": "widekernel.engine.config",
    "EvaluationConfig": "widekernel.engine.config",
    "Evaluator": "widekernel.engine.task",
    "FaultConfig": "widekernel.engine.config",
    "Metric": "widekernel.engine.metrics",
    "Position": "widekernel.engine.task",
    "RunData": "widekernel.engine.step_batches",
    "RunLength": "widekernel.engine.reporter",
    "Task": "widekernel.engine.task",
    "OptimizerConfig": "widekernel.engine.config",
    "Processes": "widekernel.engine.processes",
    "Reporter": "widekernel.engine.reporter",
    "RunFolder": "widekernel.engine.run_folder",
    "RunFolderError": "widekernel.engine.run_folder",
    "ScheduleConfig": "widekernel.engine.config",
    "SilentReporter": "widekernel.engine.reporter",
    "RunContext": "widekernel.engine.run_context",
    "Trainer": "widekernel.engine.loop",
    "TrainingError": "widekernel.engine.error_context",
}
_MOVED = {"Surroundings": "widekernel.engine:RunContext"}
__getattr__, __dir__ = attach(__name__, _WHERE, _MOVED)
