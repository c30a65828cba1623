"""Reading checkpoint files safely, whatever container the weights are in."""

from __future__ import annotations

import argparse
import pickle
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from widekernel.errors import CheckpointError
from widekernel.models.layouts.layout import State

# Where the official scripts, timm and the mm* frameworks keep the weights, in the order in which they are looked for.
_LOADING = threading.Lock()
MODEL_KEYS = ("model", "state_dict", "module", "model_state")
EMA_KEYS = ("model_ema", "state_dict_ema", "ema", "model_ema_state")


@dataclass
class Container:
    """What a checkpoint file holds.

    Attributes:
        state: the weights asked for, as they are named in the file.
        found_in: the entry that they were in, "" for a bare state dict.
        others: names of the other entries, such as the optimizer's.
    """

    state: State
    found_in: str
    others: tuple[str, ...] = ()


def read(path: str | Path, weights: str = "model") -> Container:
    """Read the weights of a checkpoint without running any code that it may carry.

    Args:
        path: a `.safetensors` file or one written by `torch.save`.
        weights: "model" or "ema".

    Raises:
        CheckpointError: if the file is missing, damaged, unsafe, or holds no such weights.
    """
    path = Path(path)
    if weights not in ("model", "ema"):
        raise CheckpointError(f"weights={weights!r} is unknown: it must be 'model' or 'ema'")
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the path of a checkpoint file in it")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, weights)
    return _pick(path, _load(path), weights)


def _load(path: Path) -> Any:
    try:
        # The official checkpoints carry their command line; a Namespace is a bare holder of values. The list of what may
        # be loaded is the process's, so that two threads must not change it at once.
        with _LOADING, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if any(sign in reason for sign in ("GLOBAL", "Unsupported class")):
            raise CheckpointError(
                f"{path} holds more than tensors and could run code when loaded; it was not opened. "
                f"({_summary(reason)}) Save its weights alone: torch.save(model.state_dict(), path)"
            ) from error
        raise CheckpointError(
            f"{path} is damaged, cut off or not a checkpoint ({_summary(reason)}); nothing in it was run"
        ) from error
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise CheckpointError(
            f"{path} is damaged, cut off or not a checkpoint ({type(error).__name__}: {_summary(str(error))}): "
            "fetch it again"
        ) from error


def _summary(reason: str) -> str:
    """Give the line of a loader's message that says what was wrong, without its advice to load unsafely."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    telling = [line for line in lines if "nsupported" in line or "GLOBAL" in line]
    return (telling or lines or ["no reason given"])[0].split(" Please use")[0][:200]


def _pick(path: Path, loaded: Any, weights: str) -> Container:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    for name in MODEL_KEYS if weights == "model" else EMA_KEYS:
        inner = loaded.get(name)
        if isinstance(inner, Mapping):
            others = tuple(str(key) for key in loaded if key != name)
            if not any(isinstance(value, Tensor) for value in inner.values()):
                within = _pick(path, inner, "model")  # downstream RepLKNet: model -> state_dict
                return Container(within.state, f"{name}.{within.found_in}".rstrip("."), (*others, *within.others))
            unlike = tuple(f"{name}.{key}" for key, value in inner.items() if not isinstance(value, Tensor))
            return Container(_tensors(inner), name, (*others, *unlike))
    others = tuple(str(key) for key, value in loaded.items() if not isinstance(value, Tensor))
    if weights == "ema":
        raise CheckpointError(
            f"{path} holds no averaged (EMA) weights; its entries are {', '.join(others) or 'only weights'}: "
            "load weights='model'"
        )
    if any(isinstance(value, Tensor) for value in loaded.values()):
        return Container(_tensors(loaded), "", others)
    averaged = [name for name in EMA_KEYS if name in others]
    advice = ": load weights='ema'" if averaged else ""
    raise CheckpointError(f"{path} holds no weights; its entries are {', '.join(others) or 'none'}{advice}")


def _tensors(state: Mapping[str, Any]) -> State:
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def _read_safetensors(path: Path, weights: str) -> Container:
    if weights == "ema":
        raise CheckpointError(f"{path} is a safetensors file, which holds one set of weights: load weights='model'")
    try:
        with safe_open(path, framework="pt") as file:
            return Container({key: file.get_tensor(key) for key in file.keys()}, "")  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, cut off or not a safetensors file ({error}): fetch it again") from error
