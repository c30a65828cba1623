"""Results of a run, which are written at its end, and returned if the run is repeated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from widekernel.engine import CheckpointStore, RunContext, RunFolder, RunFolderError, Trainer
from widekernel.engine.curves import save_curves
from widekernel.engine.metrics import Metric
from widekernel.engine.metrics_log import read_metrics
from widekernel.engine.rates import TIMING_KEYS
from widekernel.engine.task import Task
from widekernel.errors import CheckpointError
from widekernel.files import write_file
from widekernel.sparsity import save_masks
from widekernel.tasks.fingerprint import code_difference
from widekernel.tasks.saved import SavedModel, read_saved, save_model

_NOT_IN_SUMMARY = TIMING_KEYS | {"epoch", "lr"}


def summary_keys(task: Task, evaluated: tuple[str, ...] = ("",)) -> tuple[str, ...]:
    """Return the keys that every summary of a task has.

    Args:
        task: the task.
        evaluated: prefixes of the metrics; none if nothing is evaluated.
    """
    names = (*(metric.name for metric in task.metrics), "val_unreadable")
    return ("epochs", "step", "train_unreadable", *(f"{prefix}{name}" for prefix in evaluated for name in names))


@dataclass(frozen=True)
class RunResult:
    """Result of a finished run.

    Args:
        folder: folder of the run
        summary: final metrics
        was_finished: whether the run was finished before this call
        metrics: what the task measures
        other_code: if so, how the code that finished it differs from the present code; "" if it does not
    """

    folder: RunFolder
    summary: dict[str, Any]
    was_finished: bool
    metrics: tuple[Metric, ...]
    other_code: str = ""


def has_states(folder: RunFolder) -> bool:
    """Return whether a run that has begun in the folder has training states."""
    return folder.has_begun() and bool(CheckpointStore(folder.checkpoints).paths())


def earlier_result(averages: bool, evaluated: tuple[str, ...], task: Task, context: RunContext) -> RunResult | None:
    """Return the result of the run if it is finished and its model files are intact, or else `None`.

    Args:
        averages: whether the run keeps averaged weights.
        evaluated: prefixes of the metrics of an evaluation; none if nothing is evaluated.
        task: the task of the run.
        context: the run.

    Raises:
        CheckpointError: the data have changed since.
        RunFolderError: the summary is damaged, or a model file is, and there is no training state to write it from.
    """
    folder = context.folder
    summary = folder.read_summary(summary_keys(task, evaluated))
    if summary is None:
        return None
    folder.check_same_data(_data_of(summary, folder), context.fingerprint)
    if _lacks_models(averages, context):
        return None
    other_code = code_difference(summary.get("code"), context.code)
    return RunResult(folder, summary, was_finished=True, metrics=task.metrics, other_code=other_code)


def write_results(trainer: Trainer, saved: SavedModel) -> dict[str, Any]:
    """Write the models, masks, curves and summary of a run that has been trained, and return the summary.

    Raises:
        WidekernelError: a file cannot be written.
    """
    folder, metrics = trainer.context.folder, trainer.task.metrics
    rows = read_metrics(folder.metrics)
    summary = {
        "epochs": trainer.length.epochs,
        **_final_metrics(trainer, rows),
        "data": trainer.context.fingerprint,
        "code": trainer.context.code,
    }
    save_model(trainer.sparsity.finished(trainer.model), folder.model, saved)
    _write_sparsity(trainer)
    acceleration = trainer.components.acceleration.state()
    if acceleration is None:
        folder.acceleration.unlink(missing_ok=True)  # of a run that ended here before
    else:
        write_file(folder.acceleration, (json.dumps(acceleration, indent=1) + "\n").encode())
    if trainer.average is not None:
        save_model(trainer.average.module, folder.model_ema, saved)
    save_curves(rows, metrics, folder.curves)
    folder.write_summary(summary)
    return summary


def _final_metrics(trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of the last evaluation and the best one, or what the last row says if nothing is evaluated."""
    progress, deciding = trainer.progress, trainer.task.metrics[0].name
    if trainer.data.held_out is None:
        final = {"train_unreadable": len(progress.unreadable), **(rows[-1] if rows else {}), "step": progress.step}
        return {key: value for key, value in final.items() if key not in _NOT_IN_SUMMARY}
    name = f"{trainer.config.evaluated[0]}{deciding}"
    last = [row for row in rows if name in row][-1]
    return {
        **{key: value for key, value in last.items() if key not in _NOT_IN_SUMMARY},
        f"best_{deciding.removeprefix('val_')}": progress.best,
        "best_step": progress.best_step,
    }


def _data_of(summary: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Return the description of a finished run's data, which earlier versions stored in training states only."""
    if "data" not in summary and has_states(folder):
        return CheckpointStore(folder.checkpoints).load_latest()["data"]  # type: ignore[index]
    return summary.get("data", {})


def _lacks_models(averages: bool, context: RunContext) -> bool:
    """Return whether a finished run has to write its model files again.

    Raises:
        RunFolderError: it has to, but there is no training state left.
    """
    folder = context.folder
    expected = [folder.model, folder.model_ema] if averages else [folder.model]
    missing = [path for path in expected if not _is_complete(path)]
    if not missing:
        return False
    if not has_states(folder):
        raise RunFolderError(
            f"The run in {folder.path} is finished, but {missing[0].name} is missing or damaged, and there is no training "
            "state to write it from. Restore the file, or choose another --output."
        )
    context.reporter.message(f"{missing[0]} is missing or damaged; it is written again from the last training state.")
    return True


def _is_complete(path: Path) -> bool:
    """Return whether a model file exists, is not truncated, and has the form that training writes."""
    try:
        return read_saved(path).form == "training"
    except CheckpointError:
        return False


def _write_sparsity(trainer: Trainer) -> None:
    """Write the masks and the report of a sparse run beside its model."""
    report, folder = trainer.sparsity.report(), trainer.context.folder
    if report is None:
        return
    save_masks(trainer.sparsity.masks(), folder.masks)
    write_file(folder.sparsity, json.dumps(report.to_dict(), indent=1).encode())
    write_file(folder.sparsity_picture, report.picture())
