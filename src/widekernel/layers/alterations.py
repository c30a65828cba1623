"""Alterations: hooks and replaced methods that users have put on a single module, unknown to its class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

REPLACEABLE_METHODS = ("forward", "_conv_forward", "__call__", "_call_impl")
"""Attributes of an instance that replace the computation of its class."""
# Hooks that compute weights before every call; `make_permanent` replaces them by the weights that they compute.
_COMPUTING_WEIGHTS = (prune.BasePruningMethod, SpectralNorm, WeightNorm)


def replaced_method(module: nn.Module) -> str:
    """Return the name of the method that has been replaced on this instance; "" if none has."""
    return next((name for name in REPLACEABLE_METHODS if name in vars(module)), "")


def alteration(module: nn.Module, name: str = "") -> str:
    """Describe an alteration of `module` that would be lost, or see other values, if another module replaced it.

    PyTorch's hooks that compute weights (pruning, old weight and spectral norms) do not count, nor do hooks whose function
    has an attribute `only_in_training`.

    Args:
        module: the module; its submodules are not examined.
        name: the name of the module in the text, by default its type.

    Returns:
        a short description, "" if there is no alteration.
    """
    called = name or type(module).__name__
    if replaced_method(module):
        return f"the {replaced_method(module)} of {called} has been replaced"
    if module._forward_hooks:
        return f"{called} has a forward hook"
    if any(not _is_harmless(hook) for hook in module._forward_pre_hooks.values()):
        return f"{called} has a forward pre-hook"
    return f"{called} has a backward hook" if module._backward_hooks or module._backward_pre_hooks else ""


def alterations(module: nn.Module, parts: Iterable[str]) -> list[str]:
    """List the alterations of those named parts of `module` that exist; "" is the module itself."""
    found = dict(module.named_modules(remove_duplicate=False))
    return [text for name in parts if name in found and (text := alteration(found[name], name))]


def replaced_methods(module: nn.Module) -> list[str]:
    """List the replaced method of `module`, if there is one.

    Used for modules that remain, with their hooks, when their parts are folded.
    """
    name = replaced_method(module)
    return [f"the {name} of {type(module).__name__} has been replaced"] if name else []


def parametrized(module: nn.Module, name: str) -> list[str]:
    """List the reason why the parameter `name` of `module` cannot be removed: it is parametrized; empty if it is not."""
    if not is_parametrized(module, name):
        return []
    return [f"{name} is parametrized: call torch.nn.utils.parametrize.remove_parametrizations(block, {name!r}) first"]


def _is_harmless(hook: Any) -> bool:
    return isinstance(hook, _COMPUTING_WEIGHTS) or getattr(hook, "only_in_training", False)
