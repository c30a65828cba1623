"""Folding in place: what can be folded, by whatever asks for it."""

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

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
        settle(self)
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


def copied(model: ModuleT) -> ModuleT:
    """Give a copy of `model`, also where hooks have left computed weights in it, which PyTorch would not copy."""
    computed = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


def settle(model: nn.Module) -> None:
    """Put the weights that hooks compute before every call (pruning, old weight and spectral norms) in for good.

    Raises:
        ArgumentError: if a kernel was pruned that PyTorch never applies the mask to, and has been trained since.
    """
    for name, part in model.named_modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod):
                _check_in_force(name, part, hook)
                prune.remove(part, hook._tensor_name)
            elif isinstance(hook, (SpectralNorm, WeightNorm)):
                hook.remove(part)
                del part._forward_pre_hooks[key]


def _check_in_force(name: str, part: nn.Module, hook: prune.BasePruningMethod) -> None:
    """Raise if a pruned list of kernels, which is never called itself, does not hold what its mask and weights give."""
    key = hook._tensor_name
    if isinstance(part, nn.ParameterList) and not torch.equal(getattr(part, key), hook.apply_mask(part)):
        raise ArgumentError(
            f"{name}.{key} was trained after torch.nn.utils.prune had pruned it, without effect: the mask is applied when a "
            "module is called, which a list of kernels never is. Call torch.nn.utils.prune.remove on it before training and "
            "mask it with widekernel.sparsity, which holds in any loop"
        )


def is_folded(module: nn.Module) -> bool:
    """Whether anything in `module` has been folded, so that its weights are no longer those that are trained."""
    return any(getattr(part, "was_folded", False) for part in module.modules())


def is_trained(*sources: nn.Module | Tensor | None) -> bool:
    """Whether any of the parameters requires gradients, so that what is made from them all does."""
    tensors = [
        source.parameters() if isinstance(source, nn.Module) else [source] for source in sources if source is not None
    ]
    return any(tensor.requires_grad for some in tensors for tensor in some)


def warn_of_kept(module: nn.Module, stacklevel: int) -> None:
    """Warn of large kernels that could not be folded, and of layers left alone for what users put on them; say why."""
    kept = []
    for name, part in module.named_modules():
        listing = getattr(part, "reasons_against_folding", getattr(part, "alterations", list))
        reasons: list[str] = listing()
        if reasons:
            kept.append(f"{name or 'the layer'} ({'; '.join(reasons)})")
    if kept:
        warnings.warn(f"these layers were not folded: {', '.join(kept)}", stacklevel=stacklevel + 1)
