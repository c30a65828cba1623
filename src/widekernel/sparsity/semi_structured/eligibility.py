"""Selection of the layers of a network that can be 2:4, with the reason for each other one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from widekernel.errors import ArgumentError, nearest
from widekernel.sparsity.semi_structured.config import SemiStructuredConfig

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class LayerReport:
    """Report on one layer: whether it is 2:4, and why not.

    Attributes:
        name: name of the layer.
        shape: shape of its weight; () if that is not initialized yet.
        masked: whether it is 2:4 now.
        reason: why it is not; for a masked layer, why its channels were not permuted; "" if there is no reason.
        groups: number of groups of four, 0 if not masked.
        kept: share of the summed magnitude that the mask keeps.
        kept_before: the same before the permutation of channels; None if there was none.
    """

    name: str
    shape: tuple[int, ...]
    masked: bool
    reason: str = ""
    groups: int = 0
    kept: float = 1.0
    kept_before: float | None = None

    @property
    def weight_name(self) -> str:
        """Parameter name of the layer's weight."""
        return weight_name(self.name)


def weight_name(layer: str) -> str:
    """Return the parameter name of a layer's weight; the name of the layer is "" if it is the whole network."""
    return f"{layer}.weight" if layer else "weight"


def layer_name(weight: str) -> str:
    """Return the name of the layer that a weight belongs to."""
    return weight.rpartition(".")[0]


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Return the 2-D convolutions and linear layers of a network by name, including subclasses."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def conv_groups(layer: nn.Module) -> int:
    """Return the number of groups of a convolution, 1 for a linear layer."""
    return int(getattr(layer, "groups", 1))


def reasons_against(model: nn.Module, config: SemiStructuredConfig, given: Collection[str] | None = None) -> dict[str, str]:
    """Return, for every Conv2d and Linear, why it stays dense, or "" if it is to be masked.

    Args:
        model: the network.
        config: which layers to mask.
        given: names of the layers whose masks are given; only these are masked, whatever their size.

    Raises:
        ArgumentError: if a name in the configuration matches no layer, if a layer given by its full name cannot be masked,
            or if no layer can.
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
            reasons[name] = "not among the selected layers"
        else:
            reasons[name] = _cannot(layer, config, uses) or _too_small(layer, config)
    asked = set(given or ()) | set(() if config.layers == "all" else config.layers)
    refused = [f"{name} ({reasons[name]})" for name in layers if name in asked and reasons[name]]
    if refused:
        raise ArgumentError(f"these layers were selected but cannot be 2:4: {'; '.join(refused)}. Leave them out of layers")
    if all(reasons.values()):
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has no Conv2d and no Linear"
        raise ArgumentError(
            f"no layer of the {type(model).__name__} can be 2:4: {listed}. Change layers or the minimum sizes"
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
        raise ArgumentError(f"{pattern!r} matches no Conv2d or Linear of the network.{nearest(pattern, layers)}")


def _cannot(layer: Layer, config: SemiStructuredConfig, uses: Counter[int], given: bool = False) -> str:
    """Return why a layer cannot be masked, whatever its size, or "" if it can."""
    if "weight" not in layer._parameters or getattr(layer, "parametrizations", None):
        return "its weight is parametrized already"
    weight = layer._parameters["weight"]
    if weight is None or is_lazy(weight):
        return "its weight has no data yet"
    if weight.is_meta:
        return "its weight has no data (meta device)"
    if not weight.is_floating_point() or type(weight.data) is not Tensor:
        return f"its weight is not a plain floating-point tensor ({weight.dtype})"
    if uses[id(weight)] > 1:
        return "its weight is shared with another layer"
    if "StdConv" in type(layer).__mro__[0].__name__:
        return "it standardizes its weight, which makes masked weights non-zero"
    groups = conv_groups(layer)
    depthwise = groups > 1 and weight.shape[1] == 1
    if config.axis == "taps":
        return "" if depthwise else "axis='taps' is for depthwise layers"
    if depthwise and not (given and config.axis == "im2col"):  # official checkpoints may hold such masks
        return "depthwise: with one input channel per output there is nothing to choose"
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
