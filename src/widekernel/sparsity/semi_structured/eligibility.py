"""Which layers of a network can be 2:4, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from widekernel.errors import ArgumentError, nearest
from widekernel.sparsity.two_four_config import SemiStructuredConfig

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: of the layer.
        shape: of its weight; () if that has none yet.
        masked: whether it is 2:4 now.
        reason: why not; for a masked layer, why its channels were not permuted, "" if they were or nobody asked.
        groups: number of groups of four, 0 if not masked.
        kept: share of the summed magnitude that the mask keeps.
        kept_before: the same before the permutation of channels, if there was one.
    """

    name: str
    shape: tuple[int, ...]
    masked: bool
    reason: str = ""
    groups: int = 0
    kept: float = 1.0
    kept_before: float | None = None


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """List the 2-D convolutions and linear layers of a network by name, subclasses included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def conv_groups(layer: nn.Module) -> int:
    """Give the number of groups of a convolution, 1 for a linear layer."""
    return int(getattr(layer, "groups", 1))


def reasons_against(model: nn.Module, config: SemiStructuredConfig, given: Collection[str] | None = None) -> dict[str, str]:
    """Say for every Conv2d and Linear why it is left dense; "" if it is to be masked.

    Args:
        model: the network.
        config: says which layers are wanted.
        given: names of the layers whose masks come from elsewhere: only these are masked, of whatever size.

    Raises:
        ArgumentError: if a name of the configuration fits no layer, if a layer named outright cannot be masked, or if none
            can.
    """
    layers = layers_of(model)
    _check_names(layers, config, model)
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    reasons = {}
    for name, layer in layers.items():
        if given is not None:
            reasons[name] = "no mask was given" if name not in given else _cannot(layer, config, uses, True)
        elif any(fnmatchcase(name, pattern) for pattern in config.exclude):
            reasons[name] = "excluded"
        elif config.layers != "all" and not any(fnmatchcase(name, pattern) for pattern in config.layers):
            reasons[name] = "not among the layers asked for"
        else:
            reasons[name] = _cannot(layer, config, uses) or _too_small(layer, config)
    asked = set(given or ()) | set(() if config.layers == "all" else config.layers)
    refused = [f"{name} ({reasons[name]})" for name in layers if name in asked and reasons[name]]
    if refused:
        raise ArgumentError(f"these layers were asked for but cannot be 2:4: {'; '.join(refused)}. Leave them out of layers")
    if all(reasons.values()):
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has no Conv2d and no Linear"
        raise ArgumentError(
            f"no layer of the {type(model).__name__} can be 2:4: {listed}. Change layers or the minimal sizes"
        )
    return reasons


def _check_names(layers: dict[str, Layer], config: SemiStructuredConfig, model: nn.Module) -> None:
    patterns = [*(() if config.layers == "all" else config.layers), *config.exclude]
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in layers):
            continue
        module = dict(model.named_modules()).get(pattern)
        if module is not None:
            raise ArgumentError(f"{pattern!r} is a {type(module).__name__}: only Conv2d and Linear layers can be 2:4")
        raise ArgumentError(f"{pattern!r} fits no Conv2d or Linear of the network.{nearest(pattern, layers)}")


def _cannot(layer: Layer, config: SemiStructuredConfig, uses: Counter[int], given: bool = False) -> str:
    """Say why a layer cannot be masked, whatever its size; "" if it can."""
    if "weight" not in layer._parameters or getattr(layer, "parametrizations", None):
        return "its weight is parametrised already"
    weight = layer._parameters["weight"]
    if weight is None or is_lazy(weight):
        return "its weight has no data yet"
    if weight.is_meta:
        return "its weight has no data (meta device)"
    if not weight.is_floating_point() or type(weight.data) is not Tensor:
        return f"its weight is no plain tensor of floating-point numbers ({weight.dtype})"
    if uses[id(weight)] > 1:
        return "its weight is shared with another layer"
    if "StdConv" in type(layer).__mro__[0].__name__:
        return "it standardises its weight, which makes masked weights non-zero"
    groups = conv_groups(layer)
    depthwise = groups > 1 and weight.shape[1] == 1
    if config.axis == "taps":
        return "" if depthwise else "axis='taps' is for depthwise layers"
    if depthwise and not (given and config.axis == "im2col"):  # official checkpoints may hold such masks
        return "depthwise: one input channel an output leaves nothing to choose from"
    if groups > 1 and config.axis == "channels":
        return f"grouped ({groups} groups)"
    return ""


def _too_small(layer: Layer, config: SemiStructuredConfig) -> str:
    if config.axis == "taps":
        taps = prod(layer.weight.shape[2:])
        return "" if taps > 2 else f"too small: {taps} taps"
    outputs, inputs = layer.weight.shape[:2]
    if inputs < config.min_in_channels:
        return f"too small: {inputs} input channels, fewer than min_in_channels={config.min_in_channels}"
    if outputs < config.min_out_channels:
        return f"too small: {outputs} output channels, fewer than min_out_channels={config.min_out_channels}"
    return ""
