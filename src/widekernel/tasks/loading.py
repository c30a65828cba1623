"""Loading of the network that the user names: a run folder, a model file or a checkpoint."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from widekernel.data import DataConfig, Preprocessing
from widekernel.engine.checkpoint import CheckpointStore, load_state, step_of
from widekernel.engine.run_folder import RunFolder
from widekernel.engine.sparsification import restore_learned
from widekernel.errors import CheckpointError, ConfigError
from widekernel.tasks.assembly import build_model, pretrained_cfg
from widekernel.tasks.config import FIRST_TASK, TASK, wrong_task
from widekernel.tasks.foreign_checkpoint import Notify, load_weights
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.saved import SavedModel, build_saved, read_saved, restore_model, without_projection_weights
from widekernel.weights.catalog import find_checkpoint, is_published


def load(source: ModelSource, notify: Notify | None = None, task: str | None = FIRST_TASK) -> tuple[nn.Module, SavedModel]:
    """Load the network of `source`, in evaluation mode on the CPU, and its description.

    Args:
        source: the network that the user named.
        notify: receives messages for the user, for example that a run is unfinished.
        task: what the network must do; `None` accepts any.

    Raises:
        CheckpointError: there is nothing to load, it does not fit the model, or it has another task.
        ConfigError: the model's name is needed or unknown, or an option does not apply to the source.
    """
    model, saved = _load(source, notify)
    if task is not None and saved.task != task:
        raise CheckpointError(wrong_task(source.path, saved.task, task))
    return model, saved


def _load(source: ModelSource, notify: Notify | None) -> tuple[nn.Module, SavedModel]:
    if not source.path.exists():
        if is_published(str(source.path)):
            return _load_published(source)
        raise CheckpointError(
            f"{source.path} does not exist. Give a run folder, a checkpoint file, or a name that `widekernel weights` lists."
        )
    _check_options(source)
    if source.path.is_dir():
        return _load_run(source, notify)
    if source.model is None:
        if source.path.suffix == ".safetensors":
            return restore_model(source.path, source.weights)
        if _is_state(source.path):
            return _restore_state(load_state(source.path), source)
        raise ConfigError(
            f"{source.path} does not say which model it belongs to. Name it with "
            f"--model NAME, or write NAME={source.path} for a command without --model."
        )
    model = build_model(source.model, source.num_classes, source.model_args or {})
    report, untrained = load_weights(model, source.path, notify, weights=source.weights)
    if report.dropped:
        found = re.search(r"they are for (\d+) classes", untrained)
        number = f"Add --num_classes {found.group(1)}" if found else "Give the number of its classes with --num_classes"
        raise CheckpointError(
            f"The classifier in {source.path} ({', '.join(report.dropped)}) does not fit the {model.num_classes} outputs "
            f"of {source.model}, which would be untrained. {number}."
        )
    if untrained and notify is not None:
        notify(f"{untrained[0].upper()}{untrained[1:]}.")
    return model.eval(), SavedModel(
        name=source.model,
        model_args=source.model_args or {},
        form="training",
        num_classes=int(getattr(model, "num_classes", source.num_classes or 0)),
        class_names=(),
        preprocessing=Preprocessing.resolve(DataConfig(), pretrained_cfg(model)),
    )


def described_task(path: Path) -> str | None:
    """Return the task of the network in a run folder, a model file or a training state.

    Returns:
        the task; `None` for a folder or a file that does not describe its network, or if there is none.

    Raises:
        WidekernelError: the configuration of the run cannot be read.
    """
    if path.is_dir():
        folder = RunFolder(path)
        return str(folder.read_config().get(TASK, FIRST_TASK)) if folder.config.exists() else None
    try:
        if path.suffix == ".safetensors":
            return read_saved(path).task
        return str(load_state(path)["saved_model"].get(TASK, FIRST_TASK)) if path.exists() and _is_state(path) else None
    except (CheckpointError, KeyError, AttributeError):
        return None


def _load_published(source: ModelSource) -> tuple[nn.Module, SavedModel]:
    """Fetch the published checkpoint that `source` names, and load it into its network."""
    checkpoint = find_checkpoint(str(source.path))
    if source.model is not None or source.weights != "model":
        raise ConfigError(
            f"{checkpoint.name} states its model and holds one set of weights: leave --model and --weights out."
        )
    if checkpoint.task != "classification":
        raise CheckpointError(
            f"{checkpoint.name} cannot be used here: it is for {checkpoint.task}, and this command classifies."
        )
    model = build_model(checkpoint.name, None, {}, pretrained=True)
    preprocessing = Preprocessing.resolve(DataConfig(), pretrained_cfg(model))
    number = int(getattr(model, "num_classes", 0))
    return model.eval(), SavedModel(checkpoint.name, {}, "training", number, (), preprocessing)


def _is_state(path: Path) -> bool:
    try:
        return step_of(path) >= 0
    except CheckpointError:
        return False


def _load_run(source: ModelSource, notify: Notify | None) -> tuple[nn.Module, SavedModel]:
    folder = RunFolder(source.path)
    config = folder.read_config()
    averaged = source.weights == "ema"
    if averaged and (config.get("ema") or {}).get("decay") is None:
        raise CheckpointError(f"The run in {source.path} kept no averaged weights (ema.decay is null): use --weights model.")
    exported = folder.model_ema if averaged else folder.model
    if source.state == "last" and exported.exists():
        return restore_model(exported)
    return _load_state(folder, source, notify)


def _load_state(folder: RunFolder, source: ModelSource, notify: Notify | None) -> tuple[nn.Module, SavedModel]:
    store = CheckpointStore(folder.checkpoints)
    state = store.load_latest()
    if state is None:
        raise CheckpointError(
            f"The run in {folder.path} has no training states yet. Repeat the command after its first epoch."
        )
    config = folder.read_config()
    folder.check_own(state, config)
    done, total = state["progress"]["step"], state.get("total_steps")  # states of version 0.5 lack the latter
    if notify is not None and done != total and not folder.summary.exists():
        notify(f"The run in {folder.path} is unfinished: {done} of {total or '?'} steps are done.")
    if source.state == "best":
        best = state["progress"]["best_step"]
        if best is None:
            raise CheckpointError(
                f"The run in {folder.path} has no best state: it has not been evaluated yet, or every result was NaN. "
                "Use --state last."
            )
        state = store.load_step(best)
    return _restore_state(state, source)


def _restore_state(state: dict[str, Any], source: ModelSource) -> tuple[nn.Module, SavedModel]:
    try:
        saved = SavedModel.from_dict(state["saved_model"])
        weights = state["ema" if source.weights == "ema" else "model"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The training state in {source.path} is incomplete: {error!r}.") from error
    if weights is None:
        raise CheckpointError(f"The training state in {source.path} holds no averaged weights: use --weights model.")
    model = build_saved(saved, str(source.path))
    return restore_learned(model, without_projection_weights(weights), state.get("sparsity")).eval(), saved


def _check_options(source: ModelSource) -> None:
    """Raise a `ConfigError` for an option that does not apply to this kind of source."""
    if source.state != "last" and not source.path.is_dir():
        raise ConfigError(f"--state chooses among the weights of a run folder, but {source.path} is a file.")
    given = {"--model": source.model, "--num_classes": source.num_classes, "--model_args": source.model_args or None}
    useless = [option for option, value in given.items() if value is not None]
    if useless and source.path.is_dir():
        raise ConfigError(f"{' and '.join(useless)} cannot be used with a run folder, which states its model: leave it out.")
    if useless and source.model is None:
        raise ConfigError(
            f"{' and '.join(useless)} describes the model of a checkpoint that does not name it: add --model NAME."
        )
