"""Conversion of a prepared network to a plain one, and checks that a network is 2:4."""

from __future__ import annotations

import copy
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError, nearest
from widekernel.layers.notes import recall, remember
from widekernel.layers.wrappers import unwrap
from widekernel.sparsity.semi_structured import hardware
from widekernel.sparsity.semi_structured.controller import SemiStructured, apply_learned_mask, keep_in_evaluation
from widekernel.sparsity.semi_structured.eligibility import layer_name
from widekernel.sparsity.semi_structured.grouping import Axis
from widekernel.sparsity.semi_structured.manifest import Manifest, MaskedWeight
from widekernel.sparsity.semi_structured.masks import check_semi_structured, choices_to_mask, mask_to_choices

ModelT = TypeVar("ModelT", bound=nn.Module)
TARGETS = ("dense", "torch_sparse")


def convert(model: ModelT, target: Literal["dense", "torch_sparse"] = "dense") -> ModelT:
    """Return a plain copy of a prepared network, without parametrizations; the original stays unchanged.

    Args:
        model: a prepared network, or one that was converted or loaded from a sparse file.
        target: "dense" for plain weights with zeros. They equal those of the prepared network in evaluation bit for bit, so
            outputs differ by rounding at most, if the machine has several kernels for a layer. Parameters that were frozen
            for the masks are trainable again. "torch_sparse" also replaces linear layers and 1x1 convolutions by
            `torch.sparse` semi-structured ones: fp16, bf16 or int8 on a CUDA device, for inference. Layers that cannot be
            replaced stay dense; `manifest_of(result).dense` lists them with the reason.

    Raises:
        ArgumentError: if the network was not prepared, a weight is no longer 2:4, or this machine does not support the
            target.
    """
    if target not in TARGETS:
        raise ArgumentError(f"target {target!r} is unknown: it must be 'dense' or 'torch_sparse'.{nearest(target, TARGETS)}")
    if target == "torch_sparse":
        support = hardware.hardware_support()
        if not support.available:
            raise ArgumentError(f"target='torch_sparse' cannot be used here: {support.reason}. Use target='dense'")
    model = cast("ModelT", unwrap(model))
    manifest = manifest_of(model)
    result = copy.deepcopy(model)
    controller = recall(result)
    if isinstance(controller, SemiStructured):
        if controller.is_learned:
            _release(result, controller)
        remember(result, manifest)
    validate(result)
    manifest = refreshed(result, manifest)
    remember(result, manifest)
    if target == "torch_sparse":
        dense = hardware.compress_layers(result, manifest)
        remember(result, Manifest(manifest.weights, dense))
    return result


def manifest_of(model: nn.Module | SemiStructured) -> Manifest:
    """Return the record of the 2:4 weights of a prepared, converted or loaded network.

    Raises:
        ArgumentError: if the network carries none.
    """
    record = model if isinstance(model, SemiStructured) else recall(unwrap(model))
    if isinstance(record, SemiStructured):
        return record.manifest
    if isinstance(record, Manifest):
        return record
    raise ArgumentError(
        f"the {type(model).__name__} has no 2:4 masks: call prepare(model, config) on it first, and give the network "
        "itself, not a wrapper of it"
    )


def validate(what: Tensor | nn.Module | SemiStructured, axis: Axis = "channels", groups: int = 1) -> tuple[str, ...]:
    """Check that a weight, or every masked weight of a network, is 2:4.

    Args:
        what: a weight, or a prepared, converted or loaded network; a learned mask is checked as evaluation applies it.
        axis: which weights form a group; only used for a weight.
        groups: number of groups of the convolution; only used for a weight.

    Returns:
        The names of the network's weights that were checked; () for a weight.

    Raises:
        ArgumentError: a weight is not 2:4; the message names the layer, the number of groups with more than two nonzeros,
            and the first of them.
    """
    if isinstance(what, Tensor):
        check_semi_structured(what, axis, groups)
        return ()
    manifest = manifest_of(what)
    network = what.model if isinstance(what, SemiStructured) else unwrap(what)
    checked = []
    for name, known in manifest.weights.items():
        layer = network.get_submodule(layer_name(name))
        if hardware.is_compressed(layer):
            continue  # checked before it was compressed
        check_semi_structured(evaluated_weight(layer), known.axis, known.groups, name)
        checked.append(name)
    return tuple(checked)


@torch.no_grad()
def refreshed(network: nn.Module, manifest: Manifest) -> Manifest:
    """Return a manifest whose choices keep all weights that are nonzero now, as other weights may have been loaded."""
    weights = {}
    for name, known in manifest.weights.items():
        layer = network.get_submodule(layer_name(name))
        if not hardware.is_compressed(layer):
            live = evaluated_weight(layer) != 0
            kept = choices_to_mask(known.choices.to(live.device), live.shape, known.axis, known.groups)
            if bool((live & ~kept).any()):
                known = MaskedWeight(known.axis, known.groups, mask_to_choices(live, known.axis, known.groups, name))
        weights[name] = known
    return Manifest(weights, manifest.dense)


@torch.no_grad()
def evaluated_weight(layer: nn.Module) -> Tensor:
    """Return a layer's weight as evaluation uses it, parametrized or not."""
    parametrized = getattr(layer, "parametrizations", None)
    if parametrized is None:
        return cast("Tensor", layer.weight)
    was_training = parametrized.training
    parametrized.eval()
    weight = cast("Tensor", layer.weight)
    parametrized.train(was_training)
    return weight


def _release(model: nn.Module, controller: SemiStructured) -> None:
    """Remove the parametrizations and hooks of learned masks from a network."""
    for name in controller.choices:
        apply_learned_mask(model.get_submodule(layer_name(name)))
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is keep_in_evaluation]:
            del hooks[key]
    model.requires_grad_(False)
    for name in controller.frozen:
        model.get_parameter(name).requires_grad_(True)
