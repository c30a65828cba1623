"""What the tasks of dense prediction have in common in a run: a network on a backbone, from a checkpoint of either."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from typing_extensions import override

from widekernel.data import BatchPlan, EvaluationLoader, EvaluationSamples, LoaderOptions, Preprocessing
from widekernel.data.config import LoadingConfig
from widekernel.data.seeding import MODEL_STREAM, scoped_seed
from widekernel.engine.autocast import make_autocast
from widekernel.errors import CheckpointError, ConfigError
from widekernel.models.checkpoint.reader import read_checkpoint
from widekernel.tasks.assembly import pretrained_cfg
from widekernel.tasks.checks import check_optimizer, check_start
from widekernel.tasks.foreign_checkpoint import Notify, load_weights
from widekernel.tasks.network_config import BackboneConfig
from widekernel.tasks.run_parts import RunParts, Sources
from widekernel.weights.catalog import find_checkpoint, is_published


class DenseParts(RunParts):
    """What every task of dense prediction brings to a run."""

    @abstractmethod
    def network(self, num_classes: int, pretrained: bool) -> nn.Module:
        """Build the network with initial weights, or with timm's for the backbone.

        Raises:
            ConfigError: there is no such backbone, or it does not accept its arguments.
        """

    def check_network(self) -> None:
        """Raise what the construction of the network would raise, without its weights: it takes little memory and time."""
        classes = 2
        try:
            with torch.device("meta"):
                network: Any = self.network(classes, False)
        except Exception:
            network = self.network(classes, False)  # only an error that also occurs with weights counts
        if self.config.model.grad_checkpointing:
            network.backbone.set_grad_checkpointing(True)

    @override
    def check(self, plan: BatchPlan, device: torch.device, starts: bool) -> None:
        make_autocast(self.config.loop.precision, device)
        with scoped_seed(MODEL_STREAM, self.config.seed):
            self.check_network()
        check_optimizer(self.config.optimizer)
        if starts:
            check_start(self.config)

    @override
    def notes(self, sources: Sources, starts: bool) -> list[str]:
        return [note for source in sources if source is not None for note in source.notes]

    @override
    def build(self, sources: Sources, starts: bool) -> nn.Module:
        config: BackboneConfig = self.config.model
        with scoped_seed(MODEL_STREAM, self.config.seed):
            network: Any = self.network(len(sources[0].class_names), config.pretrained and starts)
        if config.weights is not None and starts:
            load_dense_weights(network, config.weights, config.load, self.notify)
        if config.grad_checkpointing:
            network.backbone.set_grad_checkpointing(True)
        return network  # type: ignore[no-any-return]

    @override
    def evaluation_loader(self, samples: EvaluationSamples, options: LoaderOptions, plan: BatchPlan) -> EvaluationLoader:
        # Published results are those of single images, which are not padded to the size of others.
        return EvaluationLoader(samples, self.config.loop.eval_batch_size or 1, options, self.processes.shard)


def load_dense_weights(network: Any, weights: str, load: str, notify: Notify) -> None:
    """Load a checkpoint of a classifier into the backbone of a network, or one of the whole network, and report it.

    Args:
        network: a network with a child `backbone`.
        weights: the file, or the name of a published checkpoint.
        load: auto, or backbone for the backbone alone.
        notify: receives messages for the user.

    Raises:
        CheckpointError: the file cannot be read, or does not fit.
    """
    whole = load == "auto" and is_whole(network, weights)
    try:
        report, _ = load_weights(network if whole else network.backbone, weights, notify)
    except CheckpointError as error:
        if not whole:
            raise
        raise CheckpointError(
            f"{error}\nFor other classes or heads, set model.load to backbone: the heads then start anew."
        ) from error
    what = "the whole network" if whole else "the backbone; the heads start anew"
    notify(f"{report}\n  loaded into {what}")


def is_whole(network: nn.Module, weights: str) -> bool:
    """Return whether a checkpoint holds heads of a network for dense prediction."""
    if not Path(weights).exists() and is_published(weights):
        return find_checkpoint(weights).task != "classification"
    heads = tuple(f"{name}." for name, _ in network.named_children() if name != "backbone")
    return any(key.startswith(heads) for key in read_checkpoint(weights).state)


def dense_preprocessing(config: LoadingConfig, network: Any, size: int) -> Preprocessing:
    """Return how the images of a network for dense prediction are normalized.

    Args:
        config: settings of the data, which come before those of the backbone.
        network: a network with a child `backbone`.
        size: side, in pixels, of a usual image, for checks on random ones.
    """
    own = pretrained_cfg(network.backbone)
    mean = config.mean or own.get("mean") or IMAGENET_DEFAULT_MEAN
    std = config.std or own.get("std") or IMAGENET_DEFAULT_STD
    return Preprocessing(size, _triple(mean), _triple(std), "bilinear", 1.0)


def _triple(values: Any) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ConfigError(f"The backbone takes images of {len(values)} channels, but images are read with 3: set data.mean.")
    first, second, third = (float(value) for value in values)
    return first, second, third
