"""The network for segmentation or detection that the user names, and how its images are normalized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from widekernel.data import Preprocessing
from widekernel.errors import CheckpointError, ConfigError
from widekernel.tasks.dense_parts import dense_preprocessing, is_whole
from widekernel.tasks.foreign_checkpoint import Notify, load_weights
from widekernel.tasks.loading import described_task, load
from widekernel.tasks.model_source import ModelSource
from widekernel.tasks.networks import build_detector, build_segmenter
from widekernel.tasks.saved import SavedModel


@dataclass(frozen=True)
class DenseNetwork:
    """A network for dense prediction, in evaluation mode on the CPU.

    Args:
        model: the network
        preprocessing: how its images are normalized
        saved: its description; `None` for a file that does not describe its network
    """

    model: nn.Module
    preprocessing: Preprocessing
    saved: SavedModel | None


def load_dense_network(
    task: str, source: ModelSource, settings: dict[str, Any], class_count: Callable[[], int], notify: Notify
) -> DenseNetwork:
    """Load the network that `source` describes, or else that of the settings with the weights of `source`.

    Args:
        task: what the network does.
        source: the network that the user named.
        settings: sections `data` and `model`; the latter counts for a file that does not describe its network.
        class_count: returns the number of classes of such a network.
        notify: receives messages for the user.

    Raises:
        CheckpointError: there is nothing to load, it does not fit, it has another task, or it has no heads.
        ConfigError: the network of the settings cannot be built, or there is no such choice of weights.
    """
    data = settings["data"]
    if described_task(source.path) is not None:
        model, saved = load(source, notify, task)
        shown = saved.preprocessing
        return DenseNetwork(model, replace(shown, mean=data.mean or shown.mean, std=data.std or shown.std), saved)
    if source.state != "last":
        raise ConfigError(f"--state chooses among the weights of a run folder, but {source.path} is none: leave it out.")
    config, classes = settings["model"], class_count()
    network: Any = (
        build_segmenter(config, classes) if task == "segmentation" else build_detector(config, classes, data.masks)
    )
    path = str(source.path)
    if not is_whole(network, path):
        raise CheckpointError(
            f"{path} holds no heads for {task}, so it predicts nothing: train with --model.weights {path}."
        )
    report, _ = load_weights(network, path, notify, weights=source.weights)
    notify(str(report))
    return DenseNetwork(network.eval(), dense_preprocessing(data, network, 1), None)
