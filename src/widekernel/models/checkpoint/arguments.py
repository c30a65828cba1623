"""The arguments of loading and saving: a path, and a network that may be wrapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models._features import FeatureGetterNet
from torch import nn

from widekernel.errors import ArgumentError
from widekernel.layers import wrappers

# Names under which fully sharded and averaged networks keep the network.
_WRAPPED = ("_fsdp_wrapped_module", "module")


def resolve_path(path: Any) -> Path:
    """Return the path of a file with `~` expanded.

    Raises:
        ArgumentError: if it is not a path.
    """
    try:
        return Path(path).expanduser()
    except TypeError:
        raise ArgumentError(
            f"path is a {type(path).__name__}: it must be the path of a file, as a str or Path. Load a state dict that is "
            "in memory with model.load_state_dict(state), or write it to a file with torch.save"
        ) from None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside timm's feature extractors and compiled, data-parallel and averaging wrappers.

    Raises:
        ArgumentError: if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}: it must be an nn.Module, and the path comes second")
    while True:
        model = wrappers.unwrap(model)
        if isinstance(model, FeatureGetterNet):
            model = model.model  # type: ignore[assignment]
            continue
        inner = next((name for name in _WRAPPED if isinstance(model._modules.get(name), nn.Module)), "")
        if not inner or (inner == "module" and len(model._modules) > 1):
            return model
        model = model._modules[inner]  # type: ignore[assignment]
