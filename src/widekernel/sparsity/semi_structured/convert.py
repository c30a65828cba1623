"""From a prepared network to a plain one, and checks that a network is 2:4."""

from __future__ import annotations

import copy
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError, nearest
from widekernel.layers.notes import recall, remember
from widekernel.sparsity.selection import unwrap
from widekernel.sparsity.semi_structured import hardware
from widekernel.sparsity.semi_structured.controller import SemiStructured, keep_in_evaluation, unparametrise
from widekernel.sparsity.semi_structured.grouping import Axis
from widekernel.sparsity.semi_structured.manifest import Manifest, MaskedWeight
from widekernel.sparsity.semi_structured.masks import check_two_four, choices_to_mask, mask_to_choices

ModelT = TypeVar("ModelT", bound=nn.Module)
TARGETS = ("dense", "torch_sparse")


def convert(model: ModelT, target: Literal["dense", "torch_sparse"] = "dense") -> ModelT:
    """Give a copy of a prepared network without parametrisations; the original is left as it is.

    Args:
        model: what `prepare` was given, or a network that was converted or loaded from a sparse file.
        target: "dense" for plain weights with zeros; they equal those of the prepared network in evaluation bit for bit, so
            that outputs differ by rounding at most, where the machine has several kernels for a layer. Parameters that were
            frozen for the masks are trainable again. "torch_sparse" also replaces linear layers and
            1x1 convolutions by `torch.sparse` semi-structured ones: fp16, bf16 or int8 on a CUDA device, for inference.
            Layers that cannot be stay dense; `manifest_of(result).dense` says why.

    Raises:
        ArgumentError: if the network was not prepared, a weight is no longer 2:4, or this machine cannot do it.
    """
    if target not in TARGETS:
        raise ArgumentError(f"target {target!r} is unknown: it must be 'dense' or 'torch_sparse'.{nearest(target, TARGETS)}")
    if target == "torch_sparse":
        capability = hardware.probe()
        if not capability.available:
            raise ArgumentError(f"target='torch_sparse' cannot be used here: {capability.reason}. Use target='dense'")
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
    """Give what a prepared, converted or loaded network remembers about its 2:4 weights.

    Raises:
        ArgumentError: if it remembers nothing.
    """
    record = model if isinstance(model, SemiStructured) else recall(unwrap(model))
    if isinstance(record, SemiStructured):
        return record.manifest
    if isinstance(record, Manifest):
        return record
    raise ArgumentError(
        f"the {type(model).__name__} has no 2:4 masks: call prepare(model, config) on it first, and give that network, not "
        "a wrapper of it"
    )


def validate(what: Tensor | nn.Module | SemiStructured, axis: Axis = "channels", groups: int = 1) -> tuple[str, ...]:
    """Check that a weight, or every masked weight of a network, is 2:4.

    Args:
        what: a weight, or a prepared, converted or loaded network; a learned mask is checked as evaluation applies it.
        axis: which weights form a group; for a weight only, a network knows.
        groups: of the convolution; for a weight only.

    Returns:
        The names of the weights that were checked; none for a weight.

    Raises:
        ArgumentError: naming the layer, how many groups have more than two non-zeros, and where the first is.
    """
    if isinstance(what, Tensor):
        check_two_four(what, axis, groups)
        return ()
    manifest = manifest_of(what)
    network = what.model if isinstance(what, SemiStructured) else unwrap(what)
    checked = []
    for name, known in manifest.weights.items():
        layer = network.get_submodule(name.rpartition(".")[0])
        if hardware.is_compressed(layer):
            continue  # was checked before it was compressed
        check_two_four(evaluated_weight(layer), known.axis, known.groups, name)
        checked.append(name)
    return tuple(checked)


@torch.no_grad()
def refreshed(network: nn.Module, manifest: Manifest) -> Manifest:
    """Give a manifest whose choices keep every weight that is not zero now: other 2:4 weights may have been loaded since."""
    weights = {}
    for name, known in manifest.weights.items():
        layer = network.get_submodule(name.rpartition(".")[0])
        if not hardware.is_compressed(layer):
            live = evaluated_weight(layer) != 0
            kept = choices_to_mask(known.choices.to(live.device), live.shape, known.axis, known.groups)
            if bool((live & ~kept).any()):
                known = MaskedWeight(known.axis, known.groups, mask_to_choices(live, known.axis, known.groups, name))
        weights[name] = known
    return Manifest(weights, manifest.dense)


@torch.no_grad()
def evaluated_weight(layer: nn.Module) -> Tensor:
    """Give a layer's weight as evaluation uses it, parametrised or not."""
    parametrised = getattr(layer, "parametrizations", None)
    if parametrised is None:
        return cast("Tensor", layer.weight)
    was_training = parametrised.training
    parametrised.eval()
    weight = cast("Tensor", layer.weight)
    parametrised.train(was_training)
    return weight


def _release(model: nn.Module, controller: SemiStructured) -> None:
    """Take the parametrisations and hooks of learned masks off a network."""
    for name in controller.choices:
        unparametrise(model.get_submodule(name.rpartition(".")[0]))
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is keep_in_evaluation]:
            del hooks[key]
    model.requires_grad_(False)
    for name in controller.frozen:
        model.get_parameter(name).requires_grad_(True)
