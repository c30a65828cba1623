"""Folding in place: which modules can be folded, which are the result of it, and what happens to hooks."""

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

    The class of that form derives from `Folded`, or has a method `is_folded`, if checkpoints of the network must know about
    it.
    """

    def foldable(self) -> bool:
        """Return whether this module, as it is configured, has such a form."""

    def folded(self) -> nn.Module:
        """Return that form. It may take over parts of the module; only copies are ever folded."""


class Folded:
    """Mixin: a form that modules are folded to. Its parameters are not the trained ones."""

    def is_folded(self) -> bool:
        """Return True."""
        return True


class Fusable:
    """Mixin: a module that `timm.utils.reparameterize_model` folds wherever it finds it."""

    def fuse(self) -> nn.Module:
        """Fold this module and what it holds, in place, and return the folded form, which may be the module itself.

        `widekernel.fold` folds a whole network and leaves the original as it is.
        """
        assert isinstance(self, nn.Module)
        frozen = not is_trained(self)
        make_permanent(self)
        result = fold_in_place(self)
        warn_about_unfolded(result, stacklevel=3)
        return result.requires_grad_(False) if frozen else result


def fold_in_place(root: nn.Module) -> nn.Module:
    """Fold `root` and what it holds, and return the folded form; modules used in several places stay shared."""

    def replace(module: nn.Module, _: str) -> tuple[nn.Module, bool]:
        if isinstance(module, Foldable) and module.foldable():
            return module.folded().train(module.training), True
        return module, True

    return replace_modules(root, replace)


def deep_copy(model: ModuleT) -> ModuleT:
    """Return a deep copy of `model`, also where hooks have left computed weights in it, which PyTorch does not copy."""
    computed = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


def make_permanent(model: nn.Module) -> None:
    """Replace hooks that compute weights before every call (pruning, old weight and spectral norms) by what they compute.

    Raises:
        ArgumentError: if a kernel was pruned and then trained, but PyTorch never applies the mask to it.
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
    """Raise if a pruned list of kernels, which is never called itself, does not hold the product of mask and weights."""
    key = hook._tensor_name
    if isinstance(part, nn.ParameterList) and not torch.equal(getattr(part, key), hook.apply_mask(part)):
        raise ArgumentError(
            f"{name}.{key} was trained after torch.nn.utils.prune had pruned it, without effect: the mask is applied when a "
            "module is called, which a list of kernels never is. Call torch.nn.utils.prune.remove on it before training and "
            "mask it with widekernel.sparsity, which holds in any loop"
        )


def is_folded(model: nn.Module) -> bool:
    """Return whether anything in `model` has been folded, so that its parameters are no longer the trained ones."""
    return any(part.is_folded() for part in model.modules() if hasattr(type(part), "is_folded"))  # type: ignore[operator]


def is_trained(*sources: nn.Module | Tensor | None) -> bool:
    """Return whether any of the parameters requires gradients, so that whatever is computed from them does, too."""
    tensors = [
        source.parameters() if isinstance(source, nn.Module) else [source] for source in sources if source is not None
    ]
    return any(tensor.requires_grad for some in tensors for tensor in some)


def warn_about_unfolded(module: nn.Module, stacklevel: int) -> None:
    """Warn about layers that could not be folded, or were left alone because of what users put on them, with reasons."""
    kept = []
    for name, part in module.named_modules():
        listing = getattr(part, "reasons_against_folding", getattr(part, "alterations", list))
        reasons: list[str] = listing()
        if reasons:
            kept.append(f"{name or 'the layer'} ({'; '.join(reasons)})")
    if kept:
        warnings.warn(f"these layers were not folded: {', '.join(kept)}", stacklevel=stacklevel + 1)
