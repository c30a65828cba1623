"""Removing dead hidden units from pairs of layers with an activation in between."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.layers import Mlp
from torch import Tensor, nn

from widekernel.layers.alterations import alterations, replaced_methods
from widekernel.layers.folding import is_trained
from widekernel.layers.hidden_units import Compactable, HiddenUnits
from widekernel.layers.pointwise import reasons_against_pointwise
from widekernel.layers.rebuilding import is_plain, layer_like
from widekernel.layers.replacing import with_submodule
from widekernel.transforms.compaction.report import LayerReport

# Activations that act on each unit alone. Only then is a unit without weights constant, and one that is not read unused.
_ELEMENTWISE = {
    "ELU",
    "GELU",
    "GELUTanh",
    "Hardswish",
    "Identity",
    "LeakyReLU",
    "Mish",
    "QuickGELU",
    "ReLU",
    "ReLU6",
    "SiLU",
}
_UNITS_OF_MLP = HiddenUnits("fc1", "act", "fc2", others=("drop1", "norm"))


class _Pair(NamedTuple):
    """The two layers of a block and the activation in between; both layers are matrices."""

    first: Any
    act: nn.Module
    second: Any


def compacted_units(module: nn.Module, name: str) -> tuple[nn.Module, LayerReport] | None:
    """Return a block without its dead hidden units, and the report; None if it has no hidden units or none is dead.

    A unit is dead if the second layer does not read it, or if it is constant because its row in the first layer is zero.
    The constant moves to the bias of the second layer. Blocks are timm's `Mlp` without a norm between the layers, and all
    `Compactable` modules. If a hook or a replaced method could read or change the units, none is removed, and the report
    says so.
    """
    units = hidden_units(module)
    pair = None if units is None else _pair(module, units)
    if units is None or pair is None:
        return None
    first, act, second = pair
    # Both are ungrouped and 1x1, so that weights are (units, inputs) and (outputs, units).
    rows, columns = first.weight.detach().flatten(1), second.weight.detach().flatten(1)
    constant, unread = ~(rows != 0).any(1), ~(columns != 0).any(0)
    keep = ~(constant | unread)
    if bool(keep.all()):
        return None
    if reasons := replaced_methods(module) + alterations(module, units.seen_by):
        return module, _kept(module, name, rows, columns, int((~keep).sum()), reasons)
    if not bool(keep.any()):
        keep[0] = True  # a layer needs at least one unit, whose weights stay as they are
    new_first, new_second = _without(first, second, act, keep)
    result = with_submodule(with_submodule(module, units.first, new_first), units.second, new_second)
    dense, nonzero = rows.numel() + columns.numel(), int(rows.count_nonzero()) + int(columns.count_nonzero())
    realized = new_first.weight.numel() + new_second.weight.numel()
    share = 100 * (1 - nonzero / realized) if nonzero < realized else 0
    reason = f"{share:.0f} % zeros in matrices, which are computed in full" if share else ""
    return result, LayerReport(name, type(module).__name__, len(keep), int(keep.sum()), dense, nonzero, realized, reason)


def hidden_units(module: nn.Module) -> HiddenUnits | None:
    """Return the hidden units of a module; None if it has none that can be removed."""
    if isinstance(module, Compactable):
        return module.hidden_units()
    # A norm in between mixes the units.
    plain_mlp = type(module) is Mlp and isinstance(module.norm, nn.Identity)
    return _UNITS_OF_MLP if plain_mlp else None


def _kept(module: nn.Module, name: str, rows: Tensor, columns: Tensor, dead: int, reasons: list[str]) -> LayerReport:
    """Report a block that keeps its dead units because of hooks or replaced methods."""
    dense = rows.numel() + columns.numel()
    nonzero = int(rows.count_nonzero()) + int(columns.count_nonzero())
    reason = f"{dead} hidden units have zero weights but are kept: " + "; ".join(reasons)
    return LayerReport(name, type(module).__name__, len(rows), len(rows), dense, nonzero, dense, reason)


def _pair(module: nn.Module, units: HiddenUnits) -> _Pair | None:
    """Return the layers of hidden units; None if a layer is not a matrix or the activation not known to be elementwise."""
    pair = _Pair(*(module.get_submodule(name) for name in (units.first, units.activation, units.second)))
    fits = _is_matrix(pair.first) and _is_matrix(pair.second) and type(pair.act).__name__ in _ELEMENTWISE
    return pair if fits else None


def _is_matrix(layer: nn.Module) -> bool:
    if not is_plain(layer) or hasattr(layer, "parametrizations"):
        return False
    if isinstance(layer, nn.Conv2d):
        return not reasons_against_pointwise(layer)
    return isinstance(layer, nn.Linear)


def _without(first: Any, second: Any, act: nn.Module, keep: Tensor) -> tuple[Any, Any]:
    """Return both layers with only the units `keep` (units,); the constant outputs of the others move to the bias."""
    start = first.weight.new_zeros(len(keep)) if first.bias is None else first.bias.detach()
    constants = act(start.clone())
    # Either the row of a dropped unit is zero, or its column is zero, and then its entry here has no effect.
    columns = second.weight.detach().flatten(1).double()
    added = columns[:, ~keep] @ constants[~keep].double()
    bias = added if second.bias is None else second.bias.detach().double() + added
    new_first = layer_like(first, first.weight.detach()[keep], None if first.bias is None else first.bias.detach()[keep])
    with_bias = second.bias is not None or bool((added != 0).any())
    new_second = layer_like(second, second.weight.detach()[:, keep], bias if with_bias else None)
    return new_first.requires_grad_(is_trained(first)), new_second.requires_grad_(is_trained(second))
