"""Preparation: 2:4 masks on the layers of any network, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from widekernel.errors import ArgumentError
from widekernel.layers.notes import recall, remember
from widekernel.layers.wrappers import unwrap
from widekernel.sparsity.semi_structured.channel_permutation import Permuted, permute_channels
from widekernel.sparsity.semi_structured.config import SemiStructuredConfig
from widekernel.sparsity.semi_structured.controller import SemiStructured, keep_in_evaluation
from widekernel.sparsity.semi_structured.eligibility import (
    LayerReport,
    conv_groups,
    layer_name,
    layers_of,
    reasons_against,
    weight_name,
)
from widekernel.sparsity.semi_structured.grouping import group_count
from widekernel.sparsity.semi_structured.learned import ChoiceMask, Schedule, initial_logits, kept_share
from widekernel.sparsity.semi_structured.manifest import MaskedWeight
from widekernel.sparsity.semi_structured.masks import check_choices, magnitude_choices


def prepare(
    model: nn.Module,
    config: SemiStructuredConfig | None = None,
    *,
    choices: Mapping[str, Tensor] | None = None,
    logits: Mapping[str, Tensor] | None = None,
) -> SemiStructured:
    """Put 2:4 masks on every eligible Conv2d and Linear of a network, in place.

    "magnitude" and "permuted" set weights to zero and leave them plain parameters. "learned" freezes all parameters and
    parametrizes the weights, so state-dict keys change until `convert`. It keeps batch norms in evaluation mode, unless
    `freeze_norms` is off: then training forward passes update their statistics. Dropout and stochastic depth follow the
    network's mode.

    These layers stay dense, each with its reason in the report: depthwise and grouped layers (unless the axis allows them),
    layers with few channels, layers whose weights are shared, parametrized or standardized, and layers that the
    configuration excludes.

    Args:
        model: any network.
        config: the settings; by default magnitude masks along input channels.
        choices: masks to use instead of computing them, parameter name -> (G,) uint8; other layers stay dense.
        logits: logits to continue learning from, parameter name -> (G, 6), for method "learned"; other layers stay dense.

    Returns:
        The controller; the network carries it too, for `convert` and `save_sparse`.

    Raises:
        ArgumentError: if no layer is eligible, a layer given by its full name is not, or the network was prepared before.
    """
    model, config = unwrap(model), config or SemiStructuredConfig()
    given = _given(model, config, choices, logits)
    if isinstance(recall(model), SemiStructured):
        raise ArgumentError(f"the {type(model).__name__} was prepared before: convert it first, or prepare a fresh copy")
    reasons = reasons_against(model, config, None if given is None else [layer_name(name) for name in given])
    chosen = [name for name, reason in reasons.items() if not reason]
    _check_given(model, config, choices, logits)
    permuted = permute_channels(model, chosen, config) if config.method == "permuted" and given is None else {}
    schedule = Schedule(config)
    made = {name: _make(model, name, config, choices, logits, schedule) for name in chosen}
    frozen = _freeze(model, config) if config.method == "learned" else ()
    for name, one in made.items():
        if one.learned is not None:
            _attach(model.get_submodule(name), one.learned)
    rows = (_row(n, layer.weight, reasons[n], made.get(n), permuted.get(n)) for n, layer in layers_of(model).items())
    controller = SemiStructured(
        model,
        config,
        tuple(rows),
        {weight_name(name): one.weight for name, one in made.items()},
        {weight_name(name): one.learned for name, one in made.items() if one.learned is not None},
        schedule,
        frozen,
    )
    controller.apply_masks()
    remember(model, controller)
    return controller


class _Made(NamedTuple):
    weight: MaskedWeight
    learned: ChoiceMask | None
    kept: float


def _given(
    model: nn.Module,
    config: SemiStructuredConfig,
    choices: Mapping[str, Tensor] | None,
    logits: Mapping[str, Tensor] | None,
) -> list[str] | None:
    """Return the names of the weights whose masks are given, or None if none are."""
    if logits is not None and config.method != "learned":
        raise ArgumentError(f"logits were given, but method={config.method!r} has none: use method='learned'")
    if choices is not None and config.method == "learned":
        raise ArgumentError(
            "choices were given, but method='learned' starts from logits: give logits, or method='magnitude'"
        )
    masks = logits if logits is not None else choices
    if masks is None:
        return None
    known = {weight_name(name) for name in layers_of(model)}
    unknown = [name for name in masks if name not in known]
    if unknown:
        raise ArgumentError(
            f"masks were given for {', '.join(unknown)}, which are not weights of Conv2d or Linear layers of this network"
        )
    return list(masks)


def _check_given(
    model: nn.Module,
    config: SemiStructuredConfig,
    choices: Mapping[str, Tensor] | None,
    logits: Mapping[str, Tensor] | None,
) -> None:
    """Check the sizes of given choices and logits before anything is changed."""
    layers = {weight_name(name): layer for name, layer in layers_of(model).items()}
    for name, value in (choices or {}).items():
        check_choices(value, layers[name].weight.shape, config.axis, conv_groups(layers[name]), f"choices of {name}")
    for name, value in (logits or {}).items():
        wanted = (group_count(layers[name].weight.shape, config.axis, conv_groups(layers[name])), 6)
        if tuple(value.shape) != wanted or not value.is_floating_point():
            raise ArgumentError(
                f"logits of {name} are {value.dtype} of shape {tuple(value.shape)}: along axis={config.axis!r} they must be "
                f"floating-point numbers of shape {wanted}"
            )


def _make(
    model: nn.Module,
    name: str,
    config: SemiStructuredConfig,
    choices: Mapping[str, Tensor] | None,
    logits: Mapping[str, Tensor] | None,
    schedule: Schedule,
) -> _Made:
    """Compute the mask of one layer, without changing the layer."""
    layer = model.get_submodule(name)
    weight: Tensor = layer.weight.detach()  # type: ignore[union-attr,operator,assignment]
    groups, key, learned = conv_groups(layer), weight_name(name), None
    if config.method == "learned":
        start = initial_logits(weight, config.axis, groups, config.prior_strength) if logits is None else logits[key]
        learned = ChoiceMask(start.to(weight.device), weight.shape, config.axis, groups, key, schedule)
        found = learned.choices()
    else:
        found = magnitude_choices(weight, config.axis, groups) if choices is None else choices[key].to(weight.device).clone()
    return _Made(MaskedWeight(config.axis, groups, found), learned, kept_share(weight, found, config.axis, groups))


def _row(name: str, weight: Tensor, reason: str, made: _Made | None, permuted: Permuted | None) -> LayerReport:
    if made is None:
        return LayerReport(name, () if is_lazy(weight) else tuple(weight.shape), False, reason)
    before = permuted.kept_before if permuted is not None and not permuted.reason else None
    reason = f"not permuted: {permuted.reason}" if permuted is not None and permuted.reason else ""
    return LayerReport(name, tuple(weight.shape), True, reason, made.weight.choices.numel(), made.kept, before)


def _freeze(model: nn.Module, config: SemiStructuredConfig) -> tuple[str, ...]:
    """Freeze all parameters and, if configured, batch norms; return the names of the parameters that were trainable."""
    frozen = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.requires_grad_(False)
    if config.freeze_norms:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(keep_in_evaluation)
    return frozen


def _attach(layer: nn.Module, mask: ChoiceMask) -> None:
    training = layer.training
    mask.train(training)
    with torch.no_grad():  # registration runs the parametrization once
        parametrize.register_parametrization(layer, "weight", mask)
    layer.parametrizations.train(training)  # type: ignore[operator,union-attr]
