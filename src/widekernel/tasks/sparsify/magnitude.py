"""Sparsification of a trained network by magnitude, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.errors import ConfigError
from widekernel.settings import comma_separated
from widekernel.sparsity import DynamicSparsity, DynamicSparsityConfig, SparsityReport, semi_structured
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED
from widekernel.sparsity.semi_structured.snapshot import semi_structured_snapshot
from widekernel.sparsity.snapshot import SparsitySnapshot
from widekernel.tasks.image_channels import input_channels
from widekernel.tasks.sparsify.config import SparsifyConfig


@dataclass(frozen=True)
class Sparsified:
    """A sparse network and a report on its layers.

    Attributes:
        model: plain network with zeros, in evaluation mode.
        masks: parameter name -> bool tensor.
        report: report by parameter or layer.
        kept: share of the summed magnitude of the masked weights that remains.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    report: SparsityReport
    kept: float


def sparsify(model: nn.Module, config: SparsifyConfig) -> Sparsified:
    """Mask a network by magnitude, in place, after a permutation of its channels if configured.

    Raises:
        ArgumentError: nothing can be masked, or a setting is out of range.
        ConfigError: the masks are to be learned, which `learn_masks` does.
    """
    if config.method == "learned":
        raise ConfigError("method learned needs images: give --data.root or --data.name.")
    before = magnitudes(model)
    if config.block == SEMI_STRUCTURED:
        controller = semi_structured.prepare(model, semi_structured_config(config))
        plain, masks = semi_structured.convert(model), controller.masks
        snapshot = semi_structured_snapshot(plain, controller.report, masks)
        return sparsified(plain, masks, snapshot, before)
    settings = DynamicSparsityConfig(
        sparsity=config.sparsity,
        init="magnitude",
        growth="none",
        layers=comma_separated(config.layers or "") or "all",
        exclude=comma_separated(config.exclude or ""),
        block=config.block,
        seed=config.seed,
    )
    # A controller needs an optimizer, but no step is made here.
    pruned = DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.0), settings)
    pruned.remove()
    return sparsified(model, pruned.masks, pruned.snapshot(), before)


def sparsified(
    model: nn.Module, masks: dict[str, Tensor], snapshot: SparsitySnapshot, before: Mapping[str, float]
) -> Sparsified:
    """Return the result for a masked network, given the `magnitudes` of its weights before masking."""
    after = magnitudes(model)
    kept = sum(after[name] for name in masks) / max(1e-30, sum(before[name] for name in masks))
    return Sparsified(model.eval(), masks, SparsityReport(snapshot), kept)


def magnitudes(model: nn.Module) -> dict[str, float]:
    """Return the summed magnitude of every parameter, by name."""
    return {name: float(parameter.detach().abs().sum()) for name, parameter in model.named_parameters()}


def agreement(model: nn.Module, other: nn.Module, input_size: int, images: int = 16) -> float:
    """Return the share of random images for which two networks predict the same class."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(images, input_channels(model), input_size, input_size, generator=generator)
    with torch.inference_mode():
        same = model.eval()(inputs).argmax(1) == other.eval()(inputs).argmax(1)
    return float(same.float().mean())


def semi_structured_config(config: SparsifyConfig) -> semi_structured.SemiStructuredConfig:
    """Return the settings of 2:4 masks."""
    return semi_structured.SemiStructuredConfig(
        method=config.method,
        axis=config.axis,
        layers=comma_separated(config.layers or "") or "all",
        exclude=comma_separated(config.exclude or ""),
        seed=config.seed,
    )
