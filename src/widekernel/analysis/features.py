"""Feature maps inside a network: the last one before the head, or that of a named layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError, nearest
from widekernel.models.base import StagedConvNet

Features = Callable[[Tensor], Tensor]
"""Function from images (N, C, H, W) to a feature map (N, C', H', W')."""


def last_feature_map(model: nn.Module, layer: str | None = None) -> Features:
    """Return a function that computes the last feature map of a network, before a final norm.

    Args:
        model: one of our networks, any network of timm with feature maps, or, with `layer`, any network.
        layer: name of the module whose output is the map instead, as in `model.named_modules()`.

    Raises:
        ArgumentError: the network has no such module; later, on the first call: the output is no feature map.
    """
    if layer is not None:
        return _of_layer(model, layer)
    if isinstance(model, StagedConvNet):
        return lambda images: _checked(model.stages(model.stem(model.input_check(images))), model)
    if hasattr(model, "forward_intermediates"):
        return lambda images: _checked(_last_intermediate(model, images), model)
    if hasattr(model, "forward_features"):
        network: Any = model
        return lambda images: _checked(network.forward_features(images), model)
    raise ArgumentError(
        f"{type(model).__name__} does not say which module computes its last feature map: name it (layer), for example "
        f"{_last_convolution(model)!r}"
    )


def _last_intermediate(model: Any, images: Tensor) -> Tensor:
    return model.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[-1]


def _of_layer(model: nn.Module, layer: str) -> Features:
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        raise ArgumentError(
            f"{type(model).__name__} has no module {layer!r}.{nearest(layer, [name for name in modules if name])}"
        )

    def features(images: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = modules[layer].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            model(images)
        finally:
            handle.remove()
        if not kept:
            raise ArgumentError(f"the module {layer!r} was not called: name one that takes part in the forward pass")
        return _checked(kept[-1], model, layer)

    return features


def _checked(output: Any, model: nn.Module, layer: str | None = None) -> Tensor:
    """Return `output` if it is a batch of feature maps.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(output, Tensor) and output.ndim == 4:
        return output
    shape = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
    where = type(model).__name__ if layer is None else f"the module {layer!r} of {type(model).__name__}"
    raise ArgumentError(
        f"the features of {where} have {shape}, but a feature map is (N, C, H, W): name a module with spatial output (layer)"
    )


def _last_convolution(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return names[-1] if names else "features"


def without_gradients_of_weights(model: nn.Module) -> list[nn.Parameter]:
    """Turn off the gradients of all parameters, and return those that had one, to turn them on again."""
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    return changed


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer of a network; the CPU if it has none."""
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device
