"""What users have put on a single module, which its class knows nothing of: hooks, and another way of computing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# What an instance has when someone has put something in the place of its class's way of computing.
_REPLACED = ("forward", "_conv_forward", "__call__", "_call_impl")
# These put weights in before every call, which `settle` does for good.
_OF_WEIGHTS = (prune.BasePruningMethod, SpectralNorm, WeightNorm)


def replaced(module: nn.Module) -> str:
    """Name the method that has been replaced on this instance, "" if none has."""
    return next((name for name in _REPLACED if name in vars(module)), "")


def alteration(module: nn.Module, name: str = "") -> str:
    """Say what has been put on `module`, which is lost or sees other values when another one takes its place; "" if nothing.

    Hooks of PyTorch that compute weights (pruning, old weight and spectral norms), and those whose function has an
    attribute `only_in_training`, do not count.

    Args:
        module: itself, not what it holds.
        name: what it is called in the text, by default its type.
    """
    called = name or type(module).__name__
    if replaced(module):
        return f"the {replaced(module)} of {called} has been replaced"
    if module._forward_hooks:
        return f"{called} has a forward hook"
    if any(not _is_known(hook) for hook in module._forward_pre_hooks.values()):
        return f"{called} has a forward pre-hook"
    return f"{called} has a backward hook" if module._backward_hooks or module._backward_pre_hooks else ""


def alterations(module: nn.Module, parts: Iterable[str]) -> list[str]:
    """List what has been put on those parts of `module` that exist; "" is the module itself."""
    found = dict(module.named_modules(remove_duplicate=False))
    return [text for name in parts if name in found and (text := alteration(found[name], name))]


def parametrised(module: nn.Module, name: str) -> list[str]:
    """Say, if it is so, that a parameter of `module` is computed and cannot be taken away."""
    if not is_parametrized(module, name):
        return []
    return [f"{name} is parametrised: call torch.nn.utils.parametrize.remove_parametrizations(block, {name!r}) first"]


def replacement_of_forward(module: nn.Module) -> list[str]:
    """Say, if it is so, that `module`, which keeps its hooks when its parts are folded, has another way of computing."""
    name = replaced(module)
    return [f"the {name} of {type(module).__name__} has been replaced"] if name else []


def _is_known(hook: Any) -> bool:
    return isinstance(hook, _OF_WEIGHTS) or getattr(hook, "only_in_training", False)
