"""Folding in place: which modules can be folded, which are folded already, and what happens to hooks."""

from __future__ import annotations

import copy
import warnings
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from widekernel.errors import ArgumentError
from widekernel.layers.replacing import replace_modules

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@runtime_checkable
class Foldable(Protocol):
    """A module that has a faster form with equal outputs in evaluation.

    If checkpoints of the network must distinguish that form, its class derives from `Folded` or has a method `is_folded`.
    """

    def foldable(self) -> bool:
        """Return whether this module, as configured, has a folded form."""

    def folded(self) -> nn.Module:
        """Return the folded form. It may reuse parts of the module, because only copies are ever folded."""


class Folded:
    """Mixin for folded forms. Their parameters are not the trained ones."""

    def is_folded(self) -> bool:
        """Return True."""
        return True


class Fusable:
    """Mixin for modules that `timm.utils.reparameterize_model` folds wherever it finds them."""

    def fuse(self) -> nn.Module:
        """Fold this module and its submodules in place, and return the folded form, which may be the module itself.

        `widekernel.fold` folds a whole network and leaves the original unchanged.
        """
        assert isinstance(self, nn.Module)
        frozen = not is_trained(self)
        make_permanent(self)
        result = fold_in_place(self)
        warn_about_unfolded(result, stacklevel=3)
        return result.requires_grad_(False) if frozen else result


def fold_in_place(root: nn.Module) -> nn.Module:
    """Fold `root` and its submodules, and return the folded form; modules used in several places stay shared."""

    def replace(module: nn.Module, _: str) -> tuple[nn.Module, bool]:
        if isinstance(module, Foldable) and module.foldable():
            return module.folded().train(module.training), True
        return module, True

    return replace_modules(root, replace)


def deep_copy(model: ModuleT) -> ModuleT:
    """Return a deep copy of `model`, including computed weights that hooks have left in it, which PyTorch cannot copy."""
    computed = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


def make_permanent(model: nn.Module) -> None:
    """Replace hooks that compute weights before every call (pruning, old weight and spectral norms) by their results.

    Raises:
        ArgumentError: if a kernel was pruned and then trained although PyTorch never applied the mask to it.
    """
    for name, part in model.named_modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod):
                _check_applied(name, part, hook)
                prune.remove(part, hook._tensor_name)
            elif isinstance(hook, (SpectralNorm, WeightNorm)):
                hook.remove(part)
                del part._forward_pre_hooks[key]


def _check_applied(name: str, part: nn.Module, hook: prune.BasePruningMethod) -> None:
    """Raise if a pruned list of kernels does not hold the product of mask and weights: the list itself is never called."""
    key = hook._tensor_name
    if isinstance(part, nn.ParameterList) and not torch.equal(getattr(part, key), hook.apply_mask(part)):
        raise ArgumentError(
            f"{name}.{key} was trained after torch.nn.utils.prune had pruned it, but the mask had no effect: PyTorch "
            "applies it when the module is called, and a list of kernels never is. Call torch.nn.utils.prune.remove on it "
            "before training and mask it with widekernel.sparsity, which works in any training loop"
        )


def is_folded(model: nn.Module) -> bool:
    """Return whether anything in `model` has been folded, so that its parameters are no longer the trained ones."""
    return any(part.is_folded() for part in model.modules() if hasattr(type(part), "is_folded"))  # type: ignore[operator]


def is_trained(*sources: nn.Module | Tensor | None) -> bool:
    """Return whether any of the parameters requires gradients, so that values computed from them do, too."""
    tensors = [
        source.parameters() if isinstance(source, nn.Module) else [source] for source in sources if source is not None
    ]
    return any(tensor.requires_grad for some in tensors for tensor in some)


def warn_about_unfolded(module: nn.Module, stacklevel: int) -> None:
    """Warn about layers that were not folded, because they cannot be or because of alterations, with reasons."""
    kept = []
    for name, part in module.named_modules():
        listing = getattr(part, "reasons_against_folding", getattr(part, "alterations", list))
        reasons: list[str] = listing()
        if reasons:
            kept.append(f"{name or 'the layer'} ({'; '.join(reasons)})")
    if kept:
        warnings.warn(f"these layers were not folded: {', '.join(kept)}", stacklevel=stacklevel + 1)
