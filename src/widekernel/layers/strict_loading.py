"""Strict loading of weights into folded and compacted networks: all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def load_strictly(module: nn.Module) -> None:
    """Make `load_state_dict` of a network reject weights that do not fit before it loads any.

    PyTorch loads the weights that fit and raises afterwards. If layers hold tables of merged parts, the resulting mixture is
    worse than either network.
    """
    if not any(getattr(hook, "hook", None) is _refuse for hook in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(_refuse)


def misfits(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> list[str]:
    """List why a state dict does not fit a network with layers that hold tables; empty if it does, or if there are none.

    Args:
        module: the network; its layers that hold tables have a method `table_misfits(state, prefix)`.
        state: the state dict; missing keys are not reported.
        prefix: prefix of the module's keys in the state dict, "" or ending in a dot.
    """
    found, layers = [], [(name, part) for name, part in module.named_modules() if hasattr(part, "table_misfits")]
    for name, part in layers:
        inside = f"{prefix}{name}." if name else prefix
        found += part.table_misfits(state, inside)  # type: ignore[operator]
        own = part.state_dict(prefix=inside).keys()
        others = [key for key in state if inside and key.startswith(inside)]
        if others and not own & set(others):
            found.append(f"{others[0]} belongs to another form of the layer")
    for key, value in module.state_dict(prefix=prefix).items() if layers else ():
        theirs = state.get(key)
        if isinstance(theirs, Tensor) and theirs.shape != value.shape and theirs.numel() + value.numel() > 2:
            found.append(f"{key} has shape {tuple(theirs.shape)} but {tuple(value.shape)} here")
    return found


def _refuse(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
    problems = misfits(module, state, prefix)
    if problems:
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__name__}; nothing was loaded:\n\t" + "\n\t".join(problems)
        )
