"""Folding: the fast inference form of a network, with the same outputs."""

from __future__ import annotations

import copy
import warnings
from typing import Protocol, TypeVar, runtime_checkable

from torch import nn

from widekernel.layers import LargeKernel

ModelT = TypeVar("ModelT", bound=nn.Module)


@runtime_checkable
class Foldable(Protocol):
    """A module that has a faster form with equal outputs in evaluation."""

    def foldable(self) -> bool:
        """Whether the module, as it is configured, has such a form."""

    def folded(self) -> nn.Module:
        """Give that form; may take over parts of the module, of which only a copy is ever asked."""


def fold(model: ModelT) -> ModelT:
    """Give a copy of `model` in its fast inference form; the original is left as it is.

    Every large-kernel layer becomes one operator call: its batch norms and identity are folded in and covered kernels
    absorbed. Batch norms before and after 1x1 convolutions and linear layers, and layer scales, are folded too.
    Outputs in evaluation mode stay the same up to rounding.

    Layers that equal no single kernel (SLaK_pw with `padding="same"`), or whose norms are more than batch norms with running
    statistics, stay as they are; a warning names them and says why. Modules that are used in several places stay shared, and
    a network without trainable parameters stays without.
    """
    result = _fold(copy.deepcopy(model).eval(), {})
    kept = [
        f"{name or 'the layer'} ({'; '.join(module.reasons_against_folding())})"
        for name, module in result.named_modules()
        if isinstance(module, LargeKernel)
    ]
    if kept:
        warnings.warn(f"these layers were not folded: {', '.join(kept)}", stacklevel=2)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        result.requires_grad_(False)
    for module in result.modules():
        # Also the network within a wrapper: what it is saved as depends on it.
        if module is result or hasattr(module, "layouts"):
            module.is_folded = True  # type: ignore[assignment]
    return result  # type: ignore[return-value]


def _fold(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Fold `module` and what it holds; `done` has the result for every module seen, so that shared ones stay shared."""
    if module in done:
        return done[module]
    result = module
    if isinstance(module, Foldable) and module.foldable():
        result = module.folded().eval()
    done[module] = done[result] = result
    # Not `named_children`, which leaves out the second name of a module.
    for name, child in result._modules.items():
        if child is not None:
            setattr(result, name, _fold(child, done))
    return result
