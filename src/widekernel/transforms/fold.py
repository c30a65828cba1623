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

    Layers that equal no single kernel (SLaK_pw with `padding="same"`) stay as they are; a warning names them.
    """
    folded = copy.deepcopy(model).eval()
    result = _fold(folded)
    kept = [name for name, module in result.named_modules() if isinstance(module, LargeKernel)]
    if kept:
        warnings.warn(f"these layers equal no single kernel and were not folded: {', '.join(kept)}", stacklevel=2)
    return result  # type: ignore[return-value]


def _fold(module: nn.Module) -> nn.Module:
    if isinstance(module, Foldable) and module.foldable():
        module = module.folded().eval()
    for name, child in module.named_children():
        setattr(module, name, _fold(child))
    return module
