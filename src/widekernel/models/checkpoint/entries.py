"""Finding the weights among the entries of a training checkpoint, whatever their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from widekernel.safe_pickle import Placeholder

# Names that the official scripts, timm, the mm* frameworks and tutorials use, in search order.
MODEL_KEYS = ("model", "state_dict", "module", "model_state", "model_state_dict")
EMA_KEYS = (
    *("model_ema", "state_dict_ema", "ema", "model_ema_state", "ema_state_dict", "ema_model", "ema_model_state_dict"),
    *("model_ema_state_dict", "averaged_model", "averaged_model_state_dict", "params_ema"),
)
_AVERAGED = re.compile(r"(^|[_.])(ema|swa|averaged|average|shadow)([_.]|$)", re.IGNORECASE)
_NOT_A_NETWORK = re.compile(r"optim|sched|scaler|criterion|loss|rng|random", re.IGNORECASE)
_MIN_TENSOR_FRACTION = 0.75


def is_averaged(name: str) -> bool:
    """Return whether an entry of this name holds averaged weights."""
    return name in EMA_KEYS or bool(_AVERAGED.search(name))


def find_networks(loaded: Mapping[Any, Any], averaged: bool) -> tuple[str, ...]:
    """Return the names of the entries that look like the weights of a network.

    Such an entry holds tensors, and little else, under names that contain dots.

    Args:
        loaded: contents of the checkpoint.
        averaged: whether to look for averaged weights instead of the others.
    """
    names = (name for name, value in loaded.items() if isinstance(name, str) and _is_network(value))
    return tuple(name for name in names if is_averaged(name) == averaged and not _NOT_A_NETWORK.search(name))


def is_state_dict(loaded: Mapping[Any, Any]) -> bool:
    """Return whether a mapping holds tensors whose names contain dots, as in a network, unlike a stored loss value."""
    return any(isinstance(value, Tensor) and "." in str(key) for key, value in loaded.items())


def holds_arrays(loaded: Mapping[Any, Any]) -> bool:
    """Return whether a mapping holds NumPy arrays where a state dict has tensors."""
    return any(
        isinstance(value, Placeholder) and value.named.startswith("numpy.") and "." in str(key)
        for key, value in loaded.items()
    )


def _is_network(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    tensors = sum(isinstance(inner, Tensor) for inner in value.values())
    return tensors > 0 and tensors >= _MIN_TENSOR_FRACTION * len(value) and is_state_dict(value)
