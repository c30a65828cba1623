"""Removing hidden units that nothing depends on from pairs of layers with an activation in between."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from widekernel.layers import ConvNorm
from widekernel.layers.alterations import alterations, replacement_of_forward
from widekernel.layers.conv import is_plain
from widekernel.layers.folding import is_trained
from widekernel.transforms.compaction.report import LayerReport

# Each unit by itself; only for these the output of a dead row is a constant and a dead column loses nothing.
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
_FEED_FORWARD = {"preffn_bn", "pw1", "pw2", "drop_path"}
# What the units go through, of both kinds of MLP.
_SEEING_UNITS = ("fc1", "act", "drop1", "norm", "fc2", "pw1", "pw1.conv", "pw1.bn", "pw1.act", "pw2", "pw2.conv")


def compacted_units(module: nn.Module, name: str) -> tuple[nn.Module, LayerReport] | None:
    """Give an MLP without its dead hidden units, and the report; None if the module is no MLP or none is dead.

    A unit is dead if the second layer does not read it, or if it is a constant (its row of the first layer is zero); the
    constant moves to the bias of the second layer. Known are timm's `Mlp` without a norm between the layers, and the
    feed-forward block of RepLKNet. A response norm mixes the units, so that there none can be removed. Nor is any if a hook
    or a replaced method could read or change them; the report says so.
    """
    pair = _pair(module)
    if pair is None:
        return None
    first, act, second = pair
    # Both ungrouped and 1x1, so that weights are (units, inputs) and (outputs, units).
    rows, columns = first.weight.detach().flatten(1), second.weight.detach().flatten(1)
    constant, unread = ~(rows != 0).any(1), ~(columns != 0).any(0)
    keep = ~(constant | unread)
    if bool(keep.all()):
        return None
    if reasons := replacement_of_forward(module) + alterations(module, _SEEING_UNITS):
        return module, _kept(module, name, rows, columns, int((~keep).sum()), reasons)
    if not bool(keep.any()):
        keep[0] = True  # a layer needs at least one unit, whose numbers stay what they are
    new_first, new_second = _without(first, second, act, keep)
    if hasattr(module, "fc1"):
        result = _with_parts(module, fc1=new_first, fc2=new_second)
    else:
        pw1: Any = module.pw1
        pw2: Any = module.pw2
        result = _with_parts(module, pw1=_with_parts(pw1, conv=new_first), pw2=_with_parts(pw2, conv=new_second))
    dense = rows.numel() + columns.numel()
    nonzero = int(rows.count_nonzero()) + int(columns.count_nonzero())
    realised = new_first.weight.numel() + new_second.weight.numel()
    share = 100 * (1 - nonzero / realised) if nonzero < realised else 0
    reason = f"{share:.0f} % zeros in matrices, which are computed in full" if share else ""
    return result, LayerReport(name, type(module).__name__, len(keep), int(keep.sum()), dense, nonzero, realised, reason)


def _kept(module: nn.Module, name: str, rows: Tensor, columns: Tensor, dead: int, reasons: list[str]) -> LayerReport:
    """Report an MLP that keeps its dead units because of what was put on its layers."""
    dense = rows.numel() + columns.numel()
    nonzero = int(rows.count_nonzero()) + int(columns.count_nonzero())
    reason = f"{dead} hidden units have zero weights but are kept: " + "; ".join(reasons)
    return LayerReport(name, type(module).__name__, len(rows), len(rows), dense, nonzero, dense, reason)


def _pair(module: nn.Module) -> tuple[Any, nn.Module, Any] | None:
    """Give first layer, activation and second layer of an MLP whose units do not mix, None for any other module."""
    children: dict[str, Any] = dict(module.named_children())
    first: Any
    second: Any
    if type(module).__name__ == "Mlp" and {"fc1", "act", "fc2"} <= set(children) <= {*_MLP_PARTS}:
        if not isinstance(children.get("norm", nn.Identity()), nn.Identity):
            return None
        first, act, second = children["fc1"], children["act"], children["fc2"]
    elif set(children) == _FEED_FORWARD and all(isinstance(children[key], ConvNorm) for key in ("pw1", "pw2")):
        pw1, pw2 = children["pw1"], children["pw2"]
        if not (isinstance(pw1.bn, nn.Identity) and isinstance(pw2.bn, nn.Identity)):
            return None
        first, act, second = pw1.conv, pw1.act, pw2.conv
    else:
        return None
    fits = all(_is_matrix(layer) for layer in (first, second)) and type(act).__name__ in _ELEMENTWISE
    return (first, act, second) if fits else None


_MLP_PARTS = ("fc1", "act", "drop1", "norm", "fc2", "drop2")


def _is_matrix(layer: nn.Module) -> bool:
    if not is_plain(layer) or hasattr(layer, "parametrizations"):
        return False
    if isinstance(layer, nn.Conv2d):
        plain = layer.padding in (0, (0, 0), "valid") and tuple(layer.stride) == (1, 1)
        return plain and layer.groups == 1 and tuple(layer.kernel_size) == (1, 1)
    return isinstance(layer, nn.Linear)


def _without(first: Any, second: Any, act: nn.Module, keep: Tensor) -> tuple[Any, Any]:
    """Give both layers with the units `keep` (units,) only; what the others put out is constant and goes to the bias."""
    start = first.weight.new_zeros(len(keep)) if first.bias is None else first.bias.detach()
    held = act(start.clone())
    # The row of a dropped unit is zero, or its column is and takes nothing of what stands here.
    columns = second.weight.detach().flatten(1).double()
    added = columns[:, ~keep] @ held[~keep].double()
    bias = added if second.bias is None else second.bias.detach().double() + added
    new_first = _like(first, first.weight.detach()[keep], None if first.bias is None else first.bias.detach()[keep])
    with_bias = second.bias is not None or bool((added != 0).any())
    new_second = _like(second, second.weight.detach()[:, keep], bias.to(second.weight.dtype) if with_bias else None)
    return new_first, new_second


def _like(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """Give a layer like `layer` with other numbers of inputs and outputs; without a draw of random numbers."""
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    trained = is_trained(layer)
    new.weight = nn.Parameter(weight.clone(), requires_grad=trained)
    new.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=trained)
    names = ("out_channels", "in_channels") if isinstance(layer, nn.Conv2d) else ("out_features", "in_features")
    for name, size in zip(names, weight.shape):
        setattr(new, name, size)
    return new


def _with_parts(module: nn.Module, **parts: nn.Module) -> Any:
    """Give `module` with other parts; the one given, which may stand elsewhere too, stays as it is."""
    new = copy.copy(module)
    new._modules = {**module._modules, **parts}
    return new
