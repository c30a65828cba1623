"""Folding in place: what can be folded, by whatever asks for it."""

from __future__ import annotations

import warnings
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Foldable(Protocol):
    """A module that has a faster form with equal outputs in evaluation."""

    def foldable(self) -> bool:
        """Whether the module, as it is configured, has such a form."""

    def folded(self) -> nn.Module:
        """Give that form; may take over parts of the module, of which only a copy is ever asked."""


class Fusable:
    """Mixin: a module that `timm.utils.reparameterize_model` folds, wherever it finds it."""

    def fuse(self) -> nn.Module:
        """Give the folded form of this module and of what it holds, in its place; it may be the module itself.

        For a copy that keeps the original, and folds a network at once, see `widekernel.fold`.
        """
        assert isinstance(self, nn.Module)
        frozen = not any(parameter.requires_grad for parameter in self.parameters())
        result = fold_in_place(self, {})
        warn_of_kept(result, stacklevel=3)
        return result.requires_grad_(False) if frozen else result


def fold_in_place(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Fold `module` and what it holds; `done` has the result for every module seen, so that shared ones stay shared."""
    if module in done:
        return done[module]
    result = module
    if isinstance(module, Foldable) and module.foldable():
        result = module.folded().train(module.training)
        result.was_folded = True  # type: ignore[assignment]
    done[module] = done[result] = result
    # Not `named_children`, which leaves out the second name of a module.
    for name, child in result._modules.items():
        if child is not None:
            setattr(result, name, fold_in_place(child, done))
    return result


def is_folded(module: nn.Module) -> bool:
    """Whether anything in `module` has been folded, so that its weights are no longer those that are trained."""
    return any(getattr(part, "was_folded", False) for part in module.modules())


def warn_of_kept(module: nn.Module, stacklevel: int) -> None:
    """Warn of large kernels that could not be folded, and say why."""
    kept = [
        f"{name or 'the layer'} ({'; '.join(part.reasons_against_folding())})"  # type: ignore[operator]
        for name, part in module.named_modules()
        if hasattr(part, "reasons_against_folding")
    ]
    if kept:
        warnings.warn(f"these layers were not folded: {', '.join(kept)}", stacklevel=stacklevel + 1)
